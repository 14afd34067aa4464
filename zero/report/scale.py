"""Bytes and times as people read them, where several figures share one unit."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def byte_unit(num_bytes: float) -> tuple[int, str]:
    """Return (bytes per unit, its name): the largest binary unit in which ``num_bytes`` is at least 1."""
    exponent = 0
    while exponent < len(_UNITS) - 1 and num_bytes >= 1024 ** (exponent + 1):
        exponent += 1
    return 1024**exponent, _UNITS[exponent]


def format_used_of(used_bytes: int, capacity_bytes: int | None) -> str:
    """Return ``3.1/4.0 MiB``: both in the unit of the capacity. Without a capacity: ``3.1 MiB``."""
    per_unit, unit = byte_unit(capacity_bytes or used_bytes)
    digits = 0 if per_unit == 1 else 1
    used = f"{used_bytes / per_unit:.{digits}f}"
    return f"{used}/{capacity_bytes / per_unit:.{digits}f} {unit}" if capacity_bytes else f"{used} {unit}"


def format_duration(duration_s: float) -> str:
    """Return ``1:02:03`` (hours, minutes, seconds), with the days in front where there are any: ``2d 1:02:03``."""
    seconds = max(0, round(duration_s))
    days, seconds = divmod(seconds, 86400)
    clock = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return f"{days}d {clock}" if days else clock
