"""A first step with a fresh kernel, compared with the formula in plain Python: a miscompiled one must not train.

No tensors, so that it works whatever default device or dispatch mode is active at the first use.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

from zero.optim.native_args import DTYPE_BF16, RULE_ADAM, Call
from zero.optim.native_rules import AdamRule

_NUMEL = 83  # full blocks, a full vector and a rest, for every instruction set
_LR, _BETA1, _BETA2, _EPS, _DECAY, _STEP = 0.01, 0.9, 0.99, 1e-8, 0.1, 2
_TOLERANCE = 1e-6
_TOLERANCE_BF16 = 2.0**-8

_Floats = ctypes.c_float * _NUMEL
_Halves = ctypes.c_uint16 * _NUMEL


def computes_correctly(step: Callable[[Call, int], None]) -> bool:
    """Return whether a kernel's first step is right.

    Args:
        step: Runs the kernel on a call of so many elements.
    """
    ramp = [(i - 41) / 64 for i in range(_NUMEL)]  # exact in bf16
    master, exp_avg = _Floats(*(3.0 - x for x in ramp)), _Floats(*(x / 128 for x in ramp))
    exp_avg_sq, grad, out = _Floats(*(x * x + 0.125 for x in ramp)), _Halves(*map(_bf16_bits, ramp)), _Halves()
    expected = [_formula(3.0 - x, x / 128, x * x + 0.125, x) for x in ramp]
    rule = AdamRule(_LR, (_BETA1, _BETA2), _EPS, _DECAY, _STEP)
    call = Call(rule=RULE_ADAM, grad_dtype=DTYPE_BF16, out_dtype=DTYPE_BF16, numel=_NUMEL, scalars=rule.scalars())
    call.master, call.first, call.second = (ctypes.addressof(array) for array in (master, exp_avg, exp_avg_sq))
    call.grad, call.out = ctypes.addressof(grad), ctypes.addressof(out)
    step(call, _NUMEL)
    computed = zip(master, exp_avg, exp_avg_sq, out, strict=True)
    return all(_agree(got, want) for got, want in zip(computed, expected, strict=True))


def _formula(param: float, mean: float, square: float, grad: float) -> tuple[float, float, float]:
    mean += (1 - _BETA1) * (grad - mean)
    square = _BETA2 * square + (1 - _BETA2) * grad * grad
    denominator = (square / (1 - _BETA2**_STEP)) ** 0.5 + _EPS
    return param * (1 - _LR * _DECAY) - _LR / (1 - _BETA1**_STEP) * mean / denominator, mean, square


def _agree(got: tuple[float, float, float, int], want: tuple[float, float, float]) -> bool:
    close = all(abs(a - b) <= _TOLERANCE * max(abs(b), 1e-2) for a, b in zip(got, want, strict=False))
    return close and abs(_bf16_value(got[3]) - want[0]) <= _TOLERANCE_BF16 * abs(want[0])


def _bf16_bits(value: float) -> int:
    return int.from_bytes(struct.pack(">f", value)[:2], "big")


def _bf16_value(bits: int) -> float:
    return float(struct.unpack(">f", bits.to_bytes(2, "big") + b"\0\0")[0])
