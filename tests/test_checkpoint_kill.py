"""``kill -9`` at every operation of a save, of one process and of either or both of two: the run always goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint_helpers import CountingFiles, differences
from tests.checkpoint_ranks_case import make, place, train, whole_state
from tests.ranks import run_ranks, try_ranks
from tests.sampled import sampled
from zero.checkpoint import files, find_latest, verify
from zero.checkpoint.files import Files

logger = logging.getLogger("tests")


class KillingFiles(CountingFiles):
    """Kills this process at one operation; in the middle of it, if it is a write.

    Args:
        at: index of the operation.
        half: half of the write is done before.
    """

    def __init__(self, at: int, half: bool = False) -> None:
        super().__init__()
        self._at, self._half = at, half

    def _begin(self, name: str, path: Path) -> None:
        if len(self.log) == self._at and not (self._half and name == "write"):
            os.kill(os.getpid(), signal.SIGKILL)
        super()._begin(name, path)

    def write(self, handle: Any, data: memoryview) -> None:
        if self._half and len(self.log) == self._at:
            Files.write(self, handle, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(handle, data)


def prepare(folder: str) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """A folder with one checkpoint, the state in it, that of the save which will be killed, and what a save does."""
    engine = make()
    train(engine, 1)
    engine.save_checkpoint(Path(folder) / "start")
    before = whole_state(engine)
    train(engine, 1)
    after = whole_state(engine)
    counting = CountingFiles()
    with files.replaced(counting):
        engine.save_checkpoint(Path(folder) / "other", save_total_limit=1)
    engine.close()
    return before, after, [name for name, _ in counting.log]


def save_and_die(folder: str, ranks: list[int], at: list[int], half: bool, asynchronous: bool) -> None:
    """Goes on from the folder, and is killed in the next save."""
    engine = make()
    engine.load_checkpoint(folder)
    train(engine, 1)
    rank = place()[0]
    operations: Files = KillingFiles(at[rank], half) if rank in ranks else CountingFiles()
    with files.replaced(operations), contextlib.suppress(Exception):
        engine.save_checkpoint(folder, save_total_limit=1, asynchronous=asynchronous)
        engine.synchronize()
    os._exit(1)


def go_on(folders: list[str]) -> list[tuple[str, dict[str, Any], bool]]:
    """Resumes in each folder, and saves there again; which checkpoint it was, and whether the folder is clean."""
    results = []
    for folder in folders:
        engine = make(seed=7)
        loaded = engine.load_checkpoint(folder)
        state = whole_state(engine)
        train(engine, 1)
        engine.save_checkpoint(folder, save_total_limit=1)
        newest = find_latest(Path(folder))
        clean = not any(path.name.startswith(".") for path in Path(folder).iterdir())
        good = newest is not None and newest.name == f"step-{engine.num_steps:08d}" and not verify(newest)
        results.append((loaded.path.name, state, clean and good))
        engine.close()
    return results


def _check(folders: list[Path], size: int, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Each folder goes on from one of the two checkpoints, whole."""
    allowed = {"step-00000001": before, "step-00000002": after}
    results = run_ranks(go_on, size, [str(folder) for folder in folders], own_group=size > 1, timeout_s=600)
    for rank in results:
        for folder, (name, state, good) in zip(folders, rank, strict=True):
            assert differences(allowed[name], state) == [], folder
            assert good, folder


def _alone(base: Path, asynchronous: bool, step: int) -> list[Path]:
    """One process killed at every ``step``-th operation, and in the middle of writes."""
    operations = run_ranks(prepare, 1, str(base), own_group=False)[0][2]
    folders = []
    for at in range(0, len(operations), step):
        for half in (False, True) if operations[at] == "write" else (False,):
            folder = _copy(base, f"{at}-{half}")
            arguments = (str(folder), [0], [at], half, asynchronous)
            (ended,) = try_ranks(save_and_die, 1, *arguments, timeout_s=60, own_group=False)
            assert ended.exit_code == -signal.SIGKILL, at
            folders.append(folder)
    return folders


def _copy(base: Path, name: str) -> Path:
    folder = base / f"killed-{name}"
    shutil.copytree(base / "start", folder)
    return folder


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.full), True])
@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.full)])
def test_one_process_is_killed(tmp_path: Path, step: int, asynchronous: bool) -> None:
    folders = _alone(tmp_path, asynchronous, step)
    before, after, _ = run_ranks(prepare, 1, str(tmp_path / "again"), own_group=False)[0]
    _check(folders, 1, before, after)
    logger.warning("one process, asynchronous=%s: %d kill points", asynchronous, len(folders))
    assert len(folders) >= (60 if step == 1 else 5)


@pytest.mark.parametrize("victims", sampled([[0], [1], [0, 1]], 2), ids=str)
@pytest.mark.parametrize("step", [20, pytest.param(1, marks=pytest.mark.full)])
def test_ranks_are_killed(tmp_path: Path, step: int, victims: list[int]) -> None:
    """One of two dies, or both, at the same place: nobody hangs, and both go on from a complete checkpoint."""
    prepared = run_ranks(prepare, 2, str(tmp_path))
    (before, after, first), (_, _, second) = prepared
    operations = [first, second]
    longest = max(len(operations[victim]) for victim in victims)
    folders, halves = [], 0
    for at in range(3 if step > 1 else 0, longest, step):
        places = [min(at, len(names) - 1) for names in operations]
        half = at % 2 == 1 and any(operations[victim][places[victim]] == "write" for victim in victims)
        halves += half
        folder = _copy(tmp_path, str(at))
        arguments = (str(folder), victims, places, half, at % 3 == 0)
        ended = try_ranks(save_and_die, 2, *arguments, timeout_s=60, group_timeout_s=20)
        assert any(ended[victim].exit_code == -signal.SIGKILL for victim in victims), at
        assert all("hung" not in (end.problem or "") for end in ended), at
        folders.append(folder)
    _check(folders, 2, before, after)
    logger.warning("two processes, %s killed: %d kill points, %d within a write", victims, len(folders), halves)
    assert len(folders) >= (40 if step == 1 else 2)
