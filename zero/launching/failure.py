"""Why a rank failed: what it leaves behind in its error file, and which of several failures was the first.

The file is that of ``torch.distributed.elastic.multiprocessing.errors``, so that ``torchrun`` shows it as well; what
we add stands under ``zero``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
EXIT_FAILED, EXIT_WRONG_INPUT = 1, 2
_OWN_FRAMES = ("zero/launching/", "zero/cli/", "<frozen runpy>", "/runpy.py")


@dataclass(frozen=True)
class Failure:
    """How a rank ended that did not end well.

    Attributes:
        rank: its number.
        exit_code: of its process, negative for a signal; None while it is not known.
        message: for the user; None where the rank left no word.
        trace: its traceback; None where the message says it all.
        time_s: when it happened, in seconds since the epoch.
        lost_peer: it only went because another rank had gone.
        witness: what another rank said of its end.
    """

    rank: int
    exit_code: int | None = None
    message: str | None = None
    trace: str | None = None
    time_s: float = 0.0
    lost_peer: bool = False
    witness: str | None = None

    @property
    def is_refusal(self) -> bool:
        """Whether what the user gave is wrong."""
        return self.exit_code == EXIT_WRONG_INPUT

    def describe(self) -> str:
        """What the user reads."""
        if self.trace is not None:
            return f"rank {self.rank} failed\n{self.trace.rstrip()}"
        if self.message is not None:
            named = self.lost_peer or self.rank == 0 or self.is_refusal  # the first rank speaks for all
            return self.message if named else f"rank {self.rank}: {self.message}"
        return self._silent_end() + ("" if self.witness is None else f"\n{self.witness}")

    def _silent_end(self) -> str:
        code = self.exit_code or 0
        if code >= 0:
            return f"rank {self.rank} ended with exit code {code} and left no word"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = ": the kernel does that where memory runs out" if name == "SIGKILL" else ""
        return f"rank {self.rank} was killed by {name}{hint}"


def trace_of(error: BaseException) -> str:
    """A traceback that begins with the user's own code or the trainer, not with what started them."""
    begin: TracebackType | None = error.__traceback__
    while begin is not None and begin.tb_next is not None and _is_own(begin.tb_frame.f_code.co_filename):
        begin = begin.tb_next
    return "".join(traceback.format_exception(type(error), error, begin))


def _is_own(filename: str) -> bool:
    return any(part in filename.replace(os.sep, "/") for part in _OWN_FRAMES)


def leave_word(error: BaseException, failure: Failure, environment: Mapping[str, str] = os.environ) -> None:
    """Writes this rank's error file, where somebody asked for one."""
    path = environment.get(ERROR_FILE_VARIABLE)
    if not path:
        return
    time_s = time.time()
    extra = {"py_callstack": failure.trace or f"{failure.message}\n", "timestamp": str(int(time_s))}
    own = {
        "rank": failure.rank,
        "exit_code": failure.exit_code,
        "message": failure.message,
        "trace": failure.trace,
        "time_s": time_s,
        "lost_peer": failure.lost_peer,
    }
    message = {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": message, "zero": own}), encoding="utf-8")


def read_words(folder: Path) -> list[Failure]:
    """What the ranks of the last start have left below a folder, be it ours or ``record``'s."""
    found = []
    for path in sorted(folder.rglob("error.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            word = json.loads(path.read_text(encoding="utf-8"))
            if "zero" in word:
                found.append(Failure(**word["zero"]))
                continue
            extra = word["message"]["extraInfo"]
            rank = int(path.parent.name)  # one machine: local ranks are the ranks
            found.append(Failure(rank, EXIT_FAILED, trace=extra["py_callstack"], time_s=float(extra["timestamp"])))
    return found


def first_failure(words: Iterable[Failure], exit_codes: Mapping[int, int]) -> Failure:
    """The failure that made the others.

    Args:
        words: what ranks left.
        exit_codes: of the ranks that had failed when that was noticed; negative for signals.
    """
    words = sorted(words, key=lambda word: word.time_s)
    causes = [word for word in words if not word.lost_peer]
    if causes:
        return causes[0]
    spoken = {word.rank for word in words}
    seen = words[0].message if words else None
    # The launcher ends those that are left by SIGTERM: they come last.
    codes = sorted(exit_codes.items(), key=lambda item: (item[1] == -signal.SIGTERM, item[0]))
    silent = [Failure(rank, code, witness=seen) for rank, code in codes if rank not in spoken]
    return (silent or words or [Failure(0, EXIT_FAILED)])[0]
