"""What the ranks other than the first print: warnings and errors only, each line with the rank's number."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

_NO_BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")


class PrefixedLines(io.TextIOBase):
    """Passes whole lines on to a stream, each with a prefix.

    Args:
        stream: where they go.
        prefix: what each begins with.
    """

    def __init__(self, stream: TextIO, prefix: str) -> None:
        self._stream = stream
        self._prefix = prefix
        self._begun = ""

    def write(self, text: str) -> int:
        """Takes text; the last line waits until it is complete."""
        *lines, self._begun = (self._begun + text).split("\n")
        if lines:
            # In one piece: the ranks share the terminal.
            self._stream.write("".join(f"{self._prefix}{line}\n" for line in lines))
            self._stream.flush()
        return len(text)

    def finish(self) -> None:
        """Writes a last line that was never ended."""
        if self._begun:
            self.write("\n")

    def flush(self) -> None:
        """Passes on what is whole."""
        self._stream.flush()

    def fileno(self) -> int:
        """The stream's own: for those who write to descriptors, such as child processes."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """No: nothing is drawn here."""
        return False

    def writable(self) -> bool:
        """Always."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's."""
        return self._stream.encoding


def quieten(rank: int) -> PrefixedLines:
    """Lets this process, a rank other than the first, print warnings and errors only; for as long as it lives."""
    for name in _NO_BARS:
        os.environ.setdefault(name, "1")
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # for libraries that do not write through Python
    os.close(nowhere)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    sys.stderr = lines = PrefixedLines(sys.stderr, f"[rank {rank}] ")
    return lines
