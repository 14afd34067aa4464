"""An autograd graph cut into parts along time, so that backward can run part by part.

A forward is divided by borders, at which a transformer block begins or ends. Whatever is made before a border and used
after it is replaced there by a twin: the same memory, but the end of the graph. Backward of a later part leaves gradients
with the twins; backward of the part that made the tensor starts from them. It makes no difference how the tensor gets
from one part to the other (argument, result, what a hook has recorded inside of a block), nor how many use it: torch
functions are watched, and gradients of twins are added up. Were a use overlooked, backward would reach the earlier part
too soon, and either add up to the same, or raise since what it needs was freed.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from zero.errors import UserError

_REMEDY = 'use train.accumulation_order = "batch" for this model'


class Root:
    """A tensor that later parts use: an end of the graph of its own part, from which backward starts."""

    def __init__(self, edge: GradientEdge) -> None:
        self.edge = edge  # not the tensor: its memory is not needed for long
        self.gradient: torch.Tensor | None = None

    def add(self, gradient: torch.Tensor) -> None:
        """A use of the tensor has its gradient."""
        self.gradient = gradient if self.gradient is None else self.gradient + gradient


class _Twin(torch.autograd.Function):
    """The end of a part's graph. No leaf: the graph would keep a leaf's memory."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, root: Root, values: list[torch.Tensor]) -> torch.Tensor:
        """Args: anything that requires a gradient; who gets it; the tensor, in a list so that it is no input."""
        del anchor
        ctx.root = root
        return values[0].detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradient of one use."""
        ctx.root.add(gradients[0])
        return None, None, None


_TWIN_NODE: type = _Twin._backward_cls


class CutGraph:
    """The graph of one forward, which runs in one thread."""

    def __init__(self) -> None:
        self._starts = [0]
        self._roots: list[dict[tuple[int, int], Root]] = [{}]
        self._anchor = torch.zeros((), requires_grad=True)

    @property
    def num_parts(self) -> int:
        """So far."""
        return len(self._starts)

    def border(self) -> None:
        """What is made from now on belongs to the next part. Nodes of a graph are numbered in each thread."""
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._roots.append({})

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or its twin if an earlier part has made it."""
        node = tensor.grad_fn
        if node is None or isinstance(node, _TWIN_NODE) or not torch.is_grad_enabled():
            return tensor
        part = bisect_right(self._starts, node._sequence_nr()) - 1
        if part == len(self._starts) - 1:
            return tensor
        edge = get_gradient_edge(tensor)
        root = self._roots[part].setdefault((id(edge.node), edge.output_nr), Root(edge))
        twin: torch.Tensor = _Twin.apply(self._anchor, root, [tensor])
        return twin

    def backward(self, part: int) -> bool:
        """From what later parts have used of this one to what it has used of earlier ones; False if that is nothing.

        Raises:
            UserError: the graph could not be cut.
        """
        if part >= self.num_parts:
            return False
        roots = [root for root in self._roots[part].values() if root.gradient is not None]
        self._roots[part] = {}
        if roots:
            run_backward([root.edge for root in roots], [root.gradient for root in roots])
        return bool(roots)


def run_backward(ends: Any, gradients: Any = None) -> None:
    """``torch.autograd.backward``.

    Raises:
        UserError: a part of the graph had been gone through before: it could not be cut.
    """
    try:
        torch.autograd.backward(ends, gradients)
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise UserError(
            "train.accumulation_order: this model's layers use one another's results in a way that cannot be followed; "
            + _REMEDY
        ) from error


class Cutting(TorchFunctionMode):
    """Cuts what torch functions are given, in the thread that enters it.

    Args:
        graph: of the forward that runs.
    """

    def __init__(self, graph: CutGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a function with twins in the place of tensors of earlier parts."""
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        replaced = tuple(map(self._cut, args))
        is_cut = bool(args) and replaced[0] is not args[0]
        if is_cut and (_writes(name) or kwargs.get("inplace")):
            raise UserError(
                f"train.accumulation_order: {name} changes a result of an earlier layer in place, which cannot be "
                f"followed; {_REMEDY}"
            )
        return func(*replaced, **{key: self._cut(value) for key, value in kwargs.items()})

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is watched inside."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def _cut(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._graph.cut(value) if not isinstance(value, torch.nn.Parameter) else value
        if type(value) in (list, tuple):
            replaced = [self._cut(item) for item in value]
            same = all(mine is theirs for mine, theirs in zip(replaced, value, strict=True))
            return value if same else type(value)(replaced)
        return value


def _writes(name: str) -> bool:
    """Whether a function changes its first argument for all who hold it; ``+=`` is ``add_`` here."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def run_block(graph: CutGraph, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Runs a block as a part of its own.

    Raises:
        UserError: it changed what it was given in place, and the caller would not know of it.
    """
    graph.border()
    args, kwargs = pytree.tree_map_only(torch.Tensor, graph.cut, (args, kwargs))
    given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.requires_grad]
    versions = [t._version for t in given]
    output = call(*args, **kwargs)
    if versions != [t._version for t in given]:
        raise UserError(f"train.accumulation_order: a layer changes its inputs in place; {_REMEDY}")
    graph.border()
    return output
