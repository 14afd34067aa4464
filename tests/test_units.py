"""Amounts of memory as texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemini.units import exact_bytes, format_bytes, parse_bytes


@given(st.integers(1, 2**62))
def test_exact_bytes_round_trip(num_bytes: int) -> None:
    assert parse_bytes(exact_bytes(num_bytes)) == num_bytes


@given(st.integers(-(2**60), 2**60))
def test_format_bytes_is_near(num_bytes: int) -> None:
    text = format_bytes(abs(num_bytes))
    near = parse_bytes(text) if num_bytes else 0
    assert abs(near - abs(num_bytes)) <= 0.006 * abs(num_bytes)


def test_units() -> None:
    assert parse_bytes("6GiB") == 6 * 2**30
    assert parse_bytes(" 1.5 gb ") == 1_500_000_000
    assert parse_bytes("10kb") == 10_000
    assert parse_bytes(7) == 7
    assert [format_bytes(n) for n in (0, 512, 2**20, 6.4e7, 6 * 10**9, -(2**31))] == [
        "0 B",
        "512 B",
        "1.00 MiB",
        "61.0 MiB",
        "5.59 GiB",
        "-2.00 GiB",
    ]
    assert [exact_bytes(n) for n in (2**33, 1500 * 10**6, 1234567)] == ["8GiB", "1500MB", "1234567B"]
    for wrong in ("", "GiB", "1 2GiB", "1e3MiB", "٣GiB", True, None, 1.5, -1, 0, "0.1B", 2**70):
        with pytest.raises(ValueError, match="must|needs|unit|more"):
            parse_bytes(wrong)  # type: ignore[arg-type]
