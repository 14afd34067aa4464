"""Which files make up a metaseq checkpoint: tensor-parallel parts, and the data-parallel shards of each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from zero.errors import UserError

# checkpoint_last-model_part-0-shard12.pt, reshard-model_part-3.pt, reshard.pt
_NAME = re.compile(r"(?P<stem>.+?)(?:-model_part-(?P<part>\d+))?(?:-shard(?P<shard>\d+))?\.pt")
_MOST_NAMED = 5


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint.

    Attributes:
        name: what their names begin with, such as ``checkpoint_last``.
        parts: of each tensor-parallel part the files of its shards, both in order.
    """

    name: str
    parts: list[list[Path]]


def find_files(source: Path, name: str | None = None) -> CheckpointFiles:
    """The files of a checkpoint.

    Args:
        source: their folder, or the only file.
        name: what their names begin with; None where the folder holds one checkpoint.

    Raises:
        UserError: there are none, several checkpoints, or files of this one are missing.
    """
    if source.is_file():
        return CheckpointFiles(source.stem, [[source]])
    if not source.is_dir():
        raise UserError(f"{source} is neither a folder nor a file")
    grids: dict[str, dict[tuple[int, int], Path]] = {}
    for path in sorted(source.glob("*.pt")):
        match = _NAME.fullmatch(path.name)
        if match:
            place = (int(match["part"] or 0), int(match["shard"] or 0))
            other = grids.setdefault(match["stem"], {}).setdefault(place, path)
            if other != path:
                raise UserError(f"{other.name} and {path.name} are the same piece of one checkpoint; keep one")
    if name is None and len(grids) > 1:
        raise UserError(f"{source} holds several checkpoints: {', '.join(sorted(grids))}; choose one with --name")
    grid = grids.get(name, {}) if name is not None else next(iter(grids.values()), {})
    if not grid:
        raise UserError(
            f"{source} holds no {'checkpoint' if name is None else name + '*.pt'}; metaseq's files are called "
            "checkpoint_last-model_part-0-shard0.pt or reshard-model_part-0.pt"
        )
    return CheckpointFiles(name or next(iter(grids)), _complete(source, name or next(iter(grids)), grid))


def _complete(source: Path, name: str, grid: dict[tuple[int, int], Path]) -> list[list[Path]]:
    num_parts = max(part for part, _ in grid) + 1
    num_shards = max(shard for _, shard in grid) + 1
    if num_parts * num_shards > 2 * len(grid) + 64:  # a stray number in a name, not so many lost files
        raise UserError(
            f"{source}: the names of {name}*.pt count {num_parts} parts x {num_shards} shards; {len(grid)} are there"
        )
    missing = [
        f"part {part} shard {shard}"
        for part in range(num_parts)
        for shard in range(num_shards)
        if (part, shard) not in grid
    ]
    if missing:
        more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
        raise UserError(
            f"{source}: {name} has {num_parts} parts x {num_shards} shards, but {', '.join(missing[:_MOST_NAMED])}{more} "
            "of them are not there; download them again"
        )
    return [[grid[part, shard] for shard in range(num_shards)] for part in range(num_parts)]
