"""Liger's Triton kernels inside of a model's blocks, for those who have a GPU and the ``liger`` extra."""

from __future__ import annotations

import importlib
import inspect
import logging
from typing import Any

from torch import nn

from gemini.device import Device
from zero.errors import UserError

logger = logging.getLogger("zero")

_TABLE = "liger_kernel.transformers.monkey_patch"
# The loss is ours: a chunked one knows how logits and head are managed, and a fused one would keep the head to itself.
_OURS = ("cross_entropy", "fused_linear_cross_entropy")


def use_liger(model: nn.Module, device: Device) -> None:
    """Norms, rotary positions and gated layers of one model are computed by Liger from now on.

    Results are those of plain PyTorch up to rounding. Parameters stay what they are.

    Args:
        model: of transformers, or a PEFT model around one.
        device: where the model will compute.

    Raises:
        UserError: no accelerator to run the kernels, the extra is not installed, or Liger does not know the model.
    """
    kind = device.torch_device.type
    if kind in ("cpu", "meta"):
        raise UserError(
            f"train.liger = true: Liger's kernels are made for GPUs, and this run computes on {kind}; set train.liger = "
            "false"
        )
    apply = _known(model, _table())
    given = inspect.signature(apply).parameters
    apply(model=_inner(model), **{name: False for name in _OURS if name in given})


def require_kernels(model: nn.Module) -> None:
    """Refuses a model that Liger does not know, as :func:`use_liger` will, wherever it is going to compute.

    For a plan: without values, and on a machine that may lack the library, so that nobody can tell.

    Raises:
        UserError: Liger does not know the model.
    """
    try:
        table = _table()
    except UserError as error:
        logger.info("whether Liger has kernels for this model shows where it is installed: %s", error)
        return
    _known(model, table)


def _inner(model: nn.Module) -> Any:
    get_base_model = getattr(model, "get_base_model", None)  # PEFT's name
    return model if get_base_model is None else get_base_model()


def _table() -> dict[str, Any]:
    """What Liger applies to each family of models."""
    try:
        table: dict[str, Any] = importlib.import_module(_TABLE).MODEL_TYPE_TO_APPLY_LIGER_FN
    except (ImportError, AttributeError) as error:
        raise UserError(
            f'train.liger = true: {error}; install the extra with pip install -c constraints.txt -e ".[liger]" in the '
            "folder of this project, or set train.liger = false"
        ) from error
    return table


def _known(model: nn.Module, table: dict[str, Any]) -> Any:
    model_type = getattr(getattr(_inner(model), "config", None), "model_type", None)
    if model_type not in table:
        raise UserError(
            f"train.liger = true: Liger has no kernels for {model_type or type(model).__name__}, only for "
            f"{', '.join(sorted(table))}; set train.liger = false"
        )
    return table[model_type]
