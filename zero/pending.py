"""Parameters whose values still lie in a file.

``ZeroInitContext`` gives a model such parameters; :func:`zero.initialize` reads each straight into its chunk. Until
then they have shape, dtype and everything else that is not a value, and take no memory. Whatever asks for a value
before (a resize of the embeddings, an initialisation of one's own) makes that one parameter an ordinary one first, so
the result is what ``from_pretrained`` alone would have given; running or saving the whole model is refused.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gemini.hostinfo import cpu_count
from gemini.views import read_tensor
from zero.errors import UserError
from zero.weights_folder import ShardedWeights

_MAX_THREADS = 4
_MAX_QUEUED = 256


class Stored:
    """One tensor in a file, as a model of some dtype sees it.

    Attributes:
        dtype: what the stored values are cast to before anything else sees them.
    """

    def __init__(self, weights: ShardedWeights, name: str, dtype: torch.dtype | None = None) -> None:
        self.weights = weights
        self.name = name
        self.dtype = dtype or weights.dtype(name)
        self._values: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return self.weights.shape(self.name)

    @property
    def untouched(self) -> bool:
        """Whether it is as in the file: not cast, and nobody has its values in memory."""
        return self._values is None and self.dtype == self.weights.dtype(self.name)

    def cast(self, dtype: torch.dtype) -> Stored:
        """The same tensor seen in another dtype; only of an untouched one."""
        return Stored(self.weights, self.name, dtype)

    def values(self) -> torch.Tensor:
        """The values in memory, read once: everybody gets the same storage."""
        if self._values is None:
            values = torch.empty(self.shape, dtype=self.dtype, device="cpu")
            self.weights.read_into(self.name, values, through=self.dtype)
            self._values = values
        return self._values

    def jobs(self, start: int | None, targets: list[torch.Tensor]) -> list[Callable[[], None]]:
        """Pieces of work that write the values into tensors of this shape and any dtypes (:class:`gemini.views.Read`)."""
        if self._values is None:
            return self.weights.jobs(self.name, *targets, through=self.dtype, first=start)
        return [functools.partial(read_tensor, self._values, start, targets)]

    def equals(self, other: Stored) -> bool:
        """``torch.equal`` of two tensors of one shape and dtype, block by block."""
        if self._values is not None or other._values is not None or self._file_dtype != other._file_dtype:
            return torch.equal(self.values(), other.values())
        pairs = zip(
            self.weights.blocks(self.name, self.dtype), other.weights.blocks(other.name, other.dtype), strict=True
        )
        return all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in pairs)

    @property
    def _file_dtype(self) -> torch.dtype:
        return self.weights.dtype(self.name)


class PendingTensor(torch.Tensor):
    """A tensor (or parameter) whose values are a :class:`Stored`; see the module's text.

    Under it lies one NaN, expanded: code that gets around ``__torch_function__`` computes NaN, never a wrong number.
    """

    _stored: Stored

    @staticmethod
    def of(stored: Stored) -> PendingTensor:
        """A new one."""
        floating = stored.dtype.is_floating_point or stored.dtype.is_complex
        one = torch.full((), float("nan") if floating else 0, dtype=torch.float32, device="cpu").to(stored.dtype)
        tensor: PendingTensor = torch.Tensor._make_subclass(PendingTensor, one.expand(stored.shape))
        tensor._stored = stored
        return tensor

    def load(self) -> None:
        """Becomes an ordinary tensor or parameter, in place: every reference to it sees the change.

        Raises:
            UserError: the file cannot be read any more.
        """
        self._settle(self._stored.values())

    def load_into(self, start: int | None, targets: list[torch.Tensor]) -> list[Callable[[], None]]:
        """Becomes an ordinary parameter with no elements; returns the work that writes its values elsewhere."""
        jobs = self._stored.jobs(start, targets)
        self._settle(torch.empty(0, dtype=self._stored.dtype, device="cpu"))
        return jobs

    def _settle(self, values: torch.Tensor) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            self.data = values
        parameter = self.__dict__.pop("_is_param", False)
        del self._stored
        self.__class__ = nn.Parameter if parameter else torch.Tensor  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        """Without values."""
        del tensor_contents
        stored = self._stored
        return f"PendingTensor({tuple(stored.shape)}, {stored.dtype}, {stored.name!r} in {stored.weights.folder})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answers what needs no values; for anything else loads the tensors concerned and runs the function."""
        kwargs = kwargs or {}
        if func in _NO_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        special = _SPECIAL.get(func)
        if special is not None:
            result = special(*args, **kwargs)
            if result is not NotImplemented:
                return result
        for tensor in pytree.tree_leaves((args, kwargs)):
            if type(tensor) is PendingTensor:
                tensor.load()
        return func(*args, **kwargs)


def is_pending(tensor: Any) -> bool:
    """Whether a tensor's values are still in a file."""
    return type(tensor) is PendingTensor


# -- what needs no values ----------------------------------------------------------------------------------------------

_GETTERS = (
    "shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "grad", "grad_fn", "is_leaf", "requires_grad",
    "retains_grad", "output_nr", "_version", "is_cpu", "is_cuda", "is_meta", "is_mkldnn", "is_mps", "is_nested",
    "is_quantized", "is_sparse", "is_sparse_csr", "is_xla", "is_xpu",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "is_signed",
    "is_inference",
    "get_device", "requires_grad_", "__len__", "register_hook", "register_post_accumulate_grad_hook",
    "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor",
)  # fmt: skip
_FUNCTIONS = (
    "is_floating_point", "is_complex", "is_signed", "numel", "empty_like", "zeros_like", "ones_like", "full_like",
    "rand_like", "randn_like", "result_type",
)  # fmt: skip

# Names come and go with versions of torch: one that is not there needs no answer.
_NO_VALUES = {
    *(getattr(torch.Tensor, name).__get__ for name in _GETTERS if hasattr(torch.Tensor, name)),
    *(getattr(torch.Tensor, name).__set__ for name in ("requires_grad", "grad")),
    *(getattr(torch.Tensor, name) for name in _METHODS if hasattr(torch.Tensor, name)),
    *(getattr(torch, name) for name in _FUNCTIONS if hasattr(torch, name)),
}


def _in_row_major(method: str) -> Any:
    def answer(tensor: PendingTensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), method)(*args, **kwargs)

    return answer


def _detach(tensor: PendingTensor) -> Any:
    """An alias: both share their values once one of them is loaded."""
    return PendingTensor.of(tensor._stored)


def _getitem(tensor: Any, index: Any) -> Any:
    """``tensor[...]`` of what is no parameter yet: transformers' way to ask a file for a tensor."""
    return tensor if index is Ellipsis and not _is_parameter(tensor) else NotImplemented


def _to(tensor: Any, *args: Any, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    """A cast of what is no parameter yet: transformers' way to bring a stored tensor to the model's dtype."""
    stays = device is None or torch.device(device).type == "cpu"
    if args or kwargs or not stays or _is_parameter(tensor) or not tensor._stored.untouched:
        return NotImplemented
    return tensor if dtype is None else PendingTensor.of(tensor._stored.cast(dtype))


def _equal(left: Any, right: Any) -> Any:
    if not (is_pending(left) and is_pending(right) and left.shape == right.shape and left.dtype == right.dtype):
        return NotImplemented
    return left._stored.equals(right._stored)


def _deepcopy(tensor: PendingTensor, memo: dict[int, Any]) -> Any:
    """Another parameter with values in the same place in the file."""
    if tensor._stored._values is not None:
        return NotImplemented
    if id(tensor) not in memo:
        stored = tensor._stored
        copy: torch.Tensor = PendingTensor.of(Stored(stored.weights, stored.name, stored.dtype))
        memo[id(tensor)] = nn.Parameter(copy, requires_grad=tensor.requires_grad) if _is_parameter(tensor) else copy
    return memo[id(tensor)]


def _is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


_SPECIAL: dict[Any, Any] = {
    torch.Tensor.stride: _in_row_major("stride"),
    torch.Tensor.is_contiguous: _in_row_major("is_contiguous"),
    torch.Tensor.detach: _detach,
    torch.Tensor.__getitem__: _getitem,
    torch.Tensor.to: _to,
    torch.equal: _equal,
    torch.Tensor.equal: _equal,
    torch.Tensor.__deepcopy__: _deepcopy,
}


# -- a whole model -----------------------------------------------------------------------------------------------------


class Reading:
    """Writes parameters' values into chunks, from their files or from memory; everything is there when it ends::

        with Reading() as read:
            chunk = Chunk(..., read=read)

    Files are read and cast by a few threads, while the caller goes on to the next parameter.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(min(_MAX_THREADS, cpu_count()), "zero-read")
        self._running: deque[Future[None]] = deque()

    def __enter__(self) -> Reading:
        """Starts."""
        return self

    def __call__(
        self,
        parameter: torch.Tensor,
        start: int | None,
        targets: list[torch.Tensor],
        then: Callable[[], None] | None = None,
    ) -> None:
        """Takes one parameter's values to tensors; see :class:`gemini.views.Read`.

        Raises:
            UserError: a file of an earlier one cannot be read.
        """
        if not isinstance(parameter, PendingTensor):
            read_tensor(parameter, start, targets, then)
            return
        for job in parameter.load_into(start, targets):
            self._running.append(self._pool.submit(job))
            if len(self._running) > _MAX_QUEUED:
                self._running.popleft().result()
        if then is not None:  # which has targets in memory of its own: no more than one parameter's at a time
            self._wait()
            then()

    def _wait(self) -> None:
        while self._running:
            self._running.popleft().result()

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        """Waits for everything; after an error only for what has started.

        Raises:
            UserError: a file cannot be read.
        """
        try:
            if kind is None:
                self._wait()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)


def remember(model: nn.Module) -> dict[str, Stored]:
    """Where the values of all parameters lie, by name, for :func:`restore`; empty if those of some are in memory."""
    pending = {name: parameter for name, parameter in model.named_parameters() if is_pending(parameter)}
    if len(pending) < sum(1 for _ in model.parameters()):
        return {}
    return {name: parameter._stored for name, parameter in pending.items() if isinstance(parameter, PendingTensor)}


def restore(model: nn.Module, stored: dict[str, Stored]) -> None:
    """Makes parameters pending again that have no values any more; each stays the object it is.

    Args:
        model: that :func:`remember` was asked about.
        stored: its answer.
    """
    for name, where in stored.items():
        parameter = model.get_parameter(name)
        with torch._C.DisableTorchFunctionSubclass():
            parameter.data = PendingTensor.of(where).data
        parameter.__class__ = PendingTensor  # type: ignore[assignment]
        parameter.__dict__.update(_stored=where, _is_param=True)
    guard(model)


def guard(model: nn.Module) -> None:
    """Refuses to run or save a model until :func:`release` or until none of its parameters is pending."""
    model.register_forward_pre_hook(_refuse_forward, prepend=True)
    model.register_state_dict_pre_hook(_refuse_state_dict)
    if hasattr(model, "save_pretrained"):
        # transformers writes the config before it asks for values: refuse before anything is written.
        model.__dict__["save_pretrained"] = functools.partial(_save_pretrained, model)


def release(model: nn.Module) -> None:
    """Undoes :func:`guard` on a model and all modules in it, and loads what is still pending."""
    for parameter in model.parameters():
        if isinstance(parameter, PendingTensor):
            parameter.load()
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._state_dict_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_refuse_forward, _refuse_state_dict)]:
                del hooks[key]
        if isinstance(module.__dict__.get("save_pretrained"), functools.partial):
            del module.__dict__["save_pretrained"]


def _refuse(model: nn.Module, what: str) -> None:
    pending = next((p for p in model.parameters() if isinstance(p, PendingTensor)), None)
    if pending is not None:
        raise UserError(
            f"{type(model).__name__} cannot {what}: it was loaded inside ZeroInitContext, its values are still in "
            f"{pending._stored.weights.folder}. Pass it to zero.initialize() first, or load it outside the context"
        )


def _refuse_forward(module: nn.Module, args: Any) -> None:
    del args
    _refuse(module, "run yet")


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    del prefix
    if not keep_vars:
        _refuse(module, "be saved yet")


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    _refuse(model, "be saved yet")
    return type(model).save_pretrained(model, *args, **kwargs)
