"""The native CPU optimizers: one pass over 16-bit gradients, master and moments, and 16-bit weights.

:func:`load_native` builds them on first use and never raises; where they cannot be had it says so once in the log, and
the caller takes torch's optimizer. The arithmetic is described in ``kernel_rules.h``.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import NamedTuple

from zero.errors import UserError
from zero.optim.build import BuildError, Compiler, build, find_compiler
from zero.optim.native_check import computes_correctly
from zero.optim.native_kernel import ISA_NUMBERS, NativeKernel

__all__ = ["ISA_VARIABLE", "NativeKernel", "load_native", "native_status", "require_native"]

logger = logging.getLogger("zero")

ISA_VARIABLE = "ZERO_NATIVE_ISA"
"""Environment variable that forces an instruction set, for tests and for chasing a difference."""


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
    if isa is not None and isa not in ISA_NUMBERS:
        return _Outcome(None, f"{ISA_VARIABLE}={isa!r} is not one of {', '.join(ISA_NUMBERS)}")
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
