"""Every file of two ranks' checkpoint, damaged in every way: none is loaded silently, the one before it is."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests import checkpoint_helpers as helpers
from tests.checkpoint_helpers import differences
from tests.checkpoint_ranks_case import files_of, make, place, train, whole_state
from tests.ranks import run_ranks
from zero.checkpoint import CheckpointError, find_latest, verify

logger = logging.getLogger("tests")
OLD, NEW = "step-00000001", "step-00000002"


CORRUPTIONS: dict[str, Callable[[bytes], bytes | None]] = {
    **helpers.CORRUPTIONS,
    **{
        f"bit {bit} at {position}": helpers.flip(position, bit)
        for bit, position in enumerate((0.0, 0.3, 0.55, 0.8, 1.0))
    },
}


def save_two(folder: str, seed: int) -> dict[str, Any]:
    """Two checkpoints of one run; returns the state of the first."""
    engine = make(seed=seed)
    train(engine, 1)
    state = whole_state(engine)
    engine.save_checkpoint(folder)
    train(engine, 1)
    engine.save_checkpoint(folder)
    engine.close()
    return state


def _spoilt(base: Path, step: int) -> Iterator[tuple[str, str, bytes | None]]:
    """File, how it is spoilt, and what it then holds; every ``step``-th."""
    cases: list[tuple[str, str, bytes | None]] = []
    names = files_of(base / "mine" / NEW)
    for name in names:
        good = (base / "mine" / NEW / name).read_bytes()
        spoilt = {how: corrupt(good) for how, corrupt in CORRUPTIONS.items()}
        spoilt["stale"] = _read(base / "mine" / OLD / name)
        spoilt["another run's"] = _read(base / "other" / NEW / name)
        spoilt["another rank's"] = _read(base / "mine" / NEW / _of_other_rank(name))
        cases += [(name, how, data) for how, data in spoilt.items() if data != good]
    yield from cases[::step]


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _of_other_rank(name: str) -> str:
    """The same file of the other rank; of what only one rank has, a file of the other."""
    for mine, theirs in (("00000", "00001"), ("00001", "00000")):
        for form in ("rank-{}.", "tensors-r{}-"):
            if name.startswith(form.format(mine)):
                return name.replace(form.format(mine), form.format(theirs), 1)
    return "rank-00001.json"


def load_damaged(base: str, step: int) -> tuple[int, Any]:
    """Both ranks load from the folder after each damage; returns how many were tried, and the state each time."""
    folder, rank = Path(base) / "mine", place()[0]
    engine = make(seed=3)
    expected: dict[str, Any] | None = None
    count = 0
    cases = list(_spoilt(Path(base), step))
    dist.barrier()  # before the first file is touched
    for name, how, data in cases:
        path = folder / NEW / name
        if rank == 0:
            path.rename(path.with_suffix(".good"))
            if data is not None:
                path.write_bytes(data)
        dist.barrier()
        loaded = engine.load_checkpoint(folder)
        where = f"{name}: {how}: {loaded.warnings}"
        assert loaded.path.name == OLD, where
        assert name in loaded.warnings[0], where
        state = _own_bytes(engine)
        expected = expected or state
        assert differences(expected, state) == [], where
        with pytest.raises(CheckpointError) as refused:
            engine.load_checkpoint(folder / NEW)
        assert name in str(refused.value), where
        dist.barrier()
        if rank == 0:
            path.unlink(missing_ok=True)
            path.with_suffix(".good").rename(path)
        dist.barrier()
        count += 1
    newest = engine.load_checkpoint(folder)
    assert newest.path.name == NEW
    engine.load_checkpoint(folder / OLD)
    assert differences(expected, _own_bytes(engine)) == []
    return count, whole_state(engine)


def _own_bytes(engine: Any) -> dict[str, Any]:
    """What this rank holds of values and states."""
    segments = [(c.index, s.start, s) for c in engine.manager.chunks for s in c.segments]
    return {
        f"{index} {start} {key}": buffer.clone()
        for index, start, segment in segments
        for key, buffer in {"values": segment.values, **segment.companions}.items()
    }


@pytest.mark.parametrize("step", [19, pytest.param(1, marks=pytest.mark.full)])
def test_every_file_in_every_way(tmp_path: Path, step: int) -> None:
    """Both ranks fall back together, and the file is named to both."""
    before = run_ranks(save_two, 2, str(tmp_path / "mine"), 0)[0]
    run_ranks(save_two, 2, str(tmp_path / "other"), 1)
    names = files_of(tmp_path / "mine" / NEW)
    assert {"manifest.json", "state.json", "rank-00000.json", "rank-00001.json"} <= set(names)
    results = run_ranks(load_damaged, 2, str(tmp_path), step, timeout_s=600)
    for count, state in results:
        assert differences(before, state) == []
        assert count >= (150 if step == 1 else 6)
    logger.warning("%d damages to %d files of two ranks' checkpoint, none loaded", results[0][0], len(names))


def load_twice(mine: str, other: str) -> str:
    """Rank 1 sees other contents under the same path: a folder that is not shared."""
    engine = make()
    rank = place()[0]
    if rank == 1:
        import zero.checkpoint.loading as loading

        read = loading.read_manifest
        loading.read_manifest = lambda path: read(Path(other) / NEW)
        loading.file_problems = lambda *_: []
    try:
        engine.load_checkpoint(mine)
    except CheckpointError as error:
        return str(error)
    return ""


def test_ranks_that_see_different_folders(tmp_path: Path) -> None:
    run_ranks(save_two, 2, str(tmp_path / "mine"), 0)
    run_ranks(save_two, 2, str(tmp_path / "other"), 1)
    for text in run_ranks(load_twice, 2, str(tmp_path / "mine"), str(tmp_path / "other")):
        assert "is not the same for all ranks: rank 1 sees other contents than rank 0" in text


def test_a_missing_rank_is_seen(tmp_path: Path) -> None:
    """All files of a rank gone: named, and the one before is taken, by a process on its own too."""
    run_ranks(save_two, 2, str(tmp_path), 0)
    for path in (tmp_path / NEW).glob("*r*00001*"):
        path.unlink()
    problems = verify(tmp_path / NEW)
    assert any("rank-00001.json" in problem for problem in problems)
    assert any("tensors-r00001-00000" in problem for problem in problems)
    assert find_latest(tmp_path) == tmp_path / OLD
    shutil.rmtree(tmp_path / OLD)
    with pytest.raises(CheckpointError, match="holds no good checkpoint"):
        make().load_checkpoint(tmp_path)
