"""A save stopped at any operation, or refused by the file system, leaves the last good checkpoint loadable."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zero
from tests.checkpoint_helpers import (
    CountingFiles,
    CrashingFiles,
    FailingFiles,
    PowerLossFiles,
    SimulatedCrash,
)
from zero.checkpoint import CheckpointError, contents, files, find_latest, verify
from zero.checkpoint.files import Files

logger = logging.getLogger("tests")


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(contents, "MAX_FILE_BYTES", 300)  # several tensor files
    yield
    torch.set_num_threads(before)


def _engine() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.1), nn.BatchNorm1d(7), nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = {"device": {"type": "cpu"}, "optimizer": {"kernel": "torch"}}
    return zero.initialize(model, optimizer, config=config)[0]


def _step(engine: Any) -> None:
    engine.zero_grad()
    engine.backward(engine(torch.randn(4, 5)).square().mean())
    engine.step()


def _state(engine: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.module.state_dict().items()}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class Scene:
    """A folder before a save, the save, and the states that may stand after it was interrupted."""

    def __init__(self, base: Path, name: str) -> None:
        self.base, self.name = base, name
        self.engine = _engine()
        self.start = base / f"{name}-start"
        self.allowed: list[dict[str, torch.Tensor] | None] = [None]
        self.options: dict[str, Any] = {}
        getattr(self, name)()
        self.allowed.append(_state(self.engine))
        self.count = 0

    def _save(self) -> None:
        _step(self.engine)
        self.engine.save_checkpoint(self.start)
        self.allowed = [_state(self.engine)]

    def first(self) -> None:
        """No folder yet: nothing, or the new one."""

    def second(self) -> None:
        """A checkpoint stands."""
        self._save()
        _step(self.engine)

    def limited(self) -> None:
        """Two stand, one may stay: the older ones go afterwards."""
        self._save()
        self._save()
        _step(self.engine)
        self.options = {"save_total_limit": 1}

    def again(self) -> None:
        """The checkpoint of the same step is replaced, and it is the only one."""
        self._save()
        with self.engine.gathered_parameters() as module:
            module[0].weight.data += 1

    def leftovers(self) -> None:
        """An interrupted save left a folder, and a replaced checkpoint had just been moved aside."""
        self._save()
        (self.start / (".tmp-" + "0" * 32) / "model").mkdir(parents=True)
        (self.start / (".tmp-" + "0" * 32) / "model" / "config.json").write_text("{}")
        (self.start / "step-00000001").rename(self.start / (".old-step-00000001-" + "a" * 32))
        _step(self.engine)

    def folder(self) -> Path:
        """A fresh copy of the folder."""
        self.count += 1
        copy = self.base / f"{self.name}-{self.count}"
        if self.start.is_dir():
            shutil.copytree(self.start, copy, symlinks=True)
        return copy

    def save(self, folder: Path, operations: Files) -> None:
        """The save, on other file operations."""
        with files.replaced(operations):
            self.engine.save_checkpoint(folder, **self.options)

    def check(self, folder: Path, where: str) -> None:
        """What stands is one of the allowed states, whole; and the next save works and clears up."""
        found = find_latest(folder)
        if found is None:
            assert None in self.allowed, where
        else:
            assert verify(found) == [], where
            loaded = _engine()
            loaded.load_checkpoint(folder)
            states = [state for state in self.allowed if state is not None]
            assert any(_same(_state(loaded), state) for state in states), where
            loaded.close()
        self.save(folder, CountingFiles())
        assert find_latest(folder) == folder / f"step-{self.engine.num_steps:08d}", where
        assert not [p.name for p in folder.iterdir() if p.name.startswith(".")], where
        shutil.rmtree(folder)


def _scenes(*short: str) -> list[Any]:
    """All scenes; only those named in the short run."""
    names = ("first", "second", "limited", "again", "leftovers")
    return [pytest.param(name, marks=() if name in short else pytest.mark.full) for name in names]


def _interrupt(scene: Scene, make: Callable[[int], CrashingFiles], at: int) -> None:
    folder, operations = scene.folder(), make(at)
    with pytest.raises(SimulatedCrash):
        scene.save(folder, operations)
    if isinstance(operations, PowerLossFiles):
        operations.lose()
    scene.check(folder, f"{scene.name}: {type(operations).__name__} at {at}, after {operations.log[-1:]}")


def _operations(scene: Scene) -> list[tuple[str, Path]]:
    counting, folder = CountingFiles(), scene.folder()
    scene.save(folder, counting)
    shutil.rmtree(folder)
    return counting.log


@pytest.mark.parametrize("name", _scenes("again"))
def test_killed_at_every_operation(tmp_path: Path, name: str, record_property: Any) -> None:
    """Killed before each operation, and in the middle of each write."""
    scene = Scene(tmp_path, name)
    log = _operations(scene)
    for at in range(len(log)):
        _interrupt(scene, CrashingFiles, at)
        if log[at][0] == "write":
            _interrupt(scene, lambda at: CrashingFiles(at, half=True), at)
    points = len(log) + sum(operation == "write" for operation, _ in log)
    record_property("kill_points", points)
    assert {"create", "write", "sync", "sync_directory", "rename", "make_directory"} <= {name for name, _ in log}
    assert points > 40


@pytest.mark.parametrize("name", _scenes("again"))
def test_power_lost_at_every_operation(tmp_path: Path, name: str, record_property: Any) -> None:
    """The machine stops at each operation: what was not synced, contents and names, is gone."""
    scene = Scene(tmp_path, name)
    num_points = len(_operations(scene))
    for at in range(num_points):
        _interrupt(scene, PowerLossFiles, at)
    record_property("power_losses", num_points)


def test_the_power_loss_can_see_a_missing_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would fail if the save left out syncing: files, their folder, or the folder's parent."""
    scene = Scene(tmp_path, "again")
    for missing in ("sync", "sync_directory"):
        found = 0
        for at in range(len(_operations(scene))):
            folder, operations = scene.folder(), PowerLossFiles(at)
            monkeypatch.setattr(operations, missing, lambda *_: None)
            with contextlib.suppress(SimulatedCrash):
                scene.save(folder, operations)
            operations.lose()
            try:
                scene.check(folder, "")
            except (AssertionError, OSError):
                found += 1
        assert found > 0, missing


class KillingFiles(CrashingFiles):
    """A real SIGKILL of this process at one operation."""

    def _begin(self, name: str, path: Path) -> None:
        if len(self.log) == self._at:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._begin(name, path)


def test_killed_for_real(tmp_path: Path) -> None:
    """SIGKILL to a child at every seventh operation of a save that also removes old checkpoints."""
    scene = Scene(tmp_path, "limited")
    for at in range(0, len(_operations(scene)), 7):
        folder = scene.folder()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                scene.save(folder, KillingFiles(at))
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        scene.check(folder, f"killed at {at}")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("again", errno.ENOSPC),
        pytest.param("again", errno.EIO, marks=pytest.mark.full),
        pytest.param("second", errno.ENOSPC, marks=pytest.mark.full),
    ],
)
def test_every_operation_may_fail(tmp_path: Path, name: str, code: int) -> None:
    """A full disk, or a broken one: one clear error, and the old checkpoint stands; or the new one, if it was done."""
    scene = Scene(tmp_path, name)
    log = _operations(scene)
    num_refused = 0
    for at in range(len(log)):
        folder = scene.folder()
        text = ""
        try:
            scene.save(folder, FailingFiles(at, code))
        except CheckpointError as error:
            text = str(error)
        if text:
            num_refused += 1
            assert "could not be written" in text
            assert ("No space left" if code == errno.ENOSPC else "Input/output") in text
            assert "checkpoints written before still stand" in text
            assert not [p for p in folder.iterdir() if p.name.startswith(".tmp-")]
        scene.check(folder, f"{name}: error {code} at {at}: {log[at]}")
    assert num_refused > 0.8 * len([entry for entry in log if not entry[0].startswith("remove")])


def test_room_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room nothing is written; the message says how much is needed and what to do."""
    engine = _engine()
    engine.save_checkpoint(tmp_path)
    _step(engine)
    monkeypatch.setattr(Files, "free_bytes", lambda *_: 1000)
    with pytest.raises(CheckpointError, match=r"needs 1\.\d+ MiB in .*1000 B are free.*older checkpoints stand"):
        engine.save_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000"]


def test_a_save_that_does_not_read_back_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is kept only once the new checkpoint has been verified."""
    engine = _engine()
    engine.save_checkpoint(tmp_path)
    _step(engine)
    write = Files.write

    def flips(self: Files, handle: Any, data: memoryview) -> None:
        spoiled = bytearray(data)
        spoiled[-1] ^= 1
        write(self, handle, memoryview(spoiled))

    monkeypatch.setattr(Files, "write", flips)
    with pytest.raises(CheckpointError, match="what is read back differs"):
        engine.save_checkpoint(tmp_path, save_total_limit=1)
    assert find_latest(tmp_path) == tmp_path / "step-00000000"
