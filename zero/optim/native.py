"""The native CPU AdamW: one pass over 16-bit gradients, fp32 master and moments, and 16-bit weights.

:func:`load_native` builds it on first use and never raises; where it cannot be had it says so once in the log, and the
caller takes torch's optimizer. The arithmetic is described in ``adamw.c``.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zero.errors import UserError
from zero.optim.build import BuildError, Compiler, build, find_compiler
from zero.optim.native_args import DTYPE_NONE, DTYPE_NUMBERS, Call, check_tensors, make_scalars
from zero.optim.native_check import computes_correctly

logger = logging.getLogger("zero")

ISA_VARIABLE = "ZERO_NATIVE_ISA"
"""Environment variable that forces an instruction set, for tests and for chasing a difference."""

_ISA_NUMBERS = {"avx512": 2, "avx2": 1, "generic": 0}  # best first


class NativeKernel:
    """A built and loaded kernel for one instruction set.

    Attributes:
        isa: ``"avx512"``, ``"avx2"`` or ``"generic"``.
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
        self._step: Any = library.zero_adamw
        self._step.argtypes = [ctypes.POINTER(Call), ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
        self._step.restype = None
        self.path = path
        self._process_id = os.getpid()
        self.uses_openmp = bool(library.zero_uses_openmp())
        supported = [name for name, number in _ISA_NUMBERS.items() if library.zero_supports_isa(number)]
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
        """Make one optimizer step in place, as ``torch.optim.AdamW`` (or ``Adam``) does.

        All tensors are contiguous, one-dimensional, on the CPU and of the same numel (0 is fine); none may overlap
        another, but for ``out``, which may be ``grad`` itself where both have 16 bits. Autograd does not see what is
        written.

        Args:
            master: fp32 weights, updated.
            exp_avg: fp32 first moment, updated.
            exp_avg_sq: fp32 second moment, updated.
            grad: fp32, bf16 or fp16 gradient, read.
            out: bf16 or fp16 copy of the new weights, rounded to nearest even; None where ``master`` is all one needs.
            lr: Learning rate of this step.
            betas: Decay rates of the two moments, each in [0, 1).
            eps: Added to the denominator.
            weight_decay: Decay coefficient.
            step: Number of this step, counted from 1; gives the bias corrections.
            grad_scale: The gradient is multiplied by this in fp32 first: 1 / loss scale times the clip factor.
            decoupled: True decays the weights (AdamW), False adds the decay to the gradient (Adam).
            maximize: Step up the gradient rather than down.
            num_threads: Threads to use; None means ``torch.get_num_threads()``. A forked child uses one.

        Raises:
            ValueError: A tensor or a number is not as described.
        """
        numel = check_tensors({"master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, grad, out)
        threads = self._num_threads(num_threads)
        scalars = make_scalars(lr, betas, eps, weight_decay, step, grad_scale, decoupled, maximize)
        if numel == 0:
            return
        out_dtype = DTYPE_NONE if out is None else DTYPE_NUMBERS[out.dtype]
        call = Call(
            master.data_ptr(),
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            grad.data_ptr(),
            None if out is None else out.data_ptr(),
            DTYPE_NUMBERS[grad.dtype],
            out_dtype,
            scalars,
        )
        self.run(call, numel, threads)

    def _num_threads(self, wish: int | None) -> int:
        threads = torch.get_num_threads() if wish is None else wish
        if threads < 1:
            raise ValueError(f"num_threads must be at least 1, not {threads}")
        if self.uses_openmp and os.getpid() != self._process_id:
            return 1  # GNU OpenMP waits for ever for the threads that stayed with the parent
        return threads

    def run(self, call: Call, numel: int, num_threads: int = 1) -> None:
        """Make the step ``call`` describes, unchecked; :meth:`adamw` is the safe way."""
        self._step(ctypes.byref(call), numel, _ISA_NUMBERS[self.isa], num_threads)

    def __repr__(self) -> str:
        return f"NativeKernel(isa={self.isa!r}, path={str(self.path)!r})"


class _Outcome(NamedTuple):
    """What an attempt to load gave; ``text`` describes the kernel, or says why there is none."""

    kernel: NativeKernel | None
    text: str


_lock = threading.Lock()
_outcomes: dict[tuple[str | None, str | None], _Outcome] = {}
_announced: set[tuple[str | None, str | None]] = set()


def load_native(isa: str | None = None) -> NativeKernel | None:
    """Return the kernel, building it first if need be (seconds, once per machine), or None where it cannot be had.

    The answer is kept for the process and the value of ``$CC``. The first call logs it in one line: a warning with the
    reason where there is no kernel.

    Args:
        isa: Instruction set to force; default ``$ZERO_NATIVE_ISA``, else the best there is.
    """
    key, outcome = _find(isa)
    with _lock:
        first = key not in _announced
        _announced.add(key)
    if first and outcome.kernel is None:
        logger.warning("native AdamW is not available (%s); torch's AdamW is used instead", outcome.text)
    elif first:
        logger.info("native AdamW: %s", outcome.text)
    return outcome.kernel


def require_native(isa: str | None = None) -> NativeKernel:
    """Return the kernel for a user who asked for it by name.

    Raises:
        UserError: It cannot be had here; the text names the reason and the ways out.
    """
    _, outcome = _find(isa)
    if outcome.kernel is None:
        raise UserError(
            f"optimizer.kernel = 'native' cannot be used here: {outcome.text}. "
            "Install gcc or clang, or point CC at a C compiler, or set optimizer.kernel to 'auto' or 'torch'."
        )
    return outcome.kernel


def native_status() -> str:
    """Return one line for a person: what the kernel is, or why there is none."""
    _, outcome = _find(None)
    return outcome.text if outcome.kernel else f"not available ({outcome.text}); torch's AdamW is used instead"


def _find(isa: str | None) -> tuple[tuple[str | None, str | None], _Outcome]:
    isa = isa or os.environ.get(ISA_VARIABLE) or None
    key = (os.environ.get("CC"), isa)
    with _lock:
        if key not in _outcomes:
            _outcomes[key] = _load(isa)
        return key, _outcomes[key]


def _load(isa: str | None) -> _Outcome:
    if isa is not None and isa not in _ISA_NUMBERS:
        return _Outcome(None, f"{ISA_VARIABLE}={isa!r} is not one of {', '.join(_ISA_NUMBERS)}")
    try:
        compiler = find_compiler()
    except BuildError as error:
        return _Outcome(None, str(error))
    reason = ""
    for thread_flags in _thread_flags(compiler):
        try:
            kernel = _load_built(compiler, thread_flags, isa)
        except ValueError as error:  # the instruction set; no other build would have it
            return _Outcome(None, str(error))
        except (BuildError, OSError, AttributeError) as error:
            reason = reason or str(error)
            continue
        threads = "OpenMP threads" if kernel.uses_openmp else "plain threads"
        return _Outcome(kernel, f"{kernel.isa}, {threads}, {compiler.label}, {kernel.path}")
    return _Outcome(None, reason)


def _thread_flags(compiler: Compiler) -> tuple[tuple[str, ...], ...]:
    """Return the ways to have threads, best first.

    GNU OpenMP is the runtime torch brings along: its threads stay between calls and are no second pool. Clang's OpenMP
    would be one, whose threads spin on torch's cores after each call; starting threads anew costs less than that.
    """
    plain = ("-pthread",)
    return (plain,) if "clang" in compiler.version.lower() else (("-fopenmp",), plain)


def _load_built(compiler: Compiler, thread_flags: tuple[str, ...], isa: str | None) -> NativeKernel:
    try:
        kernel = NativeKernel(build(compiler, thread_flags), isa)
    except (OSError, AttributeError):  # a damaged file in the cache
        kernel = NativeKernel(build(compiler, thread_flags, force=True), isa)
    if not computes_correctly(kernel.run):
        raise BuildError(f"the kernel at {kernel.path} ({kernel.isa}) computes wrong numbers")
    return kernel
