"""A built kernel: its calls, checked.

Threads: the kernel has threads of its own in each call, at most ``num_threads`` with the caller's, and lets go of Python's
lock meanwhile. They take small shares as they come, so one on a busy core holds up no other. In GNU OpenMP every Python
thread that asks for more than one has a team of its own, which ends with the thread: so many workers with so many threads
each multiply, and a budget is to be divided by the caller.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemini.segment import MASTER
from zero.optim.formats import FP32, MEAN, MEAN_SCALE, SQUARE, SQUARE_SCALE, Noise, StateFormat
from zero.optim.native_args import DTYPE_NONE, DTYPE_NUMBERS, Call, check_tensors
from zero.optim.native_rules import AdamRule, Rule

ISA_NUMBERS = {"avx512": 2, "avx2": 1, "neon": 3, "generic": 0}
"""How the kernel counts instruction sets, the best first."""


class NativeKernel:
    """A built and loaded kernel for one instruction set.

    Attributes:
        isa: ``"avx512"``, ``"avx2"``, ``"neon"`` or ``"generic"``.
        path: The shared object.
        uses_openmp: Whether threads come from OpenMP (torch's own pool of it, where torch uses GNU OpenMP) or are
            started anew in each call.
    """

    isa: str
    path: Path
    uses_openmp: bool

    def __init__(self, path: Path, isa: str | None = None) -> None:
        """Load ``path``.

        Args:
            path: A shared object of :func:`zero.optim.build.build`.
            isa: Instruction set to use; None takes the best this machine has.

        Raises:
            OSError: The file cannot be loaded.
            AttributeError: It is not our library.
            ValueError: This machine lacks the instruction set, or there is no such one.
        """
        library = ctypes.CDLL(str(path))
        self._step: Any = library.zero_update
        self._step.argtypes = [ctypes.POINTER(Call), ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
        self._step.restype = None
        self.path = path
        self._process_id = os.getpid()
        self.uses_openmp = bool(library.zero_uses_openmp())
        supported = [name for name, number in ISA_NUMBERS.items() if library.zero_supports_isa(number)]
        self.isa = isa or supported[0]
        if self.isa not in supported:
            raise ValueError(
                f"instruction set {self.isa!r} cannot be used here; this machine has {', '.join(supported)}"
            )

    def adamw(
        self,
        master: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        grad: Tensor,
        out: Tensor | None,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        step: int,
        grad_scale: float = 1.0,
        decoupled: bool = True,
        maximize: bool = False,
        num_threads: int | None = None,
    ) -> None:
        """Make one step as ``torch.optim.AdamW`` (or ``Adam``) does, with fp32 states: :meth:`step` in other words.

        Args:
            master: fp32 weights, updated.
            exp_avg: fp32 first moment, updated.
            exp_avg_sq: fp32 second moment, updated.
            grad: fp32, bf16 or fp16 gradient, read.
            out: bf16 or fp16 copy of the new weights, rounded to nearest even; None where ``master`` is all one needs.
            lr: See :class:`zero.optim.native_rules.AdamRule`, as for what follows.
            betas: See there.
            eps: See there.
            weight_decay: See there.
            step: See there.
            grad_scale: See there.
            decoupled: See there.
            maximize: See there.
            num_threads: See :meth:`step`.

        Raises:
            ValueError: A tensor or a number is not as described.
        """
        rule = AdamRule(lr, betas, eps, weight_decay, step, grad_scale, decoupled, maximize)
        states = {MASTER: master, MEAN: exp_avg, SQUARE: exp_avg_sq}
        self.step(rule, states, grad, out, num_threads=num_threads)

    def step(
        self,
        rule: Rule,
        states: Mapping[str, Tensor],
        grad: Tensor,
        out: Tensor | None,
        *,
        form: StateFormat = FP32,
        noise: Noise | None = None,
        start: int = 0,
        stop: int | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Make one optimizer step on elements ``[start, stop)``, in place.

        All tensors are contiguous, one-dimensional, on the CPU and of the same numel (0 is fine), but that of scales;
        none may overlap another, but for ``out``, which with fp32 states may be ``grad`` itself where both have 16
        bits. Autograd does not see what is written. Several Python threads may work on different elements at once (with
        the 8-bit format, on different blocks).

        Args:
            rule: Which optimizer, and its hyperparameters.
            states: By key: what ``form`` lists, or ``"master"`` and the rule's ``moments`` in fp32. Updated.
            grad: fp32, bf16 or fp16 gradient, read.
            out: bf16 or fp16 weights, rounded to nearest even; None where ``"master"`` is all one needs. With another
                format than fp32, bf16 and half of the master: read as well.
            form: The format of the states; other ones than fp32 go with :class:`AdamRule` only.
            noise: Random numbers, for a format that is not exact.
            start: First element to update.
            stop: End of the elements to update; None means all from ``start`` on.
            num_threads: Threads to use; None means ``torch.get_num_threads()``. A forked child uses one.

        Raises:
            ValueError: A tensor or a number is not as described.
        """
        numel = check_tensors(states, _kinds(rule, form), grad, out)
        stop = numel if stop is None else stop
        if not 0 <= start <= stop <= numel:
            raise ValueError(f"start and stop must lie within 0 and {numel} in this order, not {start} and {stop}")
        _check_form(rule, form, grad, out, noise)
        if start == stop:
            return
        call = Call(
            rule=rule.number,
            format=form.number,
            grad=grad.data_ptr(),
            out=None if out is None else out.data_ptr(),
            grad_dtype=DTYPE_NUMBERS[grad.dtype],
            out_dtype=DTYPE_NONE if out is None else DTYPE_NUMBERS[out.dtype],
            noise_key=(0, 0) if noise is None else noise.key(),
            noise_index=0 if noise is None else noise.index,
            numel=numel,
            scalars=rule.scalars(),
        )
        names = (form.buffers[0].key, *rule.moments)
        for field, name in zip(("master", "first", "second"), names, strict=False):
            setattr(call, field, states[name].data_ptr())
        if MEAN_SCALE in states:
            call.first_scale, call.second_scale = (states[key].data_ptr() for key in (MEAN_SCALE, SQUARE_SCALE))
        self.run(call, stop, self._num_threads(num_threads), start=start)

    def _num_threads(self, wish: int | None) -> int:
        threads = torch.get_num_threads() if wish is None else wish
        if threads < 1:
            raise ValueError(f"num_threads must be at least 1, not {threads}")
        if self.uses_openmp and os.getpid() != self._process_id:
            return 1  # GNU OpenMP waits for ever for the threads that stayed with the parent
        return threads

    def run(self, call: Call, stop: int, num_threads: int = 1, *, start: int = 0) -> None:
        """Make the step ``call`` describes, unchecked; :meth:`step` is the safe way."""
        self._step(ctypes.byref(call), start, stop, ISA_NUMBERS[self.isa], num_threads)

    def __repr__(self) -> str:
        return f"NativeKernel(isa={self.isa!r}, path={str(self.path)!r})"


def _kinds(rule: Rule, form: StateFormat) -> dict[str, tuple[torch.dtype, int]]:
    """Dtypes of the states, and how many elements share an entry."""
    if form is FP32:
        return dict.fromkeys((MASTER, *rule.moments), (torch.float32, 1))
    return {buffer.key: (buffer.dtype, buffer.block_numel) for buffer in form.buffers}


def _check_form(rule: Rule, form: StateFormat, grad: Tensor, out: Tensor | None, noise: Noise | None) -> None:
    """Raises ValueError where a format other than fp32 asks for something else."""
    if form is FP32:
        return
    if not isinstance(rule, AdamRule):
        raise ValueError(f"the format {form.name!r} goes with Adam and AdamW only, not with {type(rule).__name__}")
    if out is None or out.dtype != torch.bfloat16 or out.data_ptr() == grad.data_ptr():
        raise ValueError(
            f"out must be torch.bfloat16 weights apart from grad, as the format {form.name!r} keeps the "
            "master's upper half there"
        )
    if noise is None and not form.is_exact:
        raise ValueError(f"the format {form.name!r} rounds at random and needs noise")
