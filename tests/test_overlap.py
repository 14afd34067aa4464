"""Updates that run beside the program: the same bits whenever they run, and everybody who must wait does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemini.holdings import Holdings
from gemini.jobs import InlineQueue, ThreadQueue
from tests.engine_models import MODELS, batches, recipe
from tests.reference import (
    Recipe,
    Run,
    assert_same,
    differences,
    finish,
    least_capacity,
    make_engine,
    run_engine,
    run_plain,
    spoil,
)
from zero import precision
from zero.optim.native_kernel import NativeKernel
from zero.updating import share_cores

ROOMY = 1 << 30
ORDERS = ("procrastinating", *(pytest.param(order, marks=pytest.mark.full) for order in ("random", "immediate")))


def _lowering(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step)


@functools.cache
def _recipe(name: str, dtype: str, clip: float | None) -> Recipe:
    return recipe(name, dtype=dtype, max_grad_norm=clip, scheduler=_lowering)


@functools.cache
def _plain(name: str, dtype: str = "fp32", clip: float | None = None) -> Run:
    return run_plain(_recipe(name, dtype, clip))


def _is_pending(engine: Any) -> bool:
    return any(chunk.is_updating for chunk in engine.manager.chunks)


# -- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["auto", *(pytest.param(n, marks=pytest.mark.full) for n in (0, 1)), 3])
@pytest.mark.parametrize("clip", [pytest.param(None, marks=pytest.mark.full), 0.05])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_workers_change_no_bit(dtype: str, clip: float | None, workers: int | str) -> None:
    got = run_engine(_recipe("llama", dtype, clip), ROOMY, "cpu", optimizer={"workers": workers})
    assert_same(got, _plain("llama", dtype, clip))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("placed", [(0.0, 0.0), (1.0, 0.0), (0.6, 0.3), (0.3, 0.6)], ids=str)
def test_wherever_values_and_states_lie(placed: tuple[float, float], order: str) -> None:
    where = {"resident_parameters": placed[0], "resident_optimizer": placed[1]}
    whole = _recipe("opt-pre-norm", "bf16", 0.05)
    got = run_engine(whole, ROOMY, "static", **where, device={"streams": order})
    assert_same(got, _plain("opt-pre-norm", "bf16", 0.05))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("depth", range(5))
def test_prefetch_depth_changes_no_bit(depth: int, order: str) -> None:
    whole = _recipe("opt-pre-norm", "bf16", 0.05)
    capacity_bytes = int(least_capacity(whole) * 1.4)
    got = run_engine(whole, capacity_bytes, "cpu", prefetch=depth, device={"streams": order})
    assert_same(got, _plain("opt-pre-norm", "bf16", 0.05))
    assert got.extra["plan"].prefetch_depth == depth
    assert got.extra["report"].device_peak_bytes <= capacity_bytes


@pytest.mark.parametrize("name", MODELS)
def test_on_a_device_that_is_nearly_full(name: str) -> None:
    whole = _recipe(name, "fp32", None)
    assert_same(run_engine(whole, int(least_capacity(whole) * 1.1)), _plain(name))


def test_threads_beside_the_host_as_device() -> None:
    assert_same(run_engine(_recipe("llama", "bf16", None), optimizer={"workers": 2}), _plain("llama", "bf16"))


def test_the_native_kernel_gives_the_same_bits_on_any_thread() -> None:
    whole = _recipe("llama", "bf16", 0.05)
    runs = [
        run_engine(whole, ROOMY, "cpu", optimizer={"kernel": "native", "workers": workers})
        for workers in (0, "auto", 2)
    ]
    assert differences(runs[1], runs[0]) == differences(runs[2], runs[0]) == []


def test_without_the_waits_the_numbers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above stand on: the simulated device really lets updates wait."""
    whole = recipe("llama")
    engine = make_engine(whole, ROOMY, "cpu")
    losses = []
    for index, batch in enumerate(whole.batches):
        if index == 1:
            monkeypatch.setattr(Holdings, "settle_update", lambda self: None)
        engine.zero_grad()
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    monkeypatch.undo()
    want = run_plain(whole).losses
    assert losses[:2] == want[:2]
    assert losses[2:] != want[2:]
    engine.close(keep_values=False)


# -- who waits -------------------------------------------------------------------------------------------------------


def _read_states(engine: Any) -> Any:
    return [dict(state) for state in engine.optimizer.state.values()]


def _gathered(engine: Any) -> Any:
    with engine.gathered_parameters() as model:
        return [p.clone() for p in model.parameters()]


def _saved(engine: Any) -> Any:
    return [p.norm().item() for p in engine.module.parameters()]


LOOKS: dict[str, Callable[[Any], Any]] = {
    "state_dict": lambda engine: list(engine.module.state_dict().values()),
    "optimizer.state": _read_states,
    "optimizer.state_dict": lambda engine: list(engine.optimizer.state_dict()["state"].values()),
    "gathered_parameters": _gathered,
    "norms": _saved,
    "gradients": lambda engine: [p.grad.clone() for p in engine.module.parameters()],
}


@pytest.mark.parametrize("look", LOOKS)
def test_who_looks_sees_what_a_step_without_delay_has_made(look: str) -> None:
    whole = _recipe("llama", "bf16", 0.05)
    seen = []
    for workers in (0, "auto"):
        engine = make_engine(whole, ROOMY, "cpu", optimizer={"workers": workers})
        found = []
        for batch in whole.batches[:3]:
            engine.zero_grad()
            engine.backward(engine(**batch).loss)
            engine.step()
            found.append(LOOKS[look](engine))
        seen.append(found)
        engine.close()
    assert _listed(seen[0]) == _listed(seen[1])


def _listed(value: Any) -> Any:
    """With tensors as lists, which compare with ==."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _listed(entry) for key, entry in value.items()}
    return [_listed(entry) for entry in value] if isinstance(value, list) else value


def _trained(engine: Any, num_steps: int) -> None:
    for batch in batches(num_steps):
        engine.zero_grad()
        engine.backward(engine(**batch).loss)
        engine.step()


def test_step_returns_before_the_update_and_synchronize_after_it() -> None:
    engine = make_engine(_recipe("llama", "fp32", None), ROOMY, "cpu")
    _trained(engine, 2)
    assert all(chunk.is_updating for chunk in engine.manager.chunks)
    engine.synchronize()
    assert not _is_pending(engine)
    engine.check_integrity()
    engine.close()


def test_forgetting_gradients_does_not_wait_and_gives_their_memory_back_later() -> None:
    engine = make_engine(_recipe("llama", "fp32", None), ROOMY, "cpu")
    _trained(engine, 2)
    engine.zero_grad()
    assert all(chunk.is_updating for chunk in engine.manager.chunks)
    with_gradients_bytes = engine.memory_report().host_bytes
    engine.synchronize()
    assert engine.memory_report().host_bytes < with_gradients_bytes
    engine.check_integrity()
    engine.close()


def test_a_pass_waits_for_the_chunks_it_reads_and_no_others() -> None:
    engine = make_engine(_recipe("llama", "fp32", None), ROOMY, "cpu")
    _trained(engine, 2)
    with torch.no_grad():
        engine.module.model.embed_tokens(torch.tensor([[1, 2]]))
    waited_for = [chunk for chunk in engine.manager.chunks if not chunk.is_updating]
    assert [t.name for chunk in waited_for for t in chunk.tensors] == ["model.embed_tokens.weight"]
    engine.close()


def test_an_overflow_begins_nothing() -> None:
    engine = make_engine(_recipe("llama", "bf16", None), ROOMY, "cpu")
    _trained(engine, 2)
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    engine.zero_grad()
    engine.backward(engine(**batches(1)[0]).loss)
    spoil(dict(engine.module.named_parameters()), "model.norm.weight", float("inf"))
    engine.step()
    assert engine.skipped_last_step
    assert not _is_pending(engine)
    assert all(torch.equal(value, before[name]) for name, value in engine.module.state_dict().items())
    engine.close()


def test_a_checkpoint_holds_the_updated_state(tmp_path: Path) -> None:
    whole = _recipe("llama", "bf16", None)
    engine = make_engine(whole, ROOMY, "cpu")
    _trained(engine, 3)
    assert _is_pending(engine)
    path = engine.save_checkpoint(tmp_path, asynchronous=True)
    _trained(engine, 1)
    engine.synchronize()
    again = make_engine(whole, ROOMY, "cpu", optimizer={"workers": 0})
    again.load_checkpoint(path)
    _trained(again, 1)
    assert differences(finish(again, Run()), finish(engine, Run())) == []


# -- what goes wrong -------------------------------------------------------------------------------------------------


class FailingAdamW(torch.optim.AdamW):
    """Fails in the update of a parameter with a given number of elements, from its second step on."""

    numel = 0

    def step(self, closure: Any = None) -> Any:
        """A step."""
        for group in self.param_groups:
            if any(p.numel() == self.numel and self.state.get(p) for p in group["params"]):
                raise FloatingPointError("the update failed")
        return super().step(closure)


@pytest.mark.parametrize("workers", ["auto", 1])
def test_an_update_that_fails_is_told_to_all_who_need_it(workers: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _recipe("llama", "fp32", None).but(optimizer=lambda named: FailingAdamW(named.values(), lr=1e-3))
    engine = make_engine(whole, ROOMY, "cpu", optimizer={"workers": workers})
    _trained(engine, 1)
    monkeypatch.setattr(FailingAdamW, "numel", engine.module.model.norm.weight.numel())
    _trained(engine, 1)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="the update failed"):
            engine(**whole.batches[0])
    with pytest.raises(FloatingPointError, match="the update failed"):
        engine.synchronize()
    engine.close(keep_values=False)


def test_an_interrupt_while_waiting_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(_recipe("llama", "fp32", None), ROOMY, "cpu")
    _trained(engine, 2)
    chunk = engine.manager.chunks[1]
    job, finish_ = chunk._update

    class Interrupted:
        is_done = False

        def wait(self) -> None:
            raise KeyboardInterrupt

    chunk._update = (Interrupted(), finish_)
    with pytest.raises(KeyboardInterrupt):
        engine(**batches(1)[0])
    assert chunk.is_updating
    chunk._update = (job, finish_)
    _trained(engine, 1)
    other = make_engine(_recipe("llama", "fp32", None), ROOMY, "cpu", optimizer={"workers": 0})
    _trained(other, 2)
    _trained(other, 1)
    assert differences(finish(engine, Run()), finish(other, Run())) == []


def test_queues() -> None:
    done: list[int] = []
    InlineQueue().submit(lambda: done.append(1)).wait()
    threads = ThreadQueue(2)
    jobs = [threads.submit(functools.partial(done.append, number)) for number in (2, 3)]
    for job in jobs:
        job.wait()
        job.wait()
    threads.close()
    assert sorted(done) == [1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        InlineQueue().submit(lambda: 1 / 0)  # type: ignore[arg-type, return-value]


# -- norms that are known when backward ends -------------------------------------------------------------------------


def _norms_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of every gradient that is read once more for the norm."""
    read: list[int] = []
    original = precision.unscaled

    def counted(flat: torch.Tensor, *arguments: Any) -> torch.Tensor:
        read.append(flat.numel())
        return original(flat, *arguments)

    monkeypatch.setattr(precision, "unscaled", counted)
    return read


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_no_gradient_is_read_again_for_the_norm(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = _norms_read(monkeypatch)
    assert_same(run_engine(_recipe("llama", dtype, 0.05), ROOMY, "cpu"), _plain("llama", dtype, 0.05))
    assert read == []


def test_a_gradient_that_was_looked_at_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(_recipe("llama", "fp32", 0.05), ROOMY, "cpu")
    engine.backward(engine(**batches(1)[0]).loss)
    weight = engine.module.model.norm.weight
    with torch.no_grad():
        weight.grad.mul_(1000.0)
    read = _norms_read(monkeypatch)
    engine.step()
    assert read == [weight.numel()]
    assert engine.grad_norm > weight.grad.norm().item()
    engine.close()


def test_sums_over_micro_batches_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = recipe("llama", accumulation=2, max_grad_norm=0.05)
    read = _norms_read(monkeypatch)
    assert_same(run_engine(whole, ROOMY, "cpu"), run_plain(whole))
    assert read != []


@pytest.mark.parametrize("most_bytes", [0, 40_000, 1 << 30])
def test_gradients_on_their_way_are_bounded(most_bytes: int) -> None:
    engine = make_engine(_recipe("llama", "bf16", None), ROOMY, "cpu")
    engine.device.most_bytes_on_way = most_bytes
    engine.backward(engine(**batches(1)[0]).loss)
    on_way = [a.num_bytes for c in engine.manager.chunks for a in c._arrivals if not a.is_settled]
    assert sum(on_way) <= most_bytes
    assert on_way or not most_bytes
    engine.close(keep_values=False)


@pytest.mark.parametrize(("workers", "num_threads"), [(1, 5), (2, 2), (0, 8)])
def test_updates_leave_cores_to_the_data_loader(
    workers: int, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 threads, with 3 processes that prepare batches; an update before step() returns keeps nobody waiting."""
    seen = set()
    step = NativeKernel.step

    def noted(kernel: NativeKernel, *args: Any, **kwargs: Any) -> None:
        seen.add(kwargs["num_threads"])
        step(kernel, *args, **kwargs)

    monkeypatch.setattr(NativeKernel, "step", noted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    whole = _recipe("llama", "bf16", None)
    engine = make_engine(whole, ROOMY, "cpu", optimizer={"workers": workers, "kernel": "native"})
    share_cores(engine.optimizer, torch.utils.data.DataLoader([0], num_workers=3))
    engine.backward(engine(**whole.batches[0]).loss)
    engine.step()
    engine.synchronize()
    engine.close()
    assert seen == {num_threads}
