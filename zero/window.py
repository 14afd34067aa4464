"""``engine.run_window``: a window of micro-batches, layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils import _pytree as pytree

from gemini.device import Device
from gemini.sums import GradientSums
from gemini.trace import window_shape
from zero.errors import UserError
from zero.layerwise import Window
from zero.precision import require_loss
from zero.rerun import StartingPoint

if TYPE_CHECKING:
    from zero.engine import Engine

Batch = dict[str, Any]
LossOf = Callable[[Any, Batch], torch.Tensor]
"""A loss from what the model returned and the micro-batch."""


def output_loss(output: Any, batch: Batch) -> torch.Tensor:
    """The loss that a Hugging Face model computes."""
    del batch
    loss: torch.Tensor = output.loss
    return loss


class WindowVerbs:
    """What an engine can do with a whole window."""

    def run_window(
        self, batches: Sequence[Batch], weights: Sequence[float] | None = None, loss: LossOf = output_loss
    ) -> list[torch.Tensor]:
        """Forward and backward of a window's micro-batches, layer by layer; the next ``step()`` acts.

        Each unit is fetched once for all of them, and the sum of their gradients leaves once. Losses and gradients are
        those of one micro-batch after the other; random numbers (dropout) are drawn in another order.

        Args:
            batches: keyword arguments of the model; at most ``gradient_accumulation_steps``.
            weights: of the losses; by default each is divided by ``gradient_accumulation_steps``, as ``backward()`` does.
            loss: from what the model returned and the micro-batch.

        Returns:
            The losses as the model gave them, scalars on the device.

        Raises:
            UserError: too many micro-batches, a model whose layers cannot be taken apart, an engine that was closed, or
                one inside of ``gathered_parameters()``.
            gemini.plan.DoesNotFitError: no placement lets these micro-batches run together on the device.
        """
        return _run_window(cast("Engine", self), batches, weights, loss)


def _run_window(
    engine: Engine, batches: Sequence[Batch], weights: Sequence[float] | None, loss: LossOf
) -> list[torch.Tensor]:
    _require_window(engine, batches, weights)
    if len(batches) == 1:
        return [_run_alone(engine, batches[0], None if weights is None else weights[0], loss)]
    engine._last_batch = ((), dict(batches[0]), len(batches))
    engine._doing("forward and backward")
    fresh = not any(tensor.has_gradient for tensor in engine._tensors.values())
    start = StartingPoint(engine._buffers, engine.device.torch_device) if engine._planner.may_offload else None
    try:
        return _attempt(engine, batches, weights, loss)
    except torch.OutOfMemoryError as error:
        if start is None or not fresh or not engine._agreement.is_alone:
            raise engine._backward_refusal(error) from error
        if not engine._planner.offload_everything():
            raise engine._refusal(error) from error
    # As in engine(...): everything is off the device, and nothing of the window has counted yet: once more.
    start.restore()
    _forget(engine)
    try:
        return _attempt(engine, batches, weights, loss)
    except torch.OutOfMemoryError as error:
        _forget(engine)
        raise engine._refusal(error) from error


def _forget(engine: Engine) -> None:
    """The gradients of the window, of which some have reached their owners."""
    engine._micro_step = 0
    engine.zero_grad()


def _require_window(engine: Engine, batches: Sequence[Batch], weights: Sequence[float] | None) -> None:
    engine._require_placed()
    most = engine.config.train.gradient_accumulation_steps
    if not 1 <= len(batches) <= most:
        raise UserError(
            f"engine.run_window(): {len(batches)} micro-batches were given; a window has 1 to "
            f"train.gradient_accumulation_steps = {most} of them"
        )
    if weights is not None and len(weights) != len(batches):
        raise UserError(f"engine.run_window(): {len(weights)} weights were given for {len(batches)} micro-batches")
    if not torch.is_grad_enabled():
        raise UserError("engine.run_window() computes gradients: call it outside of torch.no_grad()")


def _run_alone(engine: Engine, batch: Batch, weight: float | None, loss: LossOf) -> torch.Tensor:
    value = loss(engine(**batch), batch)
    require_loss(value)
    engine.backward(value if weight is None else value * weight, scale_by_accumulation=weight is None)
    engine.end_of_loader()
    return value.detach()


def _attempt(
    engine: Engine, batches: Sequence[Batch], weights: Sequence[float] | None, loss: LossOf
) -> list[torch.Tensor]:
    moved = [_moved(batch, engine.device) for batch in batches]
    losses: dict[int, torch.Tensor] = {}

    def forward(index: int) -> torch.Tensor:
        value = loss(engine.module(**engine._hooks.arguments(moved[index])), moved[index])
        require_loss(value)
        losses[index] = value.detach()
        return _scaled(engine, value, None if weights is None else weights[index])

    forwards = [functools.partial(forward, index) for index in range(len(batches))]
    sums = GradientSums(engine.device, most_sum_bytes(engine))
    shape = window_shape([_largest_shape(batch) for batch in moved])
    window = Window(engine._units, engine._hooks, engine.manager, forwards)
    window.run(shape, any(batch.get("labels") is not None for batch in moved), sums)
    engine.end_of_loader()  # the window is complete, however many micro-batches it has
    return [losses[index] for index in range(len(batches))]


def _scaled(engine: Engine, loss: torch.Tensor, weight: float | None) -> torch.Tensor:
    """As :meth:`zero.engine.Engine.backward` has it."""
    loss = loss / engine._accumulation if weight is None else loss * weight
    if engine.scaler.scale != 1.0:
        loss = loss * engine.scaler.scale
        engine._applied_scale = engine.scaler.scale
    return loss


def _moved(batch: Batch, device: Device) -> Batch:
    moved: Batch = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device.torch_device), dict(batch))
    return moved


def _largest_shape(batch: Batch) -> tuple[int, ...]:
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    return tuple(max(tensors, key=torch.Tensor.numel).shape) if tensors else ()


def most_sum_bytes(engine: Engine) -> int:
    """What the sums of one chunk's gradients may take on the device."""
    capacity_bytes = engine.config.device.memory
    return 1 << 62 if capacity_bytes is None else capacity_bytes // 4
