"""Starts the ranks of one machine under torch's elastic agent, and stays until they have ended."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import psutil

from gemini.hostinfo import cpu_count
from zero.binding import threads_per_rank
from zero.errors import UserError
from zero.launching.failure import EXIT_FAILED, EXIT_WRONG_INPUT, Failure, first_failure, read_words
from zero.launching.place import RESTART_VARIABLE

EXIT_INTERRUPTED = 130
_MONITOR_S = 0.3
"""How often the agent looks. Long enough for the other ranks to notice a dead one and to say where it was."""
_MOST_WITHOUT_CORES = 16
_FORWARDED = ("SIGTERM", "SIGINT", "SIGUSR1")


def check_num_processes(num_processes: int) -> None:
    """Refuses what no machine can run.

    Raises:
        UserError: far more processes than cores.
    """
    cores = cpu_count()
    most = max(_MOST_WITHOUT_CORES, 2 * cores)
    if num_processes > most:
        raise UserError(
            f"--nprocs {num_processes}: this machine has {cores} usable core{'s' if cores > 1 else ''}, so at most {most} "
            "processes can run; more machines are used through torchrun or srun"
        )


def launch_ranks(words: Sequence[str], num_processes: int, max_restarts: int = 0) -> int:
    """Runs a command of this program as several ranks of this machine.

    Args:
        words: of the command, such as ``["train", "my.toml"]``.
        num_processes: ranks to start.
        max_restarts: how often all ranks start again after one has failed.

    Returns:
        The exit code: 0, or 1 if a rank failed, or 2 if a rank refused what the user gave, or 128 and the number of a
        signal that ended the ranks; the reason is printed.
    """
    with _Forwarding() as forwarding, _environment(num_processes):
        failure: Failure | None
        try:
            failure = _start_until_done(words, num_processes, max_restarts, forwarding)
        except _StoppedEarly:
            failure = Failure(0, -(forwarding.stopped or signal.SIGTERM))
    if failure is None:
        return 0
    if forwarding.stopped == signal.SIGINT:
        _say("interrupted")
        return EXIT_INTERRUPTED
    if forwarding.stopped is not None and failure.exit_code == -forwarding.stopped:
        _say(f"ended by {forwarding.stopped.name}")
        return 128 + forwarding.stopped
    if not (failure.is_refusal and failure.message is None):  # else the script itself has printed how it is used
        _say(failure.describe())
    return EXIT_WRONG_INPUT if failure.is_refusal else EXIT_FAILED


def _start_until_done(
    words: Sequence[str], num_processes: int, max_restarts: int, forwarding: _Forwarding
) -> Failure | None:
    """Starts the ranks, and again; returns the failure that no start follows. A refusal would only come again."""
    restart = 0
    while True:
        os.environ[RESTART_VARIABLE] = str(restart)
        failure = _run_once(words, num_processes)
        if failure is None or failure.is_refusal or forwarding.stopped is not None or restart == max_restarts:
            return failure
        restart += 1
        _say(f"{failure.describe()}\nzero: all ranks start again, restart {restart} of {max_restarts}")


def _say(text: str) -> None:
    sys.stderr.write(f"zero: {text}\n")
    sys.stderr.flush()


# -- one start -------------------------------------------------------------------------------------------------------


def _run_once(words: Sequence[str], num_processes: int) -> Failure | None:
    """One start of all ranks; returns why it failed."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="zero-ranks-") as folder, _silent_agent():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # a free port, whatever else runs here
            local_addr="localhost",
            max_restarts=0,  # a refusal would be restarted too: see the loop above
            monitor_interval=_MONITOR_S,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle="SIGQUIT",  # the others are ours
        )
        try:
            elastic_launch(config, sys.executable)(*_rank_flags(), "-m", "zero", *words)
        except ChildFailedError as error:
            exit_codes = {rank: int(failed.exitcode) for rank, failed in error.failures.items()}
            return first_failure(read_words(Path(folder)), exit_codes)
    return None


def _rank_flags() -> list[str]:
    """Ranks look for modules where this process does: in the current folder only if it does so too."""
    looks_here = "" in sys.path or os.getcwd() in sys.path
    return [] if looks_here else ["-P"]


@contextlib.contextmanager
def _environment(num_processes: int) -> Iterator[None]:
    """What the ranks inherit; this process gets its own back."""
    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(num_processes, os.environ)))
    package = importlib.util.find_spec("zero")
    if package is not None and package.origin is not None:
        roots = [str(Path(package.origin).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(root for root in roots if root)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _silent_agent() -> Iterator[None]:
    """The agent's own log repeats, at length, what is printed once here."""
    loggers = [logging.getLogger(f"torch.distributed.{part}") for part in ("elastic", "launcher")]
    before = [(logger.propagate, list(logger.handlers)) for logger in loggers]
    for logger in loggers:
        logger.propagate, logger.handlers = False, [logging.NullHandler()]
    try:
        yield
    finally:
        for logger, (propagate, handlers) in zip(loggers, before, strict=True):
            logger.propagate, logger.handlers = propagate, handlers


# -- signals ---------------------------------------------------------------------------------------------------------


class _StoppedEarly(BaseException):
    """A signal came while there was no rank to pass it on to."""


class _Forwarding:
    """Passes signals on to the ranks, which save and leave; a second interrupt kills them.

    Attributes:
        stopped: the last signal that asked the run to end.
    """

    def __init__(self) -> None:
        self.stopped: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> _Forwarding:
        if threading.current_thread() is threading.main_thread():
            for name in _FORWARDED:
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        again = self.stopped == signal.SIGINT == number
        self.stopped = signal.Signals(number)
        ranks = psutil.Process().children()
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                # To the rank alone, and not to its data loaders: they are needed until it has saved.
                rank.send_signal(signal.SIGKILL if again else number)
        if not ranks:
            raise _StoppedEarly
