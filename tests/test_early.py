"""Updates inside backward: the bits of an update after it, whatever happens between backward and step()."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import zero
from gemini.store import Kind, Tier
from zero.engine import Engine
from zero.optim.early import EarlyUpdates
from zero.optim.update import ChunkUpdater
from zero.optim.work import ChunkWork


def _model() -> nn.Module:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).train()


def _engine(early: bool = True, dtype: str = "bf16", **tables: dict[str, Any]) -> Engine:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config: dict[str, Any] = {
        "device": {"type": "simulated", "memory": "600KiB"},
        "precision": {"dtype": dtype},
        "optimizer": {"early": early},
        "memory": {"policy": "cpu"},
    }
    for name, table in tables.items():
        config[name] = config.get(name, {}) | table
    return zero.initialize(model=model, optimizer=optimizer, config=config)[0]


def _backward(engine: Engine, index: int) -> float:
    torch.manual_seed(index)
    ids = torch.randint(0, 64, (2, 16))
    engine.zero_grad()
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    return float(loss.detach())


def _train(engine: Engine, between: Callable[[Engine, int], None] = lambda engine, index: None) -> list[Any]:
    """Losses, then weights."""
    seen: list[Any] = []
    for index in range(5):
        seen.append(_backward(engine, index))
        between(engine, index)
        engine.step()
        engine.manager.check_integrity()
    seen += [tensor.clone() for tensor in engine.module.state_dict().values()]
    engine.close()
    return seen


def _same(one: list[Any], other: list[Any]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.fixture
def confirmed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What became of each chunk that a step could have found updated."""
    seen: list[bool] = []
    original = EarlyUpdates.confirm

    def confirm(early: EarlyUpdates, *args: Any) -> bool:
        seen.append(original(early, *args))
        return seen[-1]

    monkeypatch.setattr(EarlyUpdates, "confirm", confirm)
    return seen


_SHORT = [("auto", "bf16", "auto", "procrastinating"), ("torch", "fp32", 2, "random"), ("auto", "fp16", 2, "immediate")]
_ALL = itertools.product(
    ("auto", "torch"), ("bf16", "fp16", "fp32"), ("auto", 2), ("procrastinating", "random", "immediate")
)
_LONG = [pytest.param(*case, marks=pytest.mark.full) for case in _ALL if case not in _SHORT]


@pytest.mark.parametrize(("kernel", "dtype", "workers", "streams"), [*_SHORT, *_LONG])
def test_losses_and_weights_are_the_same_to_the_bit(
    kernel: str, dtype: str, workers: Any, streams: str, confirmed: list[bool]
) -> None:
    tables = {"optimizer": {"kernel": kernel, "workers": workers}, "device": {"streams": streams}}
    want = _train(_engine(False, dtype, **copy.deepcopy(tables)))
    assert not any(confirmed)
    confirmed.clear()
    tables["optimizer"]["early"] = True
    assert _same(_train(_engine(True, dtype, **tables)), want)
    # The first step makes states, so nothing is early there; fp16 may begin with steps that overflow, and threads may not
    # have begun all that was queued.
    each_step = len(confirmed) // 5 if workers == "auto" else 1
    assert sum(confirmed) >= each_step * (2 if dtype == "fp16" else 4) > 0


def _look_at_weights(engine: Engine, index: int) -> None:
    assert all(torch.isfinite(tensor).all() for tensor in engine.module.state_dict().values())


def _look_at_states(engine: Engine, index: int) -> None:
    for parameter in engine.module.parameters():
        state = engine.optimizer.state[parameter]  # type: ignore[union-attr]
        assert not state or float(state["step"]) == index


def _scale_gradients(engine: Engine, index: int) -> None:
    for parameter in list(engine.module.parameters())[::2]:
        parameter.grad.mul_(0.5)  # type: ignore[union-attr]


def _clip_by_hand(engine: Engine, index: int) -> None:
    torch.nn.utils.clip_grad_norm_(engine.module.parameters(), 0.1)


def _change_rate(engine: Engine, index: int) -> None:
    engine.optimizer.param_groups[0]["lr"] = 1e-2 / (index + 1)  # type: ignore[union-attr]


def _evaluate(engine: Engine, index: int) -> None:
    with torch.no_grad():
        engine(input_ids=torch.zeros(1, 4, dtype=torch.int64))


def _go_back_again(engine: Engine, index: int) -> None:
    _backward(engine, index + 100)


def _save(engine: Engine, index: int) -> None:
    with engine.gathered_parameters():
        pass


@pytest.mark.parametrize(
    "between",
    [
        _look_at_weights,
        _look_at_states,
        _scale_gradients,
        _clip_by_hand,
        _change_rate,
        _evaluate,
        _go_back_again,
        _save,
    ],
)
def test_what_happens_between_backward_and_step_sees_the_old_values_and_counts(
    between: Callable[[Engine, int], None],
) -> None:
    def begun(engine: Engine, index: int) -> None:
        assert index == 0 or any(chunk.is_tentative for chunk in engine.manager.chunks)
        between(engine, index)

    assert _same(_train(_engine(True), begun), _train(_engine(False), between))


@pytest.mark.parametrize("how", ["skip_step", "zero_grad", "not finite"])
def test_a_step_that_is_not_taken_changes_nothing(how: str, confirmed: list[bool]) -> None:
    engine = _engine()
    for index in range(2):
        _backward(engine, index)
        engine.step()
    want = [tensor.clone() for tensor in engine.module.state_dict().values()]
    handle = None
    if how == "not finite":  # the embedding's gradient comes last, when the blocks' updates have begun
        weight = engine.module.get_input_embeddings().weight
        handle = weight.register_hook(lambda gradient: gradient * float("nan"))
    _backward(engine, 2)
    assert any(chunk.is_tentative for chunk in engine.manager.chunks)
    if how == "skip_step":
        engine.skip_step()
    elif how == "zero_grad":
        engine.zero_grad()
    else:
        engine.step()
        assert engine.num_skipped_steps == 1
        assert not any(chunk.is_updating for chunk in engine.manager.chunks)
    if handle is not None:
        handle.remove()
    engine.zero_grad()
    assert not any(chunk.is_tentative for chunk in engine.manager.chunks)
    assert _same(list(engine.module.state_dict().values()), want)
    engine.manager.check_integrity()
    engine.close()


def test_it_takes_no_more_than_half_of_what_the_host_has_to_spare(confirmed: list[bool]) -> None:
    engine = _engine(memory={"host": "1000KiB"})
    facts_bytes = sum(fact.numel * (2 + 4 + 8 + 2) for fact in engine.facts)
    want = _train(_engine(False))
    confirmed.clear()
    for index in range(3):
        _backward(engine, index)
        held = engine.manager.store.bytes_by[Tier.HOST, Kind.SNAPSHOTS]
        assert held <= (1000 * 1024 - facts_bytes) // 2
        engine.step()
    assert held > 0
    assert any(confirmed)
    assert not all(confirmed)
    engine.close()
    assert engine.manager.store.bytes_by[Tier.HOST, Kind.SNAPSHOTS] == 0
    tight = _engine(memory={"host": f"{facts_bytes + 20_000}B"})
    assert _same(_train(tight), want)


def test_clipping_and_accumulation_begin_after_backward(confirmed: list[bool]) -> None:
    for train in ({"max_grad_norm": 1.0}, {"gradient_accumulation_steps": 2}):
        _train(_engine(train=train))
    assert not any(confirmed)


def test_what_has_not_begun_when_the_step_comes_takes_its_turn_in_the_order_of_the_next_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the chunk that is read first would be updated last: backward comes to it last."""
    go, order = threading.Event(), []
    go.set()
    carry_out = ChunkUpdater._carry_out

    def slowly(updater: ChunkUpdater, work: ChunkWork) -> None:
        assert threading.current_thread() is threading.main_thread() or go.wait(60)  # the first step makes states
        order.append(work.chunk.index)
        carry_out(updater, work)

    monkeypatch.setattr(ChunkUpdater, "_carry_out", slowly)
    seen = []
    for early in (True, False):
        engine = _engine(early, optimizer={"workers": 1}, memory={"chunk": "8KiB"})
        for index in range(3):
            engine.synchronize()
            order.clear()
            go.clear()
            _backward(engine, index)
            engine.step()
            go.set()
            engine.manager.check_integrity()
        engine.synchronize()
        first, *rest = order
        assert len(rest) > 3
        assert rest == sorted(rest)
        assert (first > rest[-1]) == early  # one had begun, and was confirmed
        seen.append([tensor.clone() for tensor in engine.module.state_dict().values()])
        engine.close()
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))
