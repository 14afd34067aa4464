"""Bytes as people write and read them: ``"6GiB"`` to an integer and back."""

from __future__ import annotations

import re
from decimal import Decimal

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_DECIMAL = ("B", "KB", "MB", "GB", "TB")
_BYTES_PER_UNIT: dict[str, int] = {
    **{unit.lower(): 1000**power for power, unit in enumerate(_DECIMAL)},
    **{unit.lower(): 1024**power for power, unit in enumerate(_BINARY)},
}
_AMOUNT = re.compile(r"\s*([+-]?\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)
_MAX_BYTES = 2**63 - 1  # what a signed 64-bit size holds, so that torch and the system calls can take it
_UNITS_TEXT = "B, KB, MB, GB, TB, KiB, MiB, GiB or TiB"


def parse_bytes(text: str | int) -> int:
    """Reads an amount of memory.

    Args:
        text: A number with a unit (``"6GiB"``, ``"1.5 GB"``; upper and lower case are the same; KB is 1000 bytes and
            KiB 1024), or a plain whole number of bytes.

    Returns:
        The amount in bytes, at least 1. A fraction of a byte is dropped.

    Raises:
        ValueError: If it is not such an amount; the message says what is allowed.
    """
    if isinstance(text, bool) or not isinstance(text, str | int):
        raise ValueError(f'must be an amount of memory such as "6GiB" (units {_UNITS_TEXT})')
    amount_bytes = text if isinstance(text, int) else _parse_text(text)
    if amount_bytes < 1:
        raise ValueError("must be at least one byte")
    if amount_bytes > _MAX_BYTES:
        raise ValueError("is more bytes than a 64-bit machine can address")
    return amount_bytes


def _parse_text(text: str) -> int:
    """Bytes of a text with a unit; may be zero or negative."""
    match = _AMOUNT.fullmatch(text) if len(text) <= 64 else None
    if match is None:
        raise ValueError(f'must be a number with a unit such as "6GiB" (units {_UNITS_TEXT})')
    number, unit = match.groups()
    if not unit:
        raise ValueError(f'needs a unit ({_UNITS_TEXT}): write "{number}MiB" or "{number}B"')
    bytes_per_unit = _BYTES_PER_UNIT.get(unit.lower())
    if bytes_per_unit is None:
        raise ValueError(f'has the unknown unit "{unit}"{_suggest_unit(number, unit)}; units are {_UNITS_TEXT}')
    return int(Decimal(number) * bytes_per_unit)


def _suggest_unit(number: str, unit: str) -> str:
    """The likely unit for a bare prefix: ``6G`` -> ``6GiB``."""
    prefix = unit[0].upper()
    return f' (did you mean "{number}{prefix}iB"?)' if prefix in "KMGT" else ""


def format_bytes(num_bytes: int | float) -> str:
    """An amount of memory for people, to three significant places.

    Args:
        num_bytes: The amount in bytes; may be negative (a difference).

    Returns:
        For example ``"512 B"``, ``"64.0 MiB"``, ``"5.59 GiB"``. Rounded: use ``exact_bytes`` where it is read back.
    """
    amount = abs(float(num_bytes))
    sign = "-" if num_bytes < 0 else ""
    if amount < 1024:
        return f"{sign}{amount:.0f} B"
    power = 0
    # 1023.5 and not 1024: 1023.9 KiB would otherwise be shown as "1024 KiB".
    while amount >= 1023.5 and power < len(_BINARY) - 1:
        amount /= 1024
        power += 1
    places = 2 if amount < 9.995 else 1 if amount < 99.95 else 0
    return f"{sign}{amount:.{places}f} {_BINARY[power]}"


def exact_bytes(num_bytes: int) -> str:
    """The shortest text that ``parse_bytes`` reads back as exactly this amount.

    Args:
        num_bytes: The amount in bytes, at least 1.

    Returns:
        For example ``"6GiB"``, ``"1500MB"`` or ``"1234567B"``.
    """
    texts = [
        f"{num_bytes // scale}{unit}"
        for units, base in ((_BINARY, 1024), (_DECIMAL, 1000))
        for power, unit in enumerate(units)
        if num_bytes % (scale := base**power) == 0
    ]
    return min(texts, key=len)
