"""How AdamW's master and moments lie in host memory (``precision.optimizer_state``), and the ways there and back.

``fp32`` keeps all three in fp32 beside the 16-bit weights. In the other formats, for bf16 training, the weights are the
upper part of the master, and a buffer holds what they leave of it:

- ``split`` is exact. The weights are the master rounded to nearest even, as everywhere; the difference to the master's
  bits lies in -0x8000 to 0x8000, one number too many for 16 bits. 0x8000 is stored as -0x8000, and the sign bit of
  ``exp_avg_sq``, which is never negative, tells one from the other. Only the payload of a NaN is lost.
- ``bf16`` rounds the moments to bf16, at random: to nearest, ``exp_avg_sq`` would stand still, since one step with
  beta2 = 0.999 moves it by less than half of bf16's spacing.
- ``8bit`` keeps 24 bits of the master and moments in codes of 8 bits, small floats with 4 bits of mantissa times a power
  of two that :data:`BLOCK_NUMEL` elements share; all are rounded at random.

In the last two, weights halfway between two numbers go away from zero, as 16 and 8 bits then suffice. Random numbers
depend on seed, step and the element's index alone (:class:`Noise`). ``kernel_formats.h`` does the same in C, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gemini.codec import Part
from gemini.segment import MASTER, MASTER_LOW
from zero.errors import ConfigError

MEAN, SQUARE = "exp_avg", "exp_avg_sq"
MEAN_SCALE, SQUARE_SCALE = "exp_avg_scale", "exp_avg_sq_scale"
BLOCK_NUMEL = 256
"""Elements that share a scale in the 8-bit format: a buffer's first, next and so on 256."""

_ABS, _INFINITY, _NAN = 0x7FFFFFFF, 0x7F800000, 0x7FC00000
_MEAN_BASE, _SQUARE_BASE = 119 << 23, 111 << 23
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Noise:
    """Where the random bits of stochastic rounding come from.

    Attributes:
        seed: Of the run.
        step: Optimizer step; each has numbers of its own.
        index: Of the tensors' first element among all elements of the model, so that neither the cut into chunks nor
            the number of threads or processes changes a bit.
    """

    seed: int = 0
    step: int = 0
    index: int = 0

    def key(self) -> tuple[int, int]:
        """Two words of 32 bits, by two rounds of splitmix64."""
        state = _splitmix(_splitmix(self.seed & (2**64 - 1)) ^ (self.step & (2**64 - 1)))
        return state & _WORD, state >> 32

    def words(self, numel: int, device: torch.device | None = None) -> Tensor:
        """Return 32 random bits for each element, in int64, made on ``device``."""
        key0, key1 = self.key()
        index = torch.arange(self.index, self.index + numel, dtype=torch.int64, device=device or "cpu")
        x = (index & _WORD) ^ _mix(((index >> 32) * 0x9E3779B9 + key0) & _WORD)
        x = ((x ^ x >> 16) * 0x7FEB352D + key1) & _WORD
        x = (x ^ x >> 15) * 0x846CA68B & _WORD
        return x ^ x >> 16


def _splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def _mix(x: Tensor) -> Tensor:
    x = (x ^ x >> 16) * 0x7FEB352D & _WORD
    x = (x ^ x >> 15) * 0x846CA68B & _WORD
    return x ^ x >> 16


class StateFormat:
    """A format of master and moments.

    Attributes:
        name: As in the config.
        number: As the kernel counts formats.
        is_exact: Whether results equal those with fp32 states to the bit.
        buffers: The arrays beside the 16-bit weights.
        start_multiple: Buffers may begin at multiples of so many elements; they may end anywhere.
    """

    name: str = "fp32"
    number: int = 0
    is_exact: bool = True
    buffers: tuple[Part, ...] = (
        Part(MASTER, torch.float32),
        Part(MEAN, torch.float32),
        Part(SQUARE, torch.float32),
    )
    start_multiple: int = 1

    def state_bytes(self, numel: int) -> int:
        """Bytes of the buffers for so many elements, without weights and gradient."""
        return sum(buffer.numel(numel) * buffer.dtype.itemsize for buffer in self.buffers)

    def new_buffers(self, numel: int) -> dict[str, Tensor]:
        """Return buffers of zeros: those of new moments, and of a master that equals the weights."""
        return {b.key: torch.zeros(b.numel(numel), dtype=b.dtype) for b in self.buffers}

    def decode(self, buffers: Mapping[str, Tensor], values: Tensor) -> dict[str, Tensor]:
        """Return master, exp_avg and exp_avg_sq in fp32; new tensors, but those of the fp32 format itself.

        Args:
            buffers: By key; a run of the same elements of each, beginning where :attr:`start_multiple` allows.
            values: The 16-bit weights of these elements.
        """
        return {buffer.key: buffers[buffer.key] for buffer in self.buffers}

    def encode(
        self, states: Mapping[str, Tensor], buffers: Mapping[str, Tensor], values: Tensor, noise: Noise | None = None
    ) -> None:
        """Write buffers and weights.

        Args:
            states: What :meth:`decode` returns.
            buffers: Written.
            values: The 16-bit weights, written.
            noise: Random numbers; None rounds to nearest, which leaves decoded states as they were.
        """
        for buffer in self.buffers:
            if buffers[buffer.key] is not states[buffer.key]:
                buffers[buffer.key].copy_(states[buffer.key])
        values.copy_(states[MASTER])

    def __repr__(self) -> str:
        return f"StateFormat({self.name!r})"


class SplitFormat(StateFormat):
    """Exact, 2 bytes a parameter less than fp32."""

    name = "split"
    number = 1
    buffers = (Part(MASTER_LOW, torch.int16), Part(MEAN, torch.float32), Part(SQUARE, torch.float32))

    def decode(self, buffers: Mapping[str, Tensor], values: Tensor) -> dict[str, Tensor]:
        """See :meth:`StateFormat.decode`."""
        square = buffers[SQUARE].view(torch.int32)
        master = _upper_bits(values) + buffers[MASTER_LOW] + ((square < 0).int() << 16)
        return {
            MASTER: master.view(torch.float32),
            MEAN: buffers[MEAN].clone(),
            SQUARE: (square & _ABS).view(torch.float32),
        }

    def encode(
        self, states: Mapping[str, Tensor], buffers: Mapping[str, Tensor], values: Tensor, noise: Noise | None = None
    ) -> None:
        """See :meth:`StateFormat.encode`.

        Raises:
            ValueError: an element of exp_avg_sq is negative. What comes with ``noise`` comes from an update, and is not
                looked at: on a device that would be waited for.
        """
        if noise is None and bool((states[SQUARE] < 0).any()):
            raise ValueError("exp_avg_sq has negative elements: these are not the states of Adam")
        rest = _round_to_even(states[MASTER], values)
        buffers[MASTER_LOW].copy_(torch.where(rest == 0x8000, -0x8000, rest))
        buffers[MEAN].copy_(states[MEAN])
        square = states[SQUARE].view(torch.int32) & _ABS
        buffers[SQUARE].view(torch.int32).copy_(torch.where(rest == 0x8000, square | -0x80000000, square))


class Bf16Format(StateFormat):
    """Moments in bf16, rounded at random."""

    name = "bf16"
    number = 2
    is_exact = False
    buffers = (Part(MASTER_LOW, torch.int16), Part(MEAN, torch.bfloat16), Part(SQUARE, torch.bfloat16))

    def decode(self, buffers: Mapping[str, Tensor], values: Tensor) -> dict[str, Tensor]:
        """See :meth:`StateFormat.decode`."""
        master = (_upper_bits(values) + buffers[MASTER_LOW]).view(torch.float32)
        return {MASTER: master, MEAN: buffers[MEAN].float(), SQUARE: buffers[SQUARE].float()}

    def encode(
        self, states: Mapping[str, Tensor], buffers: Mapping[str, Tensor], values: Tensor, noise: Noise | None = None
    ) -> None:
        """See :meth:`StateFormat.encode`."""
        buffers[MASTER_LOW].copy_(_round_half_up(states[MASTER], values))
        if noise is None:
            buffers[MEAN].copy_(states[MEAN])
            buffers[SQUARE].copy_(states[SQUARE])
            return
        words = noise.words(values.numel(), values.device)
        buffers[MEAN].copy_(_round_bf16_at_random(states[MEAN], words & 0xFFFF))
        buffers[SQUARE].copy_(_round_bf16_at_random(states[SQUARE], words >> 16))


class EightBitFormat(StateFormat):
    """Moments in codes of 8 bits and 24 bits of the master, rounded at random."""

    name = "8bit"
    number = 3
    is_exact = False
    buffers = (
        Part(MASTER_LOW, torch.int8),
        Part(MEAN, torch.uint8),
        Part(SQUARE, torch.uint8),
        Part(MEAN_SCALE, torch.float32, BLOCK_NUMEL),
        Part(SQUARE_SCALE, torch.float32, BLOCK_NUMEL),
    )
    start_multiple = BLOCK_NUMEL

    def decode(self, buffers: Mapping[str, Tensor], values: Tensor) -> dict[str, Tensor]:
        """See :meth:`StateFormat.decode`."""
        low = buffers[MASTER_LOW].to(torch.int32) << 8
        code, square = buffers[MEAN].to(torch.int32), buffers[SQUARE].to(torch.int32)
        magnitude = code & 0x7F
        normal = ((magnitude << 19) + _MEAN_BASE).view(torch.float32)
        mean = torch.where(magnitude < 16, magnitude * 2.0**-11, normal) * _spread(buffers[MEAN_SCALE], code.numel())
        scale = _spread(buffers[SQUARE_SCALE], code.numel())
        return {
            MASTER: (_upper_bits(values) + low).view(torch.float32),
            MEAN: torch.where(code >= 0x80, -mean, mean),
            SQUARE: ((square << 19) + _SQUARE_BASE).view(torch.float32) * scale,
        }

    def encode(
        self, states: Mapping[str, Tensor], buffers: Mapping[str, Tensor], values: Tensor, noise: Noise | None = None
    ) -> None:
        """See :meth:`StateFormat.encode`."""
        master = states[MASTER]
        numel = master.numel()
        words = None if noise is None else noise.words(numel, values.device)
        # Half of the least step rounds to nearest: exactly, but for ties, which go up.
        extra = 0x80 if words is None else words >> 24
        bits = ((master.view(torch.int32).to(torch.int64) + extra) & -0x100).to(torch.int32).view(torch.float32)
        buffers[MASTER_LOW].copy_(_round_half_up(torch.where(master.isnan(), master, bits), values) >> 8)
        for key, scale_key, shift in ((MEAN, MEAN_SCALE, 0), (SQUARE, SQUARE_SCALE, 12)):
            buffers[scale_key].copy_(_scales(states[key]))
            step = 0x40000 if words is None else (words >> shift & 0xFFF) << 7 | 0x40
            scaled = states[key].abs() * _spread(_inverses(buffers[scale_key]), numel)
            code = ((_mean_place(scaled) if key == MEAN else _square_place(scaled)) + step) >> 19
            if key == MEAN:
                code = code.clamp_(max=127) | (states[key].signbit().long() << 7)
            buffers[key].copy_(code.clamp_(max=255))


FORMATS: dict[str, StateFormat] = {
    form.name: form for form in (StateFormat(), SplitFormat(), Bf16Format(), EightBitFormat())
}
FP32 = FORMATS["fp32"]


def state_format(name: str, value_dtype: torch.dtype, optimizer_name: str = "adamw") -> StateFormat:
    """Return the format a config names.

    Args:
        name: ``precision.optimizer_state``.
        value_dtype: Of the weights in training.
        optimizer_name: ``optimizer.name``.

    Raises:
        ConfigError: There is no such format, or it cannot hold such weights or such an optimizer's states.
    """
    if name not in FORMATS:
        raise ConfigError([f"precision.optimizer_state = {name!r} is not one of {', '.join(FORMATS)}"])
    if name == FP32.name:
        return FP32
    if value_dtype != torch.bfloat16:
        dtype = {torch.float16: "fp16", torch.float32: "fp32"}.get(value_dtype, str(value_dtype))
        problem = (
            f"precision.optimizer_state = {name!r} needs precision.dtype = 'bf16', not {dtype!r}: the weights are to be "
            "the upper half of the fp32 master, which only bf16 is. Set optimizer_state to 'fp32' or dtype to 'bf16'."
        )
        raise ConfigError([problem])
    if optimizer_name not in ("adamw", "adam"):
        problem = (
            f"precision.optimizer_state = {name!r} works with optimizer.name = 'adamw' or 'adam', not "
            f"{optimizer_name!r}. Set optimizer_state to 'fp32' or choose one of these."
        )
        raise ConfigError([problem])
    return FORMATS[name]


# -- on bits ---------------------------------------------------------------------------------------------------------


def _upper_bits(values: Tensor) -> Tensor:
    return values.view(torch.int16).to(torch.int32) << 16


def _round_to_even(master: Tensor, values: Tensor) -> Tensor:
    """Write the weights; return what is missing, in units of the master's last bit (0 for NaN): at most +-0x8000."""
    values.copy_(master)
    return _missing(master, values)


def _round_half_up(master: Tensor, values: Tensor) -> Tensor:
    """The same, but for ties, which go away from zero: from -0x8000 to 0x7fff."""
    values.view(torch.int16).copy_(master.view(torch.int32) + 0x8000 >> 16)
    return _missing(master, values)


def _missing(master: Tensor, values: Tensor) -> Tensor:
    values.view(torch.int16).masked_fill_(master.isnan(), _NAN >> 16)
    return (master.view(torch.int32) - _upper_bits(values)).masked_fill_(master.isnan(), 0)


def _round_bf16_at_random(x: Tensor, extra: Tensor) -> Tensor:
    bits = x.view(torch.int32).to(torch.int64) + extra & -0x10000
    bits = torch.where(x.isnan(), _NAN, bits)
    return bits.to(torch.int32).view(torch.float32).to(torch.bfloat16)


def _spread(per_block: Tensor, numel: int) -> Tensor:
    return per_block.repeat_interleave(BLOCK_NUMEL)[:numel]


def _scales(x: Tensor) -> Tensor:
    """Powers of two that bring each block to 31/32 or less, the greatest number a code has."""
    bits = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK_NUMEL)).view(torch.int32) & _ABS
    most = bits.view(-1, BLOCK_NUMEL).amax(1) if x.numel() else bits
    scale = ((most.to(torch.int64) + 0x7FFFF) & _INFINITY) + (1 << 23)
    scale = torch.where(most >= 0x7E000000, _NAN, scale)  # from 2^125 on the scale has no inverse
    return torch.where(most < 27 << 23, 0, scale).to(torch.int32).view(torch.float32)


def _inverses(scale: Tensor) -> Tensor:
    bits = (254 << 23) - scale.view(torch.int32)
    return torch.where((scale == 0) | scale.isnan(), 0, bits).view(torch.float32)


def _mean_place(x: Tensor) -> Tensor:
    """How many steps of 2^-19 of a code's spacing lie below."""
    return torch.where(x < 2.0**-7, (x * 2.0**30).long(), x.view(torch.int32).long() - _MEAN_BASE)


def _square_place(x: Tensor) -> Tensor:
    return torch.where(x < 2.0**-16, 0, x.view(torch.int32).long() - _SQUARE_BASE)
