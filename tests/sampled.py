"""Long lists of cases: a sample in ``make test``, all of them in ``make test-full``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], every: int) -> list[Any]:
    """The cases; those between each ``every`` are marked ``full``."""
    listed = [case if isinstance(case, tuple) else (case,) for case in cases]
    full = [pytest.param(*case, marks=pytest.mark.full) for case in listed]
    return [pytest.param(*case) if number % every == 0 else full[number] for number, case in enumerate(listed)]
