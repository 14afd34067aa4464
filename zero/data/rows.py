"""What readers of data files give: rows, each with where it stands and where the next one begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# Where to go on reading a source: a value of JSON, which only the source's own reader understands.
Place = Any


class Row(NamedTuple):
    """One row of a file: where it stands (``file:line``), its columns, and where the next one begins."""

    where: str
    columns: Mapping[str, Any]
    after: Place = None


# Given the names of all columns, those worth reading.
ChooseColumns = Callable[[Sequence[str]], Sequence[str]]
