"""What the native AdamW is called with: the C structures, and the checks that make a call safe."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

DTYPE_NONE, DTYPE_FP32, DTYPE_BF16, DTYPE_FP16 = range(4)  # the enum of adamw.c
DTYPE_NUMBERS = {torch.float32: DTYPE_FP32, torch.bfloat16: DTYPE_BF16, torch.float16: DTYPE_FP16}
OUT_DTYPES = (torch.bfloat16, torch.float16)


class Scalars(ctypes.Structure):
    """``struct adamw_scalars`` of adamw.c."""

    _fields_ = [
        ("grad_scale", ctypes.c_float),
        ("decay", ctypes.c_float),
        ("l2", ctypes.c_float),
        ("mean_weight", ctypes.c_float),
        ("beta2", ctypes.c_float),
        ("square_weight", ctypes.c_float),
        ("bias2_root", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("neg_step", ctypes.c_float),
    ]


class Call(ctypes.Structure):
    """``struct adamw_call`` of adamw.c."""

    _fields_ = [
        ("master", ctypes.c_void_p),
        ("exp_avg", ctypes.c_void_p),
        ("exp_avg_sq", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("grad_dtype", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("scalars", Scalars),
    ]


def make_scalars(
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
    decoupled: bool,
    maximize: bool,
) -> Scalars:
    """Return the scalars of one step; the arguments are those of ``NativeKernel.adamw``.

    Raises:
        ValueError: A number is out of its range.
    """
    beta1, beta2 = betas
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        raise ValueError(f"betas must each lie in [0, 1), not {betas}")
    if step < 1:
        raise ValueError(f"step counts from 1, not {step}")
    # Double precision, rounded to fp32 once, when the struct is filled: what torch's scalar operations do.
    return Scalars(
        grad_scale=-grad_scale if maximize else grad_scale,
        decay=1 - lr * weight_decay if decoupled else 1.0,
        l2=0.0 if decoupled else weight_decay,
        mean_weight=1 - beta1,
        beta2=beta2,
        square_weight=1 - beta2,
        bias2_root=(1 - beta2**step) ** 0.5,
        eps=eps,
        neg_step=-(lr / (1 - beta1**step)),
    )


def check_tensors(states: dict[str, Tensor], grad: Tensor, out: Tensor | None) -> int:
    """Return the numel common to all.

    Args:
        states: The fp32 tensors, by name.
        grad: Gradient.
        out: Low-precision weights, if any.

    Raises:
        ValueError: A tensor has the wrong place, shape or dtype, or overlaps another.
    """
    tensors = {**states, "grad": grad} if out is None else {**states, "grad": grad, "out": out}
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu" or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous one-dimensional CPU tensor, not shape {tuple(tensor.shape)}, "
                f"stride {tensor.stride()} on {tensor.device}"
            )
    numels = {name: tensor.numel() for name, tensor in tensors.items()}
    if len(set(numels.values())) != 1:
        raise ValueError(f"all tensors must have the same numel, not {numels}")
    for name, tensor in states.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be torch.float32, not {tensor.dtype}")
    if grad.dtype not in DTYPE_NUMBERS:
        raise ValueError(f"grad must be torch.float32, torch.bfloat16 or torch.float16, not {grad.dtype}")
    if out is not None and out.dtype not in OUT_DTYPES:
        raise ValueError(f"out must be torch.bfloat16 or torch.float16, or None (fp32: master is it), not {out.dtype}")
    _check_overlap(tensors)
    return grad.numel()


def _check_overlap(tensors: dict[str, Tensor]) -> None:
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), name) for name, t in tensors.items())
    for (begin, end, name), (next_begin, next_end, next_name) in zip(spans, spans[1:], strict=False):
        in_place = (begin, end) == (next_begin, next_end) and {name, next_name} == {"grad", "out"}
        if next_begin < end and not in_place:
            raise ValueError(f"{name} and {next_name} overlap in memory")
