"""The parts a memory map is drawn from. Moment i covers the stretch from i to i + 1 of the horizontal axis."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from gemini.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_T = TypeVar("_T")

INK = "#222222"
_FAINT_INK = "#5F5F5F"
_CAPACITY_COLOUR = "#B00020"
_OTHER_COLOURS = ("#8C6D31", "#F0E442", "#44AA99", "#7F7F7F")
_PHASE_COLOURS = {"forward": "#E3EFF8", "backward": "#FBEBD3", "step": "#E6F2E3"}
_OTHER_PHASE_COLOUR = "#F2F2F2"
_MAX_UNIT_NAMES = 24
# A phase narrower than this share of the step has no room for its name.
_MIN_NAMED_SHARE = 0.045


@dataclass(frozen=True, slots=True)
class Kind:
    """How one kind of bytes is drawn."""

    label: str
    colour: str
    hatch: str | None = None


def draw_stack(axes: Axes, rows: Sequence[Mapping[str, int]], known: Mapping[str, Kind], per_unit: int) -> None:
    """Stack one area per kind that ever holds bytes, each with the most it ever holds in its legend entry.

    Args:
        axes: The panel.
        rows: Bytes by kind, one mapping per moment.
        known: How kinds are drawn, from the bottom up; unknown ones come on top in colours of their own.
        per_unit: Bytes per unit of the vertical axis.
    """
    edges = _edges(len(rows))
    bottom = [0.0] * len(rows)
    for name, kind in _used_kinds(rows, known):
        counts = [row.get(name, 0) for row in rows]
        top = [low + count / per_unit for low, count in zip(bottom, counts, strict=True)]
        axes.fill_between(
            edges,
            _twice(bottom),
            _twice(top),
            facecolor=kind.colour,
            edgecolor="#FFFFFF" if kind.hatch is None else "#A8A8A8",
            linewidth=0.5 if kind.hatch is None else 0.0,
            hatch=kind.hatch,
            label=f"{kind.label}  {format_bytes(max(counts))}",
            zorder=3,
        )
        bottom = top
    axes.plot(edges, _twice(bottom), color=INK, linewidth=0.9, zorder=4)


def draw_steps(axes: Axes, values: Sequence[float], label: str) -> None:
    """Draw one dashed line that holds each value for its moment."""
    axes.plot(_edges(len(values)), _twice(values), color=INK, linewidth=1.6, linestyle="--", label=label, zorder=5)


def draw_capacity(axes: Axes, height: float, text: str) -> None:
    """Draw the capacity line with its name above it."""
    axes.axhline(height, color=_CAPACITY_COLOUR, linewidth=1.8, zorder=6)
    axes.annotate(
        text,
        (0, height),
        xycoords=("axes fraction", "data"),
        xytext=(6, 3),
        textcoords="offset points",
        fontsize=9.5,
        fontweight="bold",
        color=_CAPACITY_COLOUR,
        zorder=7,
    )


def name_far_capacity(axes: Axes, text: str) -> None:
    """Name a capacity that lies beyond the top of the panel."""
    axes.annotate(
        f"\N{UPWARDS ARROW} {text}, beyond this scale",
        (0, 1),
        xycoords="axes fraction",
        xytext=(6, -20),
        textcoords="offset points",
        va="top",
        fontsize=9.5,
        fontweight="bold",
        color=_CAPACITY_COLOUR,
        zorder=7,
    )


def draw_prediction(axes: Axes, height: float, label: str) -> None:
    """Draw the plan's peak as a dotted line, named in the legend."""
    axes.axhline(height, color=INK, linewidth=1.4, linestyle=(0, (1, 1.6)), label=label, zorder=5)


def mark_peak(axes: Axes, moment: int, height: float) -> None:
    """Point at the moment at which the device is fullest."""
    axes.annotate(
        "\N{BLACK DOWN-POINTING TRIANGLE}",
        (moment + 0.5, height),
        xytext=(0, -1),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=8,
        color=INK,
        zorder=8,
    )
    axes.plot([], [], "v", color=INK, markersize=6, label="peak moment")


def subtitle(axes: Axes, text: str) -> None:
    """Write a sentence above a panel."""
    axes.set_title(text, loc="left", fontsize=10.5, color=INK, pad=6, parse_math=False)


def add_legend(axes: Axes, title: str) -> None:
    """Put the legend beside the panel, in the order of the stack from the top down, lines first."""
    handles, labels = axes.get_legend_handles_labels()
    legend = axes.legend(
        handles[::-1],
        labels[::-1],
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        fontsize=9,
        title_fontsize=9.5,
        alignment="left",
        handlelength=1.6,
        handleheight=1.1,
        labelspacing=0.55,
    )
    legend.get_title().set_fontweight("bold")
    for text in legend.get_texts():
        text.set_parse_math(False)


def shade_phases(axes: Axes, phases: Sequence[str], *, with_names: bool) -> None:
    """Shade each stretch of one phase and draw a line where phases meet; name those that are wide enough."""
    for start, end, phase in _runs(phases):
        axes.axvspan(start, end, color=_PHASE_COLOURS.get(phase, _OTHER_PHASE_COLOUR), linewidth=0, zorder=0)
        if start > 0:
            axes.axvline(start, color=_FAINT_INK, linewidth=0.8, zorder=5, alpha=0.7)
        if with_names and (end - start) / len(phases) >= _MIN_NAMED_SHARE:
            axes.annotate(
                phase,
                ((start + end) / 2, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, -5),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=10,
                fontweight="bold",
                color=_FAINT_INK,
                zorder=7,
            )


def name_units(axes: Axes, labels: Sequence[str], phases: Sequence[str]) -> None:
    """Name the units below the lowest panel, as many as can be read."""
    min_distance = len(labels) / _MAX_UNIT_NAMES
    ticks: list[tuple[float, str]] = []
    for start, end, (label, _) in _runs(list(zip(labels, phases, strict=True))):
        middle = (start + end) / 2
        if not ticks or middle - ticks[-1][0] >= min_distance:
            ticks.append((middle, label))
    axes.set_xticks(
        [middle for middle, _ in ticks],
        [label for _, label in ticks],
        rotation=45,
        ha="right",
        rotation_mode="anchor",
        parse_math=False,
    )
    axes.set_xlabel("moments of the step: a unit starts or ends", color=_FAINT_INK, fontsize=9)


def finish(axes: Axes, num_moments: int) -> None:
    """Set limits, grid and frame of a panel."""
    axes.set_xlim(0, num_moments)
    axes.grid(axis="y", color="#FFFFFF", linewidth=1.0, zorder=1)
    axes.set_axisbelow(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT_INK)
    axes.tick_params(labelsize=8.5, color=_FAINT_INK, labelcolor=INK)
    axes.yaxis.label.set(color=INK, fontsize=10)


def _used_kinds(rows: Sequence[Mapping[str, int]], known: Mapping[str, Kind]) -> Iterator[tuple[str, Kind]]:
    """Yield the kinds that ever hold bytes, known ones first, from the bottom of the stack up."""
    used = {name for row in rows for name, num_bytes in row.items() if num_bytes > 0}
    yield from ((name, kind) for name, kind in known.items() if name in used)
    colours = itertools.cycle(_OTHER_COLOURS)
    yield from ((name, Kind(name, next(colours))) for name in sorted(used - set(known)))


def _runs(items: Sequence[_T]) -> Iterator[tuple[int, int, _T]]:
    """Yield (start, end, item) of each stretch of equal items; the end is exclusive."""
    start = 0
    for item, group in itertools.groupby(items):
        end = start + sum(1 for _ in group)
        yield start, end, item
        start = end


def _edges(num_moments: int) -> list[int]:
    """Return where each moment starts and ends: 0, 1, 1, 2, 2, ..."""
    return [edge for moment in range(num_moments) for edge in (moment, moment + 1)]


def _twice(values: Sequence[float]) -> list[float]:
    """Return each value twice, for the two ends of its moment."""
    return [value for value in values for _ in range(2)]
