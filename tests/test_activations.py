"""What forward saves may wait on the host: same bits, less device memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_case import equal_chunks
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import zero
from gemini.activations import Activations
from gemini.store import Kind, Tier
from zero.engine import Engine

LENGTH, HIDDEN, BLOCKS = 96, 32, 6
INPUT_BYTES = 2 * LENGTH * HIDDEN * 4


def _model(checkpointing: str | None) -> nn.Module:
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": BLOCKS}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, attention_dropout=0.1)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    return model


def _engine(model: nn.Module, where: str, **device: Any) -> Engine:
    config = {
        "device": {"type": "simulated", "memory": "6MiB"} | device,
        "memory": {"activations": where},
        "train": {"max_grad_norm": 1.0},
        "optimizer": {"kernel": "torch"},  # the same arithmetic wherever a plan puts states
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return zero.initialize(model=model, optimizer=optimizer, config=config)[0]


def _steps(engine: Engine, num_steps: int = 3, length: int = LENGTH) -> list[float]:
    losses = []
    for index in range(num_steps):
        torch.manual_seed(index)
        ids = torch.randint(0, 128, (2, length))
        engine.zero_grad()
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        engine.manager.check_integrity()
    return losses


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("streams", ["procrastinating", "random", "immediate"])
@pytest.mark.parametrize("checkpointing", ["non_reentrant", "reentrant", None])
def test_losses_and_weights_are_the_same_to_the_bit(checkpointing: str | None, streams: str) -> None:
    results = {}
    for where in ("device", "host"):
        model = _model(checkpointing)
        engine = _engine(model, where, streams=streams)
        results[where] = _steps(engine)
        engine.close()
        results[where + " weights"] = _weights(model)
    assert results["host"] == results["device"]
    for name, tensor in results["device weights"].items():
        assert torch.equal(tensor, results["host weights"][name]), name


@pytest.mark.parametrize("checkpointing", ["non_reentrant", "reentrant"])
def test_blocks_inputs_leave_the_device_and_the_prediction_knows(checkpointing: str) -> None:
    peaks = {}
    for where in ("device", "host"):
        engine = _engine(_model(checkpointing), where)
        _steps(engine, 4)
        report = engine.memory_report()
        peaks[where] = report.non_model_peak_bytes
        assert abs(report.device_peak_bytes - report.predicted_device_peak_bytes) <= 0.05 * report.device_peak_bytes
        on_host = engine.manager.store.bytes_by[Tier.HOST, Kind.ACTIVATIONS]
        assert on_host == 0 if where == "device" else on_host >= BLOCKS * INPUT_BYTES
        engine.close()
    # Of the blocks' inputs two are there at a time: the one that is used, and the one that comes next.
    assert peaks["host"] <= peaks["device"] - (BLOCKS - 3) * INPUT_BYTES


def test_host_buffers_are_used_again_and_go_with_the_batch_that_needed_them() -> None:
    engine = _engine(_model("non_reentrant"), "host")
    store = engine.manager.store
    held = []
    for length in (LENGTH, LENGTH, LENGTH // 2, LENGTH // 2):
        _steps(engine, 1, length)
        held.append(store.bytes_by[Tier.HOST, Kind.ACTIVATIONS])
    assert held[0] == held[1]
    assert held[3] == held[1] // 2
    engine.close()
    assert store.bytes_by[Tier.HOST, Kind.ACTIVATIONS] == 0


def test_a_host_buffer_does_not_go_while_a_copy_to_it_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    house = equal_chunks(1)
    activations = Activations(house.store, house.transfer, least_bytes=0)
    free, num_pending = house.store.free, []

    def noted(*args: Any) -> None:
        num_pending.append(sum(stream.num_pending for stream in house.device._streams))
        free(*args)

    monkeypatch.setattr(house.store, "free", noted)
    activations.begin_pass()
    on_host = activations.put(torch.ones(64))
    del on_host  # its graph was dropped: nobody will go back through it
    activations.clear()
    assert num_pending == [0]


def test_a_graph_that_is_dropped_or_walked_twice() -> None:
    plain = _model(None)
    managed = _model(None)
    engine = _engine(managed, "host")
    ids = torch.randint(0, 128, (2, LENGTH))
    for model in (plain, managed):
        torch.manual_seed(3)
        loss = model(input_ids=ids, labels=ids).loss  # nobody goes back through it
        del loss
        torch.manual_seed(4)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward(retain_graph=True)
        loss.backward()
    for (name, one), other in zip(managed.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name  # type: ignore[arg-type]
    engine.close()


def test_a_host_without_room_says_so() -> None:
    model = _model("non_reentrant")
    config = {
        "device": {"type": "simulated", "memory": "6MiB"},
        "memory": {"activations": "host", "host": "1300KiB"},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train() -> None:
        engine, *_ = zero.initialize(model=model, optimizer=optimizer, config=config)
        _steps(engine)

    with pytest.raises(MemoryError, match=r"raise memory\.host"):
        train()
