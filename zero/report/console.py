"""Progress of a run on stdout: a live display on a terminal, one plain line per logged step anywhere else.

Rank 0 reports, the other ranks are silent. What is printed here are results; log messages go to stderr (``logs``).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from zero.report.live import ProgressView
from zero.report.record import StepRecord, step_line
from zero.report.tables import values_table, values_text

__all__ = ["LiveReporter", "PlainReporter", "Reporter", "SilentReporter", "StepRecord", "make_reporter"]


class Reporter(Protocol):
    """What a trainer tells its user. A context manager: leaving it takes the live display down, also after an error."""

    def header(self, config_summary: Mapping[str, str]) -> None:
        """Show what is about to run, as names and values."""

    def step(self, record: StepRecord) -> None:
        """Take the figures of a step. To be called after every step; which ones get a line is the reporter's choice."""

    def message(self, text: str) -> None:
        """Show one or more lines of text, as they are."""

    def summary(self, rows: Sequence[tuple[str, str]]) -> None:
        """Show what came of the run, as names and values, after taking the live display down."""

    def close(self) -> None:
        """Take the live display down. Safe to call twice."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class _Closing:
    """The context-manager half of a reporter."""

    def close(self) -> None:
        """Take the live display down; nothing to do without one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SilentReporter(_Closing):
    """Reports nothing: for ranks other than 0, and for tests."""

    def header(self, config_summary: Mapping[str, str]) -> None:
        """Show nothing."""

    def step(self, record: StepRecord) -> None:
        """Show nothing."""

    def message(self, text: str) -> None:
        """Show nothing."""

    def summary(self, rows: Sequence[tuple[str, str]]) -> None:
        """Show nothing."""


class PlainReporter(_Closing):
    """Reports in plain lines, flushed one by one, so that ``tail -f`` and a killed job show all there was."""

    def __init__(self, stream: IO[str] | None = None, *, logging_steps: int = 1) -> None:
        """Write to ``stream`` (default: what ``sys.stdout`` is at each write), every ``logging_steps`` steps."""
        self._stream = stream
        self._logging_steps = logging_steps

    def header(self, config_summary: Mapping[str, str]) -> None:
        """Write the names and values, one per line."""
        self.message(values_text(config_summary))

    def step(self, record: StepRecord) -> None:
        """Write the step's line, if it is to have one."""
        if _has_line(record, self._logging_steps):
            self.message(step_line(record))

    def message(self, text: str) -> None:
        """Write the text and a line end."""
        stream = self._stream or sys.stdout
        # Text of a data set goes through here: an ASCII stdout must not end a run.
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        stream.flush()

    def summary(self, rows: Sequence[tuple[str, str]]) -> None:
        """Write the names and values, one per line, after an empty line."""
        self.message("\n" + values_text(rows))


class LiveReporter(_Closing):
    """Reports on a terminal: a display that is redrawn in place, below the lines of the logged steps."""

    def __init__(self, console: Console, *, logging_steps: int = 1) -> None:
        """Draw on ``console``; every ``logging_steps`` steps leave a line above the display."""
        self._console = console
        self._logging_steps = logging_steps
        self._view = ProgressView()
        self._live: Live | None = None

    def header(self, config_summary: Mapping[str, str]) -> None:
        """Print the names and values as a table."""
        self._console.print(values_table(config_summary))
        self._console.print()

    def step(self, record: StepRecord) -> None:
        """Redraw the display, and leave the step's line above it if it is to have one."""
        self._view.update(record)
        if self._live is None:
            self._live = self._start_live()
        if _has_line(record, self._logging_steps):
            # The display below shows the memory; without it the line fits a terminal.
            self._print(step_line(record, with_memory=False), style="bold yellow" if record.skipped else "")

    def message(self, text: str) -> None:
        """Print the text above the display."""
        self._print(text)

    def summary(self, rows: Sequence[tuple[str, str]]) -> None:
        """Take the display down and print the names and values as a table."""
        self.close()
        self._console.print()
        self._console.print(values_table(rows))

    def close(self) -> None:
        """Take the display down, leaving its last state on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: str, style: str = "") -> None:
        """Print text as it is: rich must not see markup in a decoded sample such as ``[INST]``."""
        self._console.print(Text(text, style=style), soft_wrap=True)

    def _start_live(self) -> Live:
        """Put the display up."""
        # What another program or a file reads from stderr must stay there; on a terminal it would tear the display.
        live = Live(self._view, console=self._console, refresh_per_second=4, redirect_stderr=sys.stderr.isatty())
        live.start(refresh=True)
        return live


def make_reporter(
    *, rank: int = 0, logging_steps: int = 1, console: Console | None = None, plain: bool | None = None
) -> Reporter:
    """Return the reporter that suits this process.

    Args:
        rank: This process; only rank 0 reports.
        logging_steps: A line for every how many steps. The first, the last and every skipped step have one too.
        console: Where to draw and write; default: stdout.
        plain: True for plain lines, False for the live display; default: live on a terminal that can move its cursor.

    Returns:
        A silent, a plain or a live reporter.

    Raises:
        ValueError: If ``logging_steps`` is below 1.
    """
    if logging_steps < 1:
        raise ValueError(f"logging_steps is {logging_steps}; it must be at least 1")
    if rank != 0:
        return SilentReporter()
    if plain is None:
        stream = console.file if console is not None else sys.stdout
        # Not Console.is_terminal: FORCE_COLOR makes that true for a file, where redrawing would leave garbage.
        plain = not stream.isatty() or (console or Console()).is_dumb_terminal
    if plain:
        return PlainReporter(console.file if console is not None else None, logging_steps=logging_steps)
    return LiveReporter(console or Console(), logging_steps=logging_steps)


def _has_line(record: StepRecord, logging_steps: int) -> bool:
    """Return whether a step gets a line of its own."""
    return record.skipped or record.step in (1, record.num_steps) or record.step % logging_steps == 0
