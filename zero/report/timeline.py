"""A plan's predicted schedule, as a picture and as a trace for Perfetto (or chrome://tracing).

One lane for each of what works at the same time: the device, the link both ways, updates on the host, the disk, the
exchange between ranks, and where the program itself waits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemini.clock import COMPUTE, DISK, EXCHANGE, IN, LANES, OUT, UPDATE, WAIT, Span
from gemini.units import format_bytes
from zero.errors import UserError
from zero.report.scale import format_duration

_COLOURS = {
    COMPUTE: "#0072B2",
    IN: "#56B4E9",
    OUT: "#D55E00",
    UPDATE: "#CC79A7",
    DISK: "#009E73",
    EXCHANGE: "#8C6D31",
    WAIT: "#C9CDD1",
}
_BACKWARD_COLOUR, _DEVICE_UPDATE_COLOUR = "#0B3C5D", "#F0B93A"
_DPI = 140


def write_trace(path: Path, spans: Sequence[Span], title: str) -> None:
    """Writes the schedule in Chrome's trace format, which https://ui.perfetto.dev opens.

    Args:
        path: of the JSON file.
        spans: what takes time.
        title: of the whole.

    Raises:
        UserError: the file cannot be written.
    """
    lanes = {lane: number for number, lane in enumerate(LANES)}
    events: list[dict[str, Any]] = [_named("process_name", 0, title)]
    events += [_named("thread_name", number, lane) for lane, number in lanes.items()]
    events += [_event(span, lanes[span.lane]) for span in sorted(spans, key=lambda span: span.start_s)]
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
    try:
        path.write_text(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _named(kind: str, number: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": 0, "tid": number, "name": kind, "args": {"name": name}}


def _event(span: Span, number: int) -> dict[str, Any]:
    event: dict[str, Any] = {
        "ph": "X",
        "pid": 0,
        "tid": number,
        "name": span.label or span.lane,
        "ts": span.start_s * 1e6,
        "dur": (span.stop_s - span.start_s) * 1e6,
    }
    if span.num_bytes:
        event["args"] = {"bytes": span.num_bytes, "GB/s": round(span.num_bytes / (span.stop_s - span.start_s) / 1e9, 2)}
    return event


def draw_timeline(path: Path, spans: Sequence[Span], title: str, shown_s: float) -> None:
    """Draws the schedule.

    Args:
        path: of the picture; its suffix says the format.
        spans: what takes time.
        title: above it.
        shown_s: seconds of the step that these are, for the share of them in which each lane works.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("a picture needs the package matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, lane in enumerate(LANES):
        of_lane = [span for span in spans if span.lane == lane]
        bars = [(span.start_s, span.stop_s - span.start_s) for span in of_lane]
        axes.broken_barh(bars, (row - 0.36, 0.72), facecolors=[_colour(span) for span in of_lane], linewidth=0)
        share = sum(length for _, length in bars) / shown_s if shown_s else 0.0
        moved = sum(span.num_bytes for span in of_lane)
        note = f"{100 * share:.0f} %" + (f", {format_bytes(moved)}" if moved else "")
        axes.text(1.005, row, note, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    axes.set_yticks(range(len(LANES)), LANES)
    axes.invert_yaxis()
    axes.set_xlim(0, max([shown_s, *(span.stop_s for span in spans)]))
    axes.set_xlabel("seconds of one step, from step() to step(): light blue forward, dark blue backward")
    axes.set_title(title, loc="left", fontsize=10)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    try:
        figure.savefig(os.fspath(path), dpi=_DPI)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def _colour(span: Span) -> str:
    if span.lane == COMPUTE and span.label.startswith("backward"):
        return _BACKWARD_COLOUR
    if span.lane == COMPUTE and span.label.startswith("update"):
        return _DEVICE_UPDATE_COLOUR
    return _COLOURS[span.lane]


def step_text(step_s: float) -> str:
    """Seconds as people read them."""
    return format_duration(step_s) if step_s >= 600 else f"{step_s:.3g} s"
