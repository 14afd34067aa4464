"""The display of a running training, redrawn in place on a terminal."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gemini.units import format_bytes
from zero.report.record import StepRecord
from zero.report.scale import format_duration, format_used_of

# Enough steps for a steady figure, few enough to follow a run whose sequences grow longer.
_ETA_WINDOW_STEPS = 50
_MIN_BAR_CELLS = 8
_MAX_BAR_CELLS = 60
# What stands beside the bar of a long run: "step 100000/100000", "100%", two durations.
_WIDEST_NUMBERS_CELLS = 50


class ProgressView:
    """Draws the last step of a run in four lines: progress, model, memory and traffic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock (a function that returns seconds)."""
        self._clock = clock
        self._start_s = clock()
        self._last_step_s = self._start_s
        self._record: StepRecord | None = None
        self._recent_step_s: deque[float] = deque(maxlen=_ETA_WINDOW_STEPS)
        self._num_skipped = 0

    def update(self, record: StepRecord) -> None:
        """Take the figures of a step."""
        self._record = record
        self._recent_step_s.append(record.step_s)
        self._num_skipped += record.skipped
        self._last_step_s = self._clock()

    @property
    def remaining_s(self) -> float | None:
        """Seconds to the end of the run, None before the first step.

        Taken from the median of the recent steps: the warm-up step, or one that saved a checkpoint, says nothing about
        the others.
        """
        if self._record is None:
            return None
        num_left = self._record.num_steps - self._record.step
        since_last_s = self._clock() - self._last_step_s
        return max(0.0, num_left * statistics.median(self._recent_step_s) - since_last_s)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines of the display."""
        if self._record is None:
            return
        yield self._progress_line(self._record, options.max_width)
        yield self._model_line(self._record)
        yield self._memory_line(self._record, options.max_width)
        yield self._traffic_line(self._record)

    def _progress_line(self, record: StepRecord, width: int) -> Table:
        """Return the bar with the step's number, the elapsed and the remaining time."""
        remaining_s = self.remaining_s or 0.0
        elapsed = format_duration(self._clock() - self._start_s)
        bar = ProgressBar(
            total=max(1, record.num_steps),
            completed=record.step,
            width=max(_MIN_BAR_CELLS, min(_MAX_BAR_CELLS, width - _WIDEST_NUMBERS_CELLS)),
            complete_style="cyan",
        )
        percent = 100 * record.step / max(1, record.num_steps)
        return _row(
            Text(f"step {record.step}/{record.num_steps}", style="bold", no_wrap=True, overflow="ellipsis"),
            bar,
            Text(f"{percent:.0f}%  {elapsed}  ETA {format_duration(remaining_s)}", no_wrap=True, overflow="ellipsis"),
        )

    def _model_line(self, record: StepRecord) -> Text:
        """Return loss, learning rate, gradient norm and speed."""
        pairs = [
            ("loss", f"{record.loss:.4f}"),
            ("lr", f"{record.lr:.2e}"),
            ("grad norm", "-" if record.grad_norm is None else f"{record.grad_norm:.3g}"),
            ("tokens/s", f"{record.tokens_per_s:,.0f}" if record.tokens_per_s >= 10 else f"{record.tokens_per_s:.2f}"),
            ("epoch", f"{record.epoch:.2f}"),
        ]
        if record.loss_scale is not None:
            pairs.append(("loss scale", f"{record.loss_scale:g}"))
        return _figures(pairs)

    def _memory_line(self, record: StepRecord, width: int) -> Table:
        """Return what the device and the host hold, the device as a bar too where it has a capacity."""
        capacity_bytes = record.device_capacity_bytes
        figures = _figures(
            [
                ("", format_used_of(record.device_bytes, capacity_bytes)),
                ("peak", format_bytes(record.device_peak_bytes)),
                ("host", format_bytes(record.host_bytes)),
                ("pinned", format_bytes(record.pinned_bytes)),
            ]
        )
        name = Text("device", style="dim")
        if not capacity_bytes:
            return _row(name, figures)
        # The peak, not what is left at the end of the step, says how close the run is to the edge.
        style = _fill_style(record.device_peak_bytes / capacity_bytes)
        fill = ProgressBar(
            total=capacity_bytes,
            completed=record.device_bytes,
            width=max(_MIN_BAR_CELLS, width // 10),
            complete_style=style,
            finished_style=style,
        )
        return _row(name, fill, figures)

    def _traffic_line(self, record: StepRecord) -> Text:
        """Return what moved between the tiers in the last step, and how many steps were skipped so far."""
        line = _figures(
            [
                ("fetches", str(record.num_fetches)),
                ("evictions", str(record.num_evictions)),
                ("to device", format_bytes(record.h2d_bytes)),
                ("to host", format_bytes(record.d2h_bytes)),
            ]
        )
        if self._num_skipped:
            line.append(f"  skipped {self._num_skipped}", style="bold yellow")
        return line


def _fill_style(fraction: float) -> str:
    """Return the colour of a device that is filled to ``fraction``."""
    return "red" if fraction > 0.97 else "yellow" if fraction > 0.9 else "cyan"


def _figures(pairs: list[tuple[str, str]]) -> Text:
    """Return names (dim) and values (bold), two blanks apart."""
    line = Text(no_wrap=True, overflow="ellipsis")
    for index, (name, value) in enumerate(pairs):
        line.append("  " if index else "")
        line.append(f"{name} " if name else "", style="dim").append(value, style="bold")
    return line


def _row(*cells: Text | ProgressBar) -> Table:
    """Return renderables beside each other."""
    row = Table.grid(padding=(0, 2))
    for _ in cells:
        row.add_column()
    row.add_row(*cells)
    return row
