"""A state format at work in one chunk: what :mod:`gemini` asks of it, and whether a run can have it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from gemini.codec import Codec
from gemini.profile import UPDATE_BYTES_PER_NUMEL
from gemini.segment import MASTER
from gemini.tracker import StorageTracker
from gemini.work import Work
from zero.config.schema import Config
from zero.errors import UserError
from zero.optim.formats import FORMATS, FP32, MEAN, SQUARE, Noise, StateFormat

KINDS = (torch.optim.AdamW, torch.optim.Adam)
"""Optimizers whose states every format holds."""
SPEEDS = {"split": 1.0, "bf16": 0.7, "8bit": 0.45}
"""Rates of the native kernel on one and two cores, as multiples of that with fp32 states (``docs/measurements.md``)."""
_ALIGN_BYTES = 64
"""Of torch's own allocations on the host; those on an accelerator begin at multiples of it."""
_TRIAL_NUMEL = 1024


class FormatCodec(Codec):
    """Of one chunk.

    Args:
        form: the format.
        seed: of the run.
        index: of the chunk's first element among all elements of the model.
    """

    states = (MASTER, MEAN, SQUARE)

    def __init__(self, form: StateFormat, seed: int, index: int) -> None:
        self.form = form
        self.speed = SPEEDS.get(form.name, 1.0)
        self.device_cost = device_cost(form)
        self.parts = form.buffers
        self._seed = seed
        self._index = index

    def noise(self, first: int, step: int) -> Noise:
        """Random numbers of an update: of the chunk's elements from ``first`` on."""
        return Noise(self._seed, step, self._index + first)

    def leading(self, companions: Mapping[str, torch.Tensor], numel: int) -> dict[str, torch.Tensor]:
        """The first elements of a segment's companions.

        Where a parameter ends inside a block, room follows that nobody owns: it is to have no say in the block's scale.
        """
        ends = {part.key: part.numel(numel) for part in self.parts}
        return {key: held[: ends.get(key, numel)] for key, held in companions.items()}

    def decode(self, parts: Mapping[str, torch.Tensor], values: torch.Tensor) -> dict[str, torch.Tensor]:
        """See :meth:`gemini.codec.Codec.decode`."""
        return self.form.decode(parts, values)

    def encode(
        self,
        states: Mapping[str, torch.Tensor],
        parts: Mapping[str, torch.Tensor],
        values: torch.Tensor,
        first: int,
        step: int | None,
    ) -> None:
        """See :meth:`gemini.codec.Codec.encode`."""
        if not isinstance(values, FakeTensor):  # in a dry run there is nothing to write
            self.form.encode(states, parts, values, None if step is None else self.noise(first, step))


def format_of(config: Config, optimizer: torch.optim.Optimizer | None) -> StateFormat:
    """The format of a run's master and moments.

    Raises:
        UserError: the config asks for one that cannot hold this optimizer's states.
    """
    form = FORMATS[config.precision.optimizer_state]
    if form is FP32 or optimizer is None:
        return FP32
    if type(optimizer) not in KINDS or any(group.get("amsgrad") for group in optimizer.param_groups):
        what = "with amsgrad" if type(optimizer) in KINDS else type(optimizer).__name__
        raise UserError(
            f'precision.optimizer_state = "{form.name}" holds the states of AdamW and Adam without amsgrad; the '
            f'optimizer is {what}. Set optimizer_state to "fp32", or take one of these'
        )
    return form


def codec_of(form: StateFormat, dtype: torch.dtype, trainable: bool, seed: int, index: int) -> FormatCodec | None:
    """The codec of a chunk; None where its states are as they are. Weights that are not bf16 need every bit of theirs."""
    coded = form is not FP32 and trainable and dtype == torch.bfloat16
    return FormatCodec(form, seed, index) if coded else None


def align_numel(form: StateFormat, dtype: torch.dtype, trainable: bool) -> int:
    """Where parameters begin.

    As torch aligns tensors of their own: products take other ways through a matrix that begins elsewhere, and round
    otherwise. And so that the cut into chunks and shards changes no block of the format.
    """
    multiple = form.start_multiple if trainable and dtype == torch.bfloat16 else 1
    return math.lcm(multiple, max(1, _ALIGN_BYTES // dtype.itemsize))


def coding_bytes_per_numel(form: StateFormat) -> int:
    """Bytes per element that an update in pieces takes at its highest to decode and encode; learnt from a trial."""
    return _trial(form)[0]


def device_cost(form: StateFormat) -> float:
    """See :attr:`gemini.codec.Codec.device_cost`: by what the operators of decoding and encoding read and write."""
    return 1.0 + _trial(form)[1] / UPDATE_BYTES_PER_NUMEL


@functools.cache
def _trial(form: StateFormat) -> tuple[int, float]:
    """Of decoding and encoding: bytes per element at the highest, and bytes per element read and written."""
    if form is FP32:
        return 0, 0.0
    with _disable_current_modes(), torch.no_grad():
        buffers, values = form.new_buffers(_TRIAL_NUMEL), torch.zeros(_TRIAL_NUMEL, dtype=torch.bfloat16)
        tracker, work = StorageTracker(lambda _: None), Work()
        tracker.on_work = work.add
        for buffer in (*buffers.values(), values):
            tracker.exempt(buffer)
        with tracker:
            tracker.reset_peak()
            before_bytes = tracker.live_bytes
            states = form.decode(buffers, values)
            form.encode(states, buffers, values, Noise())
        highest_bytes = -(-(tracker.peak_bytes - before_bytes) // _TRIAL_NUMEL)
        return highest_bytes, work.traffic_bytes / _TRIAL_NUMEL
