"""Logits that are not computed until somebody needs them: a causal LM's loss never does, all at once.

With a vocabulary of 50,000 to 250,000 tokens the logits of a batch, their fp32 copy and its gradient take more memory
than any layer. Here the output head hands on its input instead (:class:`LazyLogits`). Conversions, views and elementwise
operations with numbers are noted down; ``torch.nn.functional.cross_entropy`` takes them piece by piece
(:mod:`zero.chunked_loss`); anything else gets the real logits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zero.chunked_loss import Head, Pointwise, cross_entropy

_POINTWISE: dict[Any, str] = {torch.tanh: "tanh", torch.div: "div", torch.true_divide: "div", torch.mul: "mul"}


class LazyLogits:
    """What an output head would have returned, for ``hidden`` [..., hidden size].

    It behaves as the tensor [..., vocabulary]. Whatever cannot be put off computes the whole and goes on with that.

    Args:
        head: the linear layer.
        hidden: its input.
        begins_backward: see :class:`zero.chunked_loss.Head`.
    """

    __slots__ = ("_chain", "_head", "_hidden", "_real")

    def __init__(self, head: Head, hidden: torch.Tensor, chain: tuple[Pointwise, ...] = ()) -> None:
        self._head = head
        self._hidden = hidden
        self._chain = chain
        self._real: torch.Tensor | None = None

    # -- what it looks like ------------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """[..., vocabulary]."""
        return torch.Size((*self._hidden.shape[:-1], self._head.num_tokens))

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    @property
    def dtype(self) -> torch.dtype:
        """After the conversions noted so far."""
        return self._chain[-1].dtype if self._chain else self._hidden.dtype

    @property
    def device(self) -> torch.device:
        """Of the input."""
        return self._hidden.device

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self._hidden.ndim

    def dim(self) -> int:
        """Number of dimensions."""
        return self.ndim

    def __len__(self) -> int:
        """Of the first dimension."""
        return len(self._hidden)

    def real(self) -> torch.Tensor:
        """The logits themselves."""
        if self._real is None:
            self._real = self._head.logits(self._hidden, self._chain)
        return self._real

    # -- what can be put off -----------------------------------------------------------------------------------------

    def _then(self, operation: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> Any:
        if self._real is not None:
            return operation(self._real)
        return LazyLogits(self._head, self._hidden, (*self._chain, Pointwise(operation, dtype)))

    def _with(self, hidden: torch.Tensor) -> LazyLogits:
        return LazyLogits(self._head, hidden, self._chain)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Another dtype is noted down; another device computes."""
        if len(args) == 1 and not kwargs:
            wanted = args[0]
            if isinstance(wanted, torch.dtype):
                return self if wanted == self.dtype else self._then(lambda t: t.to(wanted), wanted)
            if isinstance(wanted, torch.device) and wanted == self.device:
                return self
        return self.real().to(*args, **kwargs)

    def float(self) -> Any:
        """In fp32."""
        return self.to(torch.float32)

    def contiguous(self) -> LazyLogits:
        """It has no memory that could be otherwise."""
        return self

    def view(self, *shape: Any) -> Any:
        """Another shape over the same vocabulary is noted down."""
        wanted = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if self._real is None and wanted and all(isinstance(n, int) for n in wanted) and self._keeps_vocabulary(wanted):
            return self._with(self._hidden.reshape(*wanted[:-1], self._hidden.shape[-1]))
        return self.real().reshape(*shape)

    reshape = view

    def _keeps_vocabulary(self, wanted: tuple[int, ...]) -> bool:
        num_rows, num_tokens = self._hidden.shape[:-1].numel(), self._head.num_tokens
        if wanted[-1] == -1:
            return torch.Size(wanted[:-1]).numel() == num_rows and -1 not in wanted[:-1]
        if wanted[-1] != num_tokens:
            return False
        return -1 in wanted[:-1] or torch.Size(wanted[:-1]).numel() == num_rows

    def __getitem__(self, index: Any) -> Any:
        """Some of the rows, over the whole vocabulary."""
        if self._real is None:
            parts = index if isinstance(index, tuple) else (index,)
            whole_rows = len(parts) < self.ndim if Ellipsis not in parts else _is_whole(parts[-1]) and len(parts) > 1
            if whole_rows and all(
                isinstance(part, slice | int) or part is Ellipsis or _is_list(part) for part in parts
            ):
                return self._with(self._hidden[index])
        return self.real()[index]

    def tanh(self) -> Any:
        """Elementwise."""
        return self._then(torch.tanh, self.dtype)

    def __mul__(self, other: Any) -> Any:
        """By a number."""
        if isinstance(other, int | float):
            return self._then(lambda t: t * other, self.dtype)
        return self.real() * other

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        """By a number."""
        if isinstance(other, int | float):
            return self._then(lambda t: t / other, self.dtype)
        return self.real() / other

    # -- everything else ---------------------------------------------------------------------------------------------

    def __setitem__(self, index: Any, value: Any) -> None:
        """Computes: from now on they are what is written."""
        self.real()[index] = value

    def __getattr__(self, name: str) -> Any:
        """Computes."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.real(), name)

    def __add__(self, other: Any) -> Any:
        """Computes."""
        return self.real() + other

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        """Computes."""
        return self.real() - other

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A torch function that takes logits."""
        del types
        kwargs = kwargs or {}
        if args and isinstance(args[0], LazyLogits) and args[0]._real is None:
            logits = args[0]
            if func is torch.nn.functional.cross_entropy and _is_plain(args[1:], kwargs):
                return logits._cross_entropy(*args[1:], **kwargs)
            name = _POINTWISE.get(func)
            if name == "tanh" and len(args) == 1 and not kwargs:
                return logits.tanh()
            if name in ("div", "mul") and len(args) == 2 and not kwargs:
                return logits / args[1] if name == "div" else logits * args[1]
        real = torch.utils._pytree.tree_map_only(LazyLogits, LazyLogits.real, (args, kwargs))
        return func(*real[0], **real[1])

    def _cross_entropy(self, target: torch.Tensor, **options: Any) -> torch.Tensor:
        if self.ndim != 2:
            return torch.nn.functional.cross_entropy(self.real(), target, **options)
        mean = options.get("reduction", "mean") == "mean"
        loss = cross_entropy(self._head, self._hidden, self._chain, target, options.get("ignore_index", -100), mean)
        return torch.nn.functional.cross_entropy(self.real(), target, **options) if loss is None else loss


def _is_list(part: Any) -> bool:
    """Whether an index is a list of numbers."""
    return isinstance(part, torch.Tensor) and part.dtype == torch.int64 and part.dim() == 1


def _is_whole(part: Any) -> bool:
    return isinstance(part, slice) and part == slice(None)


_DEFAULTS = {"weight": None, "size_average": None, "reduce": None, "label_smoothing": 0.0}


def _is_plain(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether ``cross_entropy`` is asked for what :mod:`zero.chunked_loss` computes."""
    if len(args) + ("target" in kwargs) != 1 or kwargs.get("reduction", "mean") not in ("mean", "sum"):
        return False
    if any(kwargs.get(key, default) != default for key, default in _DEFAULTS.items()):
        return False
    target = args[0] if args else kwargs["target"]
    return isinstance(target, torch.Tensor) and target.dtype == torch.int64 and target.dim() == 1


class LazyHead:
    """Lets a model's output head hand on its input, while a pass runs that computes a loss.

    Args:
        model: a Hugging Face causal LM; others are left as they are.
        most_logits: logits that may be there at a time.
        begins_backward: called when the head's backward begins.

    Attributes:
        active: logits of the pass that runs are put off.
    """

    def __init__(self, model: nn.Module, most_logits: int, begins_backward: Callable[[], None]) -> None:
        self.active = False
        self._module: weakref.ref[nn.Linear] | None = None
        get_head = getattr(model, "get_output_embeddings", None)
        module = get_head() if callable(get_head) else None
        if type(module) is not nn.Linear or "forward" in module.__dict__:
            return
        head = Head(module, most_logits, begins_backward)
        self._module = weakref.ref(module)
        module.forward = lambda hidden: (  # type: ignore[method-assign, assignment]
            LazyLogits(head, hidden) if self.active else nn.Linear.forward(module, hidden)  # type: ignore[return-value]
        )

    def remove(self) -> None:
        """The head computes by itself again."""
        module = self._module() if self._module is not None else None
        if module is not None:
            module.__dict__.pop("forward", None)
