"""A command inside a rank: how it starts, and how it ends for the others to see."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from zero.launching.failure import EXIT_FAILED, EXIT_WRONG_INPUT, Failure, leave_word, trace_of
from zero.launching.output import PrefixedLines, quieten
from zero.launching.place import Place, complete_environment, is_ours

_SAID_BY_RANK_0_S = 2.0
"""How long another rank waits before it repeats what rank 0 has most likely said; torchrun ends it sooner."""
_PR_SET_PDEATHSIG = 1


class Explained(NamedTuple):
    """An error in words for a user, and the exit code it means."""

    message: str
    exit_code: int


def run_as_rank(place: Place, perform: Callable[[], int], explain: Callable[[BaseException], Explained | None]) -> int:
    """Runs a command as one of several ranks.

    A failure is told to the other ranks before this one goes, and is printed once: by our launcher where there is one,
    else by this process.

    Args:
        place: of this process.
        perform: the command; returns an exit code.
        explain: words for the errors that need no traceback.

    Returns:
        The exit code. A rank that has joined the others and fails ends here and does not return: what would run at
        its exit waits for the others.
    """
    lines = quieten(place.rank) if place.rank else None
    try:
        complete_environment()
        if is_ours(os.environ):
            _end_with(os.getppid())
        return perform()
    except BaseException as error:
        if _is_fork():  # of the user's own making: it ends as any process does
            raise
        code = _fail(place, error, explain)
    finally:
        _flush(lines)
    if code and _joined() and not _is_fork():
        os._exit(code)
    return code


def _fail(place: Place, error: BaseException, explain: Callable[[BaseException], Explained | None]) -> int:
    """Tells everybody; returns the exit code."""
    if isinstance(error, SystemExit) and not error.code:
        return 0
    failure = _failure(place.rank, error, explain)
    if failure.message is not None:
        leave_word(error, failure)
    tell_peers(error)
    if not is_ours(os.environ):
        if failure.is_refusal and place.rank:
            time.sleep(_SAID_BY_RANK_0_S)
        _print(failure)
    return EXIT_FAILED if failure.exit_code is None else failure.exit_code


def _failure(rank: int, error: BaseException, explain: Callable[[BaseException], Explained | None]) -> Failure:
    if isinstance(error, SystemExit):
        is_number = isinstance(error.code, int)
        return Failure(rank, error.code) if is_number else Failure(rank, EXIT_FAILED, str(error.code))  # type: ignore[arg-type]
    world = sys.modules.get("zero.world")
    if world is not None and isinstance(error, world.PeerLostError):
        return Failure(rank, EXIT_FAILED, f"{error}", lost_peer=True)
    explained = explain(error)
    if explained is not None:
        return Failure(rank, explained.exit_code, explained.message)
    # Groups that are being made when a rank dies say so in words of their own.
    of_peers = world is not None and isinstance(error, RuntimeError) and world._is_of_peers(error)
    return Failure(rank, EXIT_FAILED, f"{type(error).__name__}: {error}", trace_of(error), lost_peer=of_peers)


def _print(failure: Failure) -> None:
    """What a process that runs alone would print; the lines carry the rank's number already."""
    if failure.trace is not None:
        sys.stderr.write(failure.trace)
    elif failure.message is not None:
        sys.stderr.write(f"zero: {failure.message}\n")


def tell_peers(error: BaseException) -> None:
    """Leaves word of a failure with the ranks that have been joined, if any."""
    world = sys.modules.get("zero.world")
    if world is not None and (present := world.current()) is not None and not _is_fork():
        present.fail(error)


_joined_by: int | None = None
"""Number of the process that has joined the others; what it forks is no rank."""


def _is_fork() -> bool:
    return _joined_by is not None and os.getpid() != _joined_by


def watch_exit() -> None:
    """Has this process part from the other ranks when it ends, and tell them if an error ends it; called on joining."""
    global _joined_by
    _joined_by = os.getpid()
    if sys.excepthook is not _tell_and_show:
        atexit.register(_part)
        sys.excepthook = _tell_and_show


def _part() -> None:
    world, dist = sys.modules.get("zero.world"), sys.modules.get("torch.distributed")
    # The user's own code may have ended the group: it is not ended twice.
    if world is not None and dist is not None and dist.is_initialized() and not _is_fork():
        world.leave()


_show = sys.excepthook


def _tell_and_show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For programs that are not started by our command line: what ends them is shown as ever."""
    if _is_fork():
        _show(kind, error, trace)
        return
    failure = _failure(int(os.environ.get("RANK", "0")), error, lambda _: None)
    if not isinstance(error, KeyboardInterrupt):
        leave_word(error, failure)
    tell_peers(error)
    atexit.unregister(_part)  # it would wait for the others
    if failure.trace is None:  # another rank was lost, and its own traceback says why
        sys.stderr.write(f"{kind.__module__}.{kind.__name__}: {error}\n")
    else:
        _show(kind, error, trace)


def _joined() -> bool:
    world = sys.modules.get("zero.world")
    return world is not None and world.current() is not None


def _flush(lines: PrefixedLines | None) -> None:
    with contextlib.suppress(OSError, ValueError):  # whoever reads may have gone
        if lines is not None:
            lines.finish()
        sys.stdout.flush()
        sys.stderr.flush()


def _end_with(launcher: int) -> None:
    """Has this process end as by SIGTERM when the launcher dies, even by SIGKILL: nobody else would end it."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it died before we asked
        os.kill(os.getpid(), signal.SIGTERM)


__all__ = ["EXIT_FAILED", "EXIT_WRONG_INPUT", "Explained", "run_as_rank", "tell_peers", "watch_exit"]
