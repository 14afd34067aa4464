"""Tables of a run, as rich renderables for a terminal and as plain text for everything else.

Two tables: "who needs what" (for a refusal and for ``zero plan``) and named values (header and summary of a run).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from gemini.units import format_bytes

_TIER_ORDER = ("device", "host", "disk")


@dataclass(frozen=True, slots=True)
class Need:
    """One line of "who needs what".

    Attributes:
        kind: What the bytes are, such as "parameters" or "activations".
        tier: Where they lie: "device", "host" or "disk".
        num_bytes: How many, at the worst moment of a step.
        note: Why so many, or what would make them fewer.
    """

    kind: str
    tier: str
    num_bytes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Line:
    """One rendered line: a need, or the total of its tier."""

    cells: tuple[str, str, str, str]
    is_total: bool = False
    is_over: bool = False


_NEEDS_HEADER = ("tier", "what", "bytes", "note")


def tier_totals(needs: Sequence[Need]) -> dict[str, int]:
    """Return the bytes needed per tier: device, host, disk, then other tiers in order of appearance."""
    tiers = [tier for tier in _TIER_ORDER if any(need.tier == tier for need in needs)]
    tiers += [need.tier for need in needs if need.tier not in tiers]
    return {tier: sum(need.num_bytes for need in needs if need.tier == tier) for tier in dict.fromkeys(tiers)}


def needs_table(
    needs: Sequence[Need], capacities: Mapping[str, int | None] | None = None, *, title: str | None = None
) -> Table:
    """Return "who needs what" for a terminal.

    Args:
        needs: One line each; the order within a tier is kept.
        capacities: Bytes that each tier offers; a tier left out, or None, is not judged.
        title: Shown above the table.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    for name in _NEEDS_HEADER:
        table.add_column(name, justify="right" if name == "bytes" else "left", no_wrap=name != "note")
    for line in _needs_lines(needs, capacities or {}):
        style = "bold red" if line.is_over else "bold" if line.is_total else ""
        # Text, not str: names of models and files may hold what rich takes for markup.
        table.add_row(*(Text(cell, style=style) for cell in line.cells), end_section=line.is_total)
    return table


def needs_text(
    needs: Sequence[Need], capacities: Mapping[str, int | None] | None = None, *, title: str | None = None
) -> str:
    """Return "who needs what" as plain text; see ``needs_table``."""
    rows = [line.cells for line in _needs_lines(needs, capacities or {})]
    return _titled(title, text_columns([_NEEDS_HEADER, *rows], right_aligned=("bytes",)))


def values_table(values: Mapping[str, str] | Sequence[tuple[str, str]], *, title: str | None = None) -> Table:
    """Return named values (a run's header or summary) for a terminal."""
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False, expand=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _pairs(values):
        table.add_row(Text(name), Text(value))
    return table


def values_text(values: Mapping[str, str] | Sequence[tuple[str, str]], *, title: str | None = None) -> str:
    """Return named values as plain text: one line each, values aligned."""
    return _titled(title, text_columns(_pairs(values)))


def text_columns(rows: Sequence[Sequence[str]], *, right_aligned: Sequence[str] = ()) -> str:
    """Return rows as lines whose columns are aligned and two blanks apart.

    Args:
        rows: Cells; every row has the same number of them. A line break within a cell is shown as a blank.
        right_aligned: Columns to align right, by the name in the first row.
    """
    if not rows:
        return ""
    flat = [[" ".join(cell.splitlines()) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in flat) for column in range(len(flat[0]))]
    right = [name in right_aligned for name in flat[0]]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if on_right else cell.ljust(width)
            for cell, width, on_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in flat
    )


def _needs_lines(needs: Sequence[Need], capacities: Mapping[str, int | None]) -> list[_Line]:
    """Return the lines of "who needs what": per tier its needs, then its total against its capacity."""
    lines = []
    for tier, total_bytes in tier_totals(needs).items():
        own = [need for need in needs if need.tier == tier]
        lines += [_Line((tier, need.kind, format_bytes(need.num_bytes), need.note)) for need in own]
        capacity_bytes = capacities.get(tier)
        lines.append(
            _Line(
                cells=(tier, "total", format_bytes(total_bytes), _verdict(total_bytes, capacity_bytes)),
                is_total=True,
                is_over=capacity_bytes is not None and total_bytes > capacity_bytes,
            )
        )
    return lines


def _verdict(total_bytes: int, capacity_bytes: int | None) -> str:
    """Return how a tier's total compares with what there is."""
    if capacity_bytes is None:
        return ""
    spare_bytes = capacity_bytes - total_bytes
    rest = f"{format_bytes(spare_bytes)} spare" if spare_bytes >= 0 else f"{format_bytes(-spare_bytes)} TOO MANY"
    return f"of {format_bytes(capacity_bytes)}: {rest}"


def _pairs(values: Mapping[str, str] | Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return named values as pairs, whichever form they came in."""
    return list(values.items()) if isinstance(values, Mapping) else list(values)


def _titled(title: str | None, body: str) -> str:
    """Return ``body`` under its title, if it has one."""
    return f"{title}\n{body}" if title else body
