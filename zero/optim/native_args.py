"""What the native kernel is called with: the C structures, and the checks that make a call safe."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

# The enums of kernel.h.
DTYPE_NONE, DTYPE_FP32, DTYPE_BF16, DTYPE_FP16 = range(4)
RULE_ADAM, RULE_SGD, RULE_MOMENTUM, RULE_LION = range(4)
DTYPE_NUMBERS = {torch.float32: DTYPE_FP32, torch.bfloat16: DTYPE_BF16, torch.float16: DTYPE_FP16}
OUT_DTYPES = (torch.bfloat16, torch.float16)


class Scalars(ctypes.Structure):
    """``struct scalars`` of kernel.h."""

    _fields_ = [
        ("grad_scale", ctypes.c_float),
        ("decay", ctypes.c_float),
        ("l2", ctypes.c_float),
        ("mean_weight", ctypes.c_float),
        ("decay2", ctypes.c_float),
        ("square_weight", ctypes.c_float),
        ("bias2_root", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("neg_step", ctypes.c_float),
        ("first", ctypes.c_int32),
        ("nesterov", ctypes.c_int32),
    ]


class Call(ctypes.Structure):
    """``struct call`` of kernel.h."""

    _fields_ = [
        ("master", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("second", ctypes.c_void_p),
        ("first_scale", ctypes.c_void_p),
        ("second_scale", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rule", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("grad_dtype", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("noise_key", ctypes.c_uint32 * 2),
        ("noise_index", ctypes.c_uint64),
        ("numel", ctypes.c_uint64),
        ("scalars", Scalars),
    ]


def check_tensors(
    states: Mapping[str, Tensor], kinds: Mapping[str, tuple[torch.dtype, int]], grad: Tensor, out: Tensor | None
) -> int:
    """Return the numel common to all.

    Args:
        states: The states by name.
        kinds: Dtype of each, and how many elements share an entry of it.
        grad: Gradient.
        out: Low-precision weights, if any.

    Raises:
        ValueError: A tensor is missing, has the wrong place, shape or dtype, or overlaps another.
    """
    if missing := kinds.keys() - states.keys():
        raise ValueError(f"states lack {', '.join(sorted(missing))}")
    tensors = {**{name: states[name] for name in kinds}, "grad": grad}
    if out is not None:
        tensors["out"] = out
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu" or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous one-dimensional CPU tensor, not shape {tuple(tensor.shape)}, "
                f"stride {tensor.stride()} on {tensor.device}"
            )
    numels = {name: tensor.numel() for name, tensor in tensors.items()}
    wanted = {name: -(-grad.numel() // kinds[name][1]) if name in kinds else grad.numel() for name in tensors}
    if numels != wanted:
        raise ValueError(f"all tensors must have the same numel, and scales one for each block, not {numels}")
    for name, (dtype, _) in kinds.items():
        if states[name].dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, not {states[name].dtype}")
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
