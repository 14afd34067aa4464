"""The disk tier: the same bits with less host memory, and a clear word when the disk has no room."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import zero
from gemini.disk import DiskArena, DiskError
from gemini.plan import DoesNotFitError, disk_bytes, host_bytes
from gemini.store import Tier
from gemini.units import parse_bytes
from zero.config.loading import load_config
from zero.engine import Engine
from zero.planning import plan_run
from zero.setup import make_device


def _model() -> nn.Module:
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).train()


def _engine(config: dict[str, Any], kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> Engine:
    model = _model()
    optimizer = kind(model.parameters(), lr=1e-2, **options)
    config.setdefault("train", {}).setdefault("max_grad_norm", 1.0)
    return zero.initialize(model=model, optimizer=optimizer, config=config)[0]


def _batch(index: int) -> dict[str, Tensor]:
    torch.manual_seed(index)
    ids = torch.randint(0, 128, (2, 16))
    return {"input_ids": ids, "labels": ids}


def _steps(engine: Engine, num_steps: int = 4) -> list[float]:
    losses = []
    for index in range(num_steps):
        engine.zero_grad()
        loss = engine(**_batch(index)).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        engine.manager.check_integrity()
    return losses


def _weights(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}


def _config(dtype: str, policy: str, disk: Path | None, host: str | None, kernel: str = "auto") -> dict[str, Any]:
    memory: dict[str, Any] = {"policy": policy, "chunk": "8KiB"}
    if policy == "static":
        memory |= {"resident_parameters": 0.3, "resident_optimizer": 0.2}
    if disk is not None:
        memory |= {"disk": str(disk), "host": host}
    return {
        "device": {"type": "simulated", "memory": "600KiB"},
        "memory": memory,
        "precision": {"dtype": dtype},
        "optimizer": {"kernel": kernel},
    }


# A host with room for some of the states; for none of them, and not for all values.
_SHORT = [("fp32", "static", "420KiB", "auto"), ("bf16", "cpu", "160KiB", "auto"), ("bf16", "auto", "160KiB", "torch")]
_ALL = itertools.product(("fp32", "bf16"), ("cpu", "auto", "static"), ("420KiB", "160KiB"), ("torch", "auto"))
_LONG = [pytest.param(*case, marks=pytest.mark.full) for case in _ALL if case not in _SHORT]


@pytest.mark.parametrize(("dtype", "policy", "host", "kernel"), [*_SHORT, *_LONG])
def test_losses_and_weights_are_the_same_to_the_bit(
    dtype: str, policy: str, host: str, kernel: str, tmp_path: Path
) -> None:
    engine = _engine(_config(dtype, policy, None, None, kernel))
    want = _steps(engine)
    want_weights = _weights(engine)
    engine.close()
    engine = _engine(_config(dtype, policy, tmp_path, host, kernel))
    assert _steps(engine) == want
    report = engine.memory_report()
    assert report.disk_bytes > 0
    placements = [chunk.placement for chunk in engine.manager.chunks]
    assert engine.manager.store.tier_bytes(Tier.DISK) == report.disk_bytes == disk_bytes(engine.facts, placements)
    assert report.host_bytes == host_bytes(engine.facts, placements) <= parse_bytes(host)
    for name, tensor in _weights(engine).items():
        assert torch.equal(tensor, want_weights[name]), name
    engine.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "options"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"fused": True})]
)
def test_other_optimizers(kind: Any, options: dict[str, Any], tmp_path: Path) -> None:
    results = []
    for disk in (None, tmp_path):
        engine = _engine(_config("bf16", "cpu", disk, "200KiB", "torch"), kind, **options)
        losses = _steps(engine)
        results.append((losses, _weights(engine)))
        engine.close()
    assert results[0][0] == results[1][0]
    assert all(torch.equal(tensor, results[1][1][name]) for name, tensor in results[0][1].items())


def test_checkpoints_go_from_disk_to_host_and_back(tmp_path: Path) -> None:
    engine = _engine(_config("bf16", "cpu", None, None))
    _steps(engine)
    want = _steps(engine, 2), _weights(engine)
    engine.close()
    engine = _engine(_config("bf16", "cpu", tmp_path / "disk", "200KiB"))
    _steps(engine)
    engine.save_checkpoint(tmp_path / "saved")
    engine.close()
    for disk in (None, tmp_path / "disk"):
        engine = _engine(_config("bf16", "cpu", disk, "200KiB"))
        engine.load_checkpoint(tmp_path / "saved")
        assert _steps(engine, 2) == want[0]
        assert all(torch.equal(tensor, want[1][name]) for name, tensor in _weights(engine).items())
        engine.close()


def test_a_host_with_room_uses_no_disk(tmp_path: Path) -> None:
    engine = _engine(_config("fp32", "cpu", tmp_path / "never made", "1GiB"))
    _steps(engine, 2)
    assert engine.memory_report().disk_bytes == 0
    engine.close()
    assert not (tmp_path / "never made").exists()


def test_the_plan_of_a_run_says_what_goes_to_disk(tmp_path: Path) -> None:
    config = load_config(
        {
            "model": {"config": {"model_type": "opt", "vocab_size": 512, "hidden_size": 32, "ffn_dim": 64,
                                 "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 32}},
            "data": {"train": "builtin", "seq_length": 16},
            "train": {"per_device_train_batch_size": 2},
            "device": {"type": "simulated", "memory": "1MiB"},
            "memory": {"policy": "cpu", "host": "500KiB", "disk": str(tmp_path)},
        }
    )  # fmt: skip
    device = make_device(config)
    planned = plan_run(config, device, host_available_bytes=500 * 1024)
    device.close()
    assert planned.require()
    assert planned.host_bytes <= planned.host_peak_bytes <= 500 * 1024
    all_bytes = sum(fact.numel * 16 for fact in planned.dry.facts)
    assert planned.host_bytes + planned.disk_bytes == all_bytes
    without = load_config(config, {"memory": {"disk": "null"}})
    device = make_device(without)
    refused = plan_run(without, device, host_available_bytes=500 * 1024)
    device.close()
    with pytest.raises(DoesNotFitError, match=r"memory\.disk"):
        refused.require()


# -- bad luck ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_named_and_the_model_is_still_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = 100_000
    reserve = os.posix_fallocate

    def fallocate(descriptor: int, offset: int, length: int) -> None:
        if offset + length > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(DiskError, match=r"memory\.disk = .* more were needed .*No space left.* name another folder"):
        _engine(_config("fp32", "cpu", tmp_path, "160KiB"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"memory\.disk = .*file.* no file can be made there"):
        _engine(_config("fp32", "cpu", tmp_path / "file", "160KiB"))


# -- the arena -----------------------------------------------------------------------------------------------------------


def test_places_are_used_again_and_come_back_empty(tmp_path: Path) -> None:
    arena = DiskArena(tmp_path)
    first = arena.allocate(5000, torch.float32)
    assert torch.equal(first, torch.zeros(5000))
    second = arena.allocate(7, torch.bfloat16)
    assert arena.disk_bytes == 20_014
    first.fill_(3.0)
    second.fill_(2.0)
    arena.let_go(first)
    arena.will_need(first)
    assert torch.equal(first, torch.full((5000,), 3.0))
    assert torch.equal(second, torch.full((7,), 2.0, dtype=torch.bfloat16))
    size = arena._file_bytes
    arena.release(first)
    del first
    third = arena.allocate(4999, torch.float32)
    assert arena._file_bytes == size
    assert torch.equal(third, torch.zeros(4999))
    assert arena.allocate(0, torch.float32).numel() == 0
    arena.release(third)
    arena.release(second)
    assert arena.disk_bytes == 0
    arena.close()
    assert list(tmp_path.iterdir()) == []


def test_a_place_does_not_outlive_its_file(tmp_path: Path) -> None:
    arena = DiskArena(tmp_path)
    held, gone = (arena.allocate(5000, torch.float32).fill_(1.0) for _ in range(2))
    arena.release(gone)
    arena.close()
    arena.let_go(held)
    first = arena.allocate(5000, torch.float32).fill_(2.0)
    arena.release(held)
    second = arena.allocate(5000, torch.float32).fill_(3.0)
    assert [tensor.unique().tolist() for tensor in (held, first, second)] == [[1.0], [2.0], [3.0]]
    assert arena.disk_bytes == 2 * 20_000
    arena.close()
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_nothing_can_be_had() -> None:
    with pytest.raises(DiskError, match=r"memory\.disk is not set"):
        DiskArena(None).allocate(1, torch.float32)
