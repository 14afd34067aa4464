"""A save in the background stores the state of the moment it was asked for, whatever happens to the state meanwhile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint_helpers import CountingFiles, FailingFiles, Setting, Trainer, batches, differences, everything
from zero.checkpoint import CheckpointError, background, contents, files, find_latest, tensorfile, verify

logger = logging.getLogger("tests")
BATCHES = batches(6)


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "MAX_FILE_BYTES", 60_000)


class PausingFiles(CountingFiles):
    """Waits in one write, long enough for the other thread to do harm if it is not held back.

    Attributes:
        reached: the write has begun.
        go_on: need not wait any longer.
    """

    def __init__(self, at: int, pause_s: float = 0.15) -> None:
        super().__init__()
        self._at, self._pause_s = at, pause_s
        self._num_writes = 0
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def write(self, handle: Any, data: memoryview) -> None:
        if self._num_writes == self._at:
            self.reached.set()
            self.go_on.wait(self._pause_s)
        self._num_writes += 1
        super().write(handle, data)


def _train(trainer: Trainer) -> None:
    trainer.run(BATCHES[2:3])


def _write_whole_parameters(trainer: Trainer) -> None:
    with trainer.engine.gathered_parameters() as module, torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)


def _write_in_place(trainer: Trainer) -> None:
    with torch.no_grad():
        for parameter in trainer.engine.module.parameters():
            parameter.mul_(0.5)
    trainer.engine.manager.settle_idle_reads()


def _write_states(trainer: Trainer) -> None:
    for state in trainer.engine.optimizer.state.values():
        state["exp_avg"].add_(1)
        state["step"] += 5
    trainer.engine.optimizer.settle()


def _forget_states(trainer: Trainer) -> None:
    trainer.engine.optimizer.state.clear()
    trainer.engine.optimizer.settle()


def _move(trainer: Trainer) -> None:
    trainer.engine._planner.offload_everything()
    trainer.run(BATCHES[2:3])


def _everything_else(trainer: Trainer) -> None:
    trainer.engine.module.kept += 1
    trainer.engine.optimizer.param_groups[0]["lr"] = 3.0
    trainer.scheduler.last_epoch += 7
    if trainer.engine.scaler.enabled:
        trainer.engine.scaler.scale = 2.0
    trainer.engine.num_steps += 4
    torch.manual_seed(1234)


MUTATIONS: list[Callable[[Trainer], None]] = [
    _train, _write_whole_parameters, _write_in_place, _write_states, _forget_states, _move, _everything_else,
]  # fmt: skip


def _prepare(model: Any) -> None:
    model.register_buffer("kept", torch.zeros(4))


PLACEMENTS: dict[str, dict[str, Any]] = {
    "host": {"policy": "cpu", "dtype": "bf16"},
    "device": {"policy": "cuda"},
    "mixed": {"policy": "static", "memory": {"resident_parameters": 0.4, "resident_optimizer": 0.6}, "dtype": "bf16"},
    "window": {"policy": "cpu", "accumulation": 3},
    "native": {"policy": "cpu", "dtype": "bf16", "kernel": "auto"},
}

_SHORT = ("device", "window")


def _setting(placement: str) -> Setting:
    return Setting("llama", prepare=_prepare, **PLACEMENTS[placement])


def _num_writes(trainer: Trainer, folder: Path) -> int:
    counting = PausingFiles(-1)
    with files.replaced(counting):
        trainer.save(folder)
    return counting._num_writes


def _interfere(
    trainer: Trainer, folder: Path, at: int, mutate: Callable[[Trainer], None], pause_s: float = 0.1, gate: bool = True
) -> dict[str, Any]:
    """Saves in the background and mutates while write number ``at`` is under way; returns the state before."""
    before = everything(trainer.engine)
    pausing = PausingFiles(at, pause_s)
    with files.replaced(pausing):
        path = trainer.save(folder, asynchronous=True)
        assert pausing.reached.wait(20)
        mutate(trainer)
        if not gate:  # an update that was only queued would change nothing before the rest is written
            trainer.engine.manager.settle_updates()
        pausing.go_on.set()
        trainer.engine.synchronize()
    assert verify(path) == []
    return before


@pytest.mark.parametrize(
    "placement", [pytest.param(name, marks=() if name in _SHORT else pytest.mark.full) for name in PLACEMENTS]
)
def test_what_is_stored_is_the_state_at_the_call(tmp_path: Path, placement: str) -> None:
    """20 moments between the call and the last write; parameters, states, buffers, counters and the rest are changed."""
    trainer = Trainer(_setting(placement))
    trainer.run(BATCHES[:2])
    # In an open window gradients are written before the call returns: none of those writes can be interfered with.
    num_writes = _num_writes(trainer, tmp_path / "count")
    first = 1 + sum(1 for t in trainer.engine._tensors.values() if trainer.engine._micro_step and t.has_gradient) + 3
    count = 0
    for position in range(20):
        at = first + position * (num_writes - first - 3) // 20
        mutate = MUTATIONS[position % len(MUTATIONS)]
        before = _interfere(trainer, tmp_path / str(position), at, mutate)
        loaded = Trainer(_setting(placement))
        loaded.load(tmp_path / str(position))
        assert differences(before, everything(loaded.engine)) == [], (placement, at, mutate)
        loaded.engine.check_integrity()
        trainer.engine.check_integrity()
        trainer.load(tmp_path / str(position))
        count += 1
    logger.warning("%s: %d moments of interference", placement, count)
    assert count == 20


def test_the_test_above_sees_a_missing_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background.Gate, "_wait", lambda *_: None)
    monkeypatch.setattr(background.Gate, "taken", lambda *_: None)
    for number, mutate in enumerate((_train, _write_whole_parameters, _write_states, _forget_states)):
        trainer = Trainer(_setting("host")).run(BATCHES[:2])
        before = _interfere(trainer, tmp_path / str(number), 5, mutate, pause_s=20.0, gate=False)
        loaded = Trainer(_setting("host"))
        loaded.load(tmp_path / str(number))
        assert differences(before, everything(loaded.engine)) != []


def test_training_goes_on_while_it_is_written(tmp_path: Path) -> None:
    """A forward and a backward pass need not wait; only an update of what has not been taken does."""
    trainer = Trainer(_setting("host")).run(BATCHES[:2])
    pausing = PausingFiles(4, pause_s=1.0)
    with files.replaced(pausing):
        path = trainer.save(tmp_path, asynchronous=True)
        assert not path.exists()
        assert pausing.reached.wait(20)
        engine = trainer.engine
        engine.zero_grad()
        engine.backward(engine(**BATCHES[2]).loss)
        assert engine._saves.is_running
        engine.step()
        engine.synchronize()
    assert verify(path) == []


def test_no_second_copy_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the thread writes of parameters and states are views of where they live."""
    trainer = Trainer(_setting("host")).run(BATCHES[:1])
    held = [
        (buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes)
        for chunk in trainer.engine.manager.chunks
        for segment in chunk.segments
        for buffer in (segment.values, *segment.companions.values())
    ]
    written: list[torch.Tensor] = []
    as_bytes = tensorfile.as_bytes
    monkeypatch.setattr(tensorfile, "as_bytes", lambda block: (written.append(block), as_bytes(block))[1])
    trainer.save(tmp_path, asynchronous=True)
    trainer.engine.synchronize()
    outside = [b for b in written if not any(start <= b.data_ptr() < stop for start, stop in held)]
    buffers = dict(trainer.engine.module.named_buffers())
    assert len(outside) <= len(buffers)
    assert len(written) > 50


def test_errors_come_at_the_next_verb(tmp_path: Path) -> None:
    """The next save, synchronize() and close() say what failed, once; older checkpoints stand."""
    trainer = Trainer(_setting("host")).run(BATCHES[:1])
    good = trainer.save(tmp_path)
    verbs = {"save": lambda: trainer.save(tmp_path), "synchronize": trainer.engine.synchronize}
    for name, verb in verbs.items():
        trainer.run(BATCHES[1:2])
        with files.replaced(FailingFiles(12)):
            trainer.save(tmp_path, asynchronous=True)
            trainer.engine._saves._thread.join()
        with pytest.raises(CheckpointError, match="No space left"):
            verb()
        trainer.engine.synchronize()  # said once
        assert find_latest(tmp_path) == good, name
    with files.replaced(FailingFiles(12)):
        trainer.save(tmp_path, asynchronous=True)
        trainer.engine._saves._thread.join()
    with pytest.raises(CheckpointError, match="No space left"):
        trainer.engine.close()
    trainer.engine.close()
    assert isinstance(next(trainer.engine.module.parameters()), torch.nn.Parameter)


def test_what_cannot_be_stored_is_said_at_once(tmp_path: Path) -> None:
    trainer = Trainer(_setting("host"))
    with pytest.raises(CheckpointError, match="a checkpoint cannot hold"):
        trainer.save(tmp_path, asynchronous=True, extra={"bad": object()})
    trainer.engine.synchronize()


def test_a_second_save_and_a_load_wait_for_the_first(tmp_path: Path) -> None:
    trainer = Trainer(_setting("host")).run(BATCHES[:1])
    with files.replaced(PausingFiles(3, pause_s=0.5)):
        first = trainer.save(tmp_path, asynchronous=True)
        trainer.run(BATCHES[1:2])
        second = trainer.save(tmp_path, asynchronous=True)
        assert first.is_dir()
        assert trainer.load(tmp_path).path == second
    assert (verify(first), verify(second)) == ([], [])


def test_a_failed_save_does_not_stop_a_rollback(tmp_path: Path) -> None:
    trainer = Trainer(_setting("host")).run(BATCHES[:1])
    good = trainer.save(tmp_path)
    trainer.run(BATCHES[1:2])
    with files.replaced(FailingFiles(12)):
        trainer.save(tmp_path, asynchronous=True)
        trainer.engine._saves._thread.join()
    loaded = trainer.load(tmp_path)
    assert loaded.path == good
    assert "a save in the background had failed: the checkpoint of step 2" in loaded.warnings[0]


def test_a_model_that_writes_its_own_parameters_is_not_stored_half(tmp_path: Path) -> None:
    """In a pass, into resident memory, past all of us: the save fails and says which."""
    trainer = Trainer(_setting("device")).run(BATCHES[:2])
    norm = trainer.engine.module.model.norm

    def clamp(module: Any, args: Any) -> None:
        with torch.no_grad():
            norm.weight.clamp_(0.9, 1.1)

    norm.register_forward_pre_hook(clamp)
    with files.replaced(PausingFiles(4, pause_s=0.6)):
        trainer.save(tmp_path, asynchronous=True)
        trainer.engine.zero_grad()
        trainer.engine(**BATCHES[2])
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight was written in place by the model"):
            trainer.engine.synchronize()
    assert find_latest(tmp_path) is None
