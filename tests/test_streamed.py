"""Updates that are streamed to the device and back: the bits of those made where the states stay on the device."""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from gemini.clock import IN, OUT
from gemini.plan import ChunkFacts, Plan
from gemini.policy import Policy
from gemini.profile import NAMED, HardwareProfile
from gemini.segment import Placement
from gemini.simulated import SimulatedDevice
from gemini.streamed import NUM_LANES, StreamedUpdates, streamed_bytes
from gemini.timeline import replay, required_bytes
from gemini.trace import Moment, Trace
from tests.engine_models import batches, recipe
from tests.instant import INSTANT
from tests.ranks import run_ranks
from tests.reference import (
    Recipe,
    Run,
    assert_same,
    config_of,
    differences,
    finish,
    make_engine,
    run_plain,
    spoil,
    trainable,
)
from zero.config.loading import load_config
from zero.engine import Engine

ROOMY = 1 << 30
AUTO = {"kernel": "auto"}
ORDERS = ("procrastinating", *(pytest.param(order, marks=pytest.mark.full) for order in ("random", "immediate")))


def _fused_adamw(named: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(named.values(), lr=1e-2, weight_decay=0.1, fused=True)


@functools.cache
def _recipe(dtype: str = "bf16", clip: float | None = 0.05, accumulation: int = 1, name: str = "llama") -> Recipe:
    micro = batches(4 * accumulation)
    return recipe(
        name, dtype=dtype, max_grad_norm=clip, accumulation=accumulation, batches=micro, optimizer=_fused_adamw
    )


@functools.cache
def _plain(dtype: str = "bf16", clip: float | None = 0.05, accumulation: int = 1) -> Run:
    return run_plain(_recipe(dtype, clip, accumulation))


@dataclass(frozen=True)
class Forced(Policy):
    """These placements, whatever is known."""

    placements: tuple[Placement, ...] = ()

    def _fixed(self, facts: Any) -> Plan:
        return Plan(self.name, list(self.placements))


def force(engine: Any, placements: list[Placement]) -> None:
    """Now, and with every plan to come."""
    planner = engine._planner
    planner._policy = Forced("static", profile=planner._policy.profile, placements=tuple(placements))
    engine.manager.apply(Plan("static", placements))


def place(engine: Any, resident: float = 0.0, every: int = 1, piece_numel: int | None = None) -> None:
    """Every so many chunks' updates are streamed; the leading chunks keep their values on the device."""
    engine.manager.settle_updates()
    if piece_numel is not None:
        engine.manager.streamed.close()
        engine.manager.streamed.piece_numel = engine._planner.streamed_piece_numel = piece_numel
    last = resident * len(engine.facts)
    placements = [
        Placement(fact.numel if fact.index < last else 0, 0, fact.may_stream and fact.index % every == 0)
        for fact in engine.facts
    ]
    force(engine, placements)


def run_streamed(whole: Recipe, capacity_bytes: int = ROOMY, device: dict[str, Any] | None = None, **how: Any) -> Run:
    """As :func:`tests.reference.run_engine`, with a placement that is forced once the engine stands."""
    optimizer = how.pop("optimizer", {"kernel": "torch"})
    engine = make_engine(whole, capacity_bytes, "cpu", device=device or {}, optimizer=optimizer)
    place(engine, **how)
    run, carried = Run(), counted(engine)
    torch.manual_seed(whole.seed)
    for index, batch in enumerate(whole.batches):
        engine.zero_grad()
        loss = engine(**batch).loss
        engine.backward(loss)
        if index in whole.spoil:
            spoil(trainable(engine.module), *whole.spoil[index])
        acts = engine.is_boundary
        engine.step()
        engine.check_integrity()
        run.losses.append(loss.item())
        if acts:
            run.norms.append(engine.grad_norm)
            run.scales.append(engine.loss_scale)
    finish(engine, run)
    run.extra["num_pieces"] = len(carried)
    return run


def counted(engine: Any) -> list[int]:
    """Elements of each piece that is carried from now on."""
    streamed, seen = engine.manager.streamed, []
    carry = streamed.carry

    def counting(segment: Any, start: int, stop: int, update: Any) -> None:
        seen.append(stop - start)
        carry(segment, start, stop, update)

    streamed.carry = counting
    return seen


# -- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("dtype", "clip"), [("fp32", None), ("bf16", 0.05), ("fp16", 0.05)])
def test_streamed_updates_are_plain_fused_ones(dtype: str, clip: float | None, order: str) -> None:
    got = run_streamed(_recipe(dtype, clip), device={"streams": order}, piece_numel=1024)
    assert_same(got, _plain(dtype, clip))
    assert got.extra["num_pieces"] >= 4 * 32, "of four steps"
    assert got.extra["plan"].streamed_numel == sum(p.numel() for p in _recipe().build().parameters())
    assert got.extra["report"].predicted_device_peak_bytes == got.extra["report"].device_peak_bytes


@pytest.mark.parametrize("piece_numel", [*(pytest.param(n, marks=pytest.mark.full) for n in (64, None)), 4096])
@pytest.mark.parametrize(("resident", "every"), [(0.0, 2), (1.0, 1), (0.5, 2)])
def test_pieces_residents_and_a_mixture_with_the_host(resident: float, every: int, piece_numel: int | None) -> None:
    got = run_streamed(_recipe(), resident=resident, every=every, piece_numel=piece_numel)
    assert_same(got, _plain())
    assert got.extra["num_pieces"] > 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_native_kernel_leaves_streamed_chunks_to_the_device(accumulation: int) -> None:
    """Whatever the kernel, they are what states on the device would have become: here, of an optimizer made plain."""
    whole = _recipe(accumulation=accumulation).but(optimizer=lambda named: torch.optim.AdamW(named.values(), 1e-2))
    runs = []
    for placement in ("streamed", "resident"):
        engine = make_engine(whole, ROOMY, "cpu", optimizer=AUTO)
        place(engine)
        if placement == "resident":
            force(engine, [Placement(fact.numel, fact.numel) for fact in engine.facts])
        run = Run()
        for batch in whole.batches:
            engine.zero_grad()
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            run.losses.append(loss.item())
        runs.append(finish(engine, run))
    assert differences(runs[0], runs[1]) == []


def test_states_in_another_form_are_updated_where_they_are() -> None:
    engine = make_engine(_recipe(), ROOMY, "cpu", optimizer=AUTO, precision={"optimizer_state": "split"})
    assert engine.manager.streamed.piece_numel == 0
    assert not any(fact.may_stream for fact in engine.facts)
    engine.close()


def test_an_optimizer_without_a_fused_kernel_is_never_streamed() -> None:
    for make in (torch.optim.NAdam, functools.partial(torch.optim.AdamW, amsgrad=True)):
        whole = _recipe().but(optimizer=lambda named, make=make: make(named.values(), lr=1e-3))
        engine = make_engine(whole, ROOMY, "cpu", optimizer=AUTO)
        assert engine.manager.streamed.piece_numel == 0
        place(engine)  # a plan that says so all the same
        _train(engine, whole, 1)
        assert not engine.manager.streamed.is_open
        engine.check_integrity()
        engine.close()


# -- who waits -------------------------------------------------------------------------------------------------------


def _train(engine: Any, whole: Recipe, num_steps: int) -> None:
    for batch in whole.batches[:num_steps]:
        engine.zero_grad()
        engine.backward(engine(**batch).loss)
        engine.step()


def _trained(num_steps: int = 2, **how: Any) -> Any:
    engine = make_engine(_recipe(), ROOMY, "cpu")
    place(engine, **how)
    _train(engine, _recipe(), num_steps)
    return engine


def test_a_missing_wait_is_a_wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated device runs nothing of it before somebody waits: so the tests above would see one missing."""
    monkeypatch.setattr("gemini.streamed.StreamedJob.wait", lambda job: job._owner.begin_until(job))
    assert differences(run_streamed(_recipe()), _plain())


def test_a_lane_that_is_written_too_early_is_a_wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each lane's buffer is its own; seen where streams run in random order."""

    def one_buffer(streamed: StreamedUpdates) -> None:
        _open(streamed)
        for lane in streamed._lanes[1:]:
            lane.buffer = streamed._lanes[0].buffer

    _open = StreamedUpdates.open
    monkeypatch.setattr(StreamedUpdates, "open", one_buffer)
    monkeypatch.setattr(StreamedUpdates, "close", lambda streamed: None)
    assert differences(run_streamed(_recipe(), device={"streams": "random"}, piece_numel=256), _plain())


def test_step_returns_before_the_updates_and_one_more_has_begun_than_is_needed() -> None:
    engine = _trained()
    chunks, streamed = engine.manager.chunks, engine.manager.streamed
    assert all(chunk.is_updating for chunk in chunks)
    assert len(streamed._waiting) == len(chunks) - 1
    chunks[2].settle_update()
    assert [chunk.is_updating for chunk in chunks[:4]] == [True, True, False, True]
    assert len(streamed._waiting) == len(chunks) - 4
    engine.synchronize()
    assert not streamed._waiting
    assert not any(chunk.is_updating for chunk in chunks)
    engine.check_integrity()
    engine.close()


def test_who_looks_sees_the_step() -> None:
    engine = _trained(4)
    run = Run()
    run.weights = dict(engine.module.state_dict())
    assert all(torch.equal(run.weights[name], value) for name, value in _plain().weights.items())
    states = engine.optimizer.state_dict()["state"]
    assert all(float(state["step"]) == 4 for state in states.values())
    engine.close()


def test_an_overflow_begins_nothing() -> None:
    whole = _recipe("fp16", None).but(spoil={1: ("model.embed_tokens.weight", float("inf"))})
    got = run_streamed(whole)
    assert got.num_skipped == 1
    assert_same(got, run_plain(whole))


def test_forgetting_gradients_does_not_wait() -> None:
    engine = _trained()
    engine.zero_grad()
    assert all(chunk.is_updating for chunk in engine.manager.chunks)
    with_gradients_bytes = engine.memory_report().host_bytes
    engine.synchronize()
    assert engine.memory_report().host_bytes < with_gradients_bytes
    engine.close()


def test_an_update_that_breaks_off_is_not_taken_for_done(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _trained(0)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(engine.manager.streamed, "carry", full)
    with pytest.raises(torch.OutOfMemoryError):
        _train(engine, _recipe(), 1)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="broke off"):
        engine.manager.chunks[0].settle_update()


# -- bytes -----------------------------------------------------------------------------------------------------------


def test_the_lanes_take_what_they_are_said_to_and_give_it_back() -> None:
    engine = _trained(0, piece_numel=256)
    assert engine.memory_report().device_bytes_by_kind["update pieces"] == streamed_bytes(256)
    assert streamed_bytes(256) == NUM_LANES * 20 * 256
    _train(engine, _recipe(), 2)
    force(engine, [Placement() for _ in engine.facts])
    assert "update pieces" not in engine.memory_report().device_bytes_by_kind
    engine.check_integrity()
    engine.close()


def test_14_bytes_an_element_cross_the_link_each_way() -> None:
    engine = _trained(0)
    transfer, numel = engine.manager.transfer, sum(fact.numel for fact in engine.facts)
    engine.backward(engine(**_recipe().batches[0]).loss)
    before = transfer.h2d_bytes, transfer.d2h_bytes
    engine.step()
    first = engine.manager.transfer.h2d_bytes, transfer.d2h_bytes
    engine.synchronize()
    moved = [transfer.h2d_bytes, transfer.d2h_bytes]
    assert first == (0, 0), "the step's counters have begun anew"
    assert before[0] > 0
    of_first = engine.facts[0].numel
    assert moved == [14 * (numel - of_first)] * 2, "all but the chunk that began with the step"
    engine.close()


# -- who decides -----------------------------------------------------------------------------------------------------

SLOW_CORES = HardwareProfile(
    name="slow cores",
    h2d_bytes_per_s=2e7,
    d2h_bytes_per_s=2e7,
    both_bytes_per_s=1.6e7,
    host_dram_bytes_per_s=4e8,
    host_update_numel_per_s=5e5,
    device_update_numel_per_s=2e7,
    device_flops_per_s=5e8,
    device_fp32_flops_per_s=5e8,
    device_bytes_per_s=1e9,
    launch_s=1e-6,
)


@functools.cache
def _traced() -> tuple[list[ChunkFacts], Trace]:
    engine = make_engine(_recipe(), ROOMY, "cpu")
    engine.backward(engine(**_recipe().batches[0]).loss)
    facts, trace = engine.facts, engine.manager.trace
    engine.close()
    return facts, trace


def _decide(profile: HardwareProfile, capacity_bytes: int, piece_numel: int = 1024) -> Plan:
    facts, trace = _traced()
    return Policy("auto", profile=profile).decide(
        facts, replace(trace, streamed_piece_numel=piece_numel), capacity_bytes
    )


def test_auto_streams_where_the_cores_are_slow_and_nowhere_else() -> None:
    facts, trace = _traced()
    capacity_bytes = required_bytes(facts, [Placement()] * len(facts), trace, with_margin=True) + streamed_bytes(1024)
    streamed, not_streamed = _decide(SLOW_CORES, capacity_bytes), _decide(SLOW_CORES, capacity_bytes, piece_numel=0)
    assert streamed.streamed_numel > 0 == not_streamed.streamed_numel
    assert streamed.predicted_step_s < 0.9 * not_streamed.predicted_step_s
    assert streamed.streamed_bytes == streamed_bytes(1024)
    bound_by_memory = replace(SLOW_CORES, host_dram_bytes_per_s=40 * SLOW_CORES.host_update_numel_per_s)
    assert _decide(bound_by_memory, capacity_bytes).streamed_numel == 0
    assert _decide(SLOW_CORES, capacity_bytes - streamed_bytes(1024) // 2).streamed_numel == 0, "no room for the lanes"


@pytest.mark.parametrize("profile", NAMED.values(), ids=lambda profile: profile.name)
def test_no_card_by_its_data_sheet_streams(profile: HardwareProfile) -> None:
    """Their hosts' cores are reckoned to use all of host memory, which a streamed update needs as much."""
    assert not profile.streams_updates


@pytest.mark.parametrize("ratio", [1.0, 1.2, 1.6])
def test_auto_trains_on_such_a_machine(ratio: float) -> None:
    facts, trace = _traced()
    least_bytes = required_bytes(facts, [Placement()] * len(facts), trace, with_margin=True) + streamed_bytes(1024)
    engine = make_engine(_recipe(), int(ratio * least_bytes), "auto")
    engine.manager.streamed.piece_numel = engine._planner.streamed_piece_numel = 1024
    engine._planner._policy = replace(engine._planner._policy, profile=SLOW_CORES)
    run, carried = Run(), counted(engine)
    torch.manual_seed(_recipe().seed)
    for batch in _recipe().batches:
        engine.zero_grad()
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        engine.check_integrity()
        run.losses.append(loss.item())
        run.norms.append(engine.grad_norm)
        run.scales.append(engine.loss_scale)
    assert engine.plan.streamed_numel > 0
    assert carried
    report = finish(engine, run).extra["report"]
    assert_same(run, _plain())
    assert report.device_peak_bytes <= report.device_capacity_bytes
    assert report.predicted_device_peak_bytes == pytest.approx(report.device_peak_bytes, rel=0.05)


def test_a_step_by_hand() -> None:
    """10 B/s each way, 5 elements a second: 2 chunks of 10 elements in fp32, with no activations to speak of."""
    profile = replace(
        INSTANT,
        h2d_bytes_per_s=10.0,
        d2h_bytes_per_s=10.0,
        both_bytes_per_s=10.0,
        host_dram_bytes_per_s=math.inf,
        device_update_numel_per_s=5.0,
    )
    facts = [ChunkFacts(index, 10, 4, 12, f"unit{index}", 4) for index in range(2)]
    moments = [Moment(f"unit{index}", "forward", [index]) for index in range(2)]
    trace = Trace(moments, streamed_piece_numel=10)
    found = replay(facts, [Placement(streams_update=True)] * 2, trace, 1 << 20, profile)
    # Of an element 16 bytes go there, 12 come back. The first chunk is there at 16, updated at 18, and back at 30, when
    # it is fetched: behind the second, whose way there began with the first's, so until 36. That is updated at 34 and
    # back at 46; its fetch is over at 50.
    assert found.step_s == pytest.approx(50.0)
    assert found.busy_s[IN] == pytest.approx(2 * (16 + 4))
    assert found.busy_s[OUT] == pytest.approx(2 * 12)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in (1, 2))])
def test_virtual_time_is_as_predicted(seed: int) -> None:
    draw = random.Random(seed)
    link = SLOW_CORES.h2d_bytes_per_s * draw.uniform(0.5, 2.0)
    both = link * draw.uniform(0.6, 0.9)
    profile = replace(SLOW_CORES, h2d_bytes_per_s=link, d2h_bytes_per_s=link, both_bytes_per_s=both)
    profile = replace(profile, host_update_numel_per_s=10 ** draw.uniform(5.0, 6.0))
    whole = _recipe().but(batches=[_recipe().batches[0]] * 4)
    tables = config_of(whole, ROOMY, "cpu", optimizer=AUTO)
    device = SimulatedDevice(ROOMY, poison=False, profile=profile)
    model = whole.build()
    engine = Engine(model, whole.optimizer(trainable(model)), None, load_config(tables), device, None)
    engine._planner._policy = replace(engine._planner._policy, profile=profile)
    place(engine, every=draw.choice([1, 2]), piece_numel=1024)
    times = []
    for batch in whole.batches:
        engine.zero_grad()
        engine.backward(engine(**batch).loss)
        engine.step()
        times.append(device.virtual_time_s)
    assert engine.plan.streamed_numel > 0
    assert engine.plan.predicted_step_s == pytest.approx(times[-1] - times[-2], rel=0.15)
    engine.close()


# -- several ranks ---------------------------------------------------------------------------------------------------


def _rank(is_streamed: bool) -> tuple[dict[str, torch.Tensor], int]:
    import zero

    whole = _recipe()
    model = whole.build()
    config = {
        "device": {"type": "simulated", "memory": ROOMY},
        "memory": {"policy": "cpu"},
        "precision": {"dtype": "bf16"},
        "optimizer": AUTO,
        "parallel": {"replicate": "1KiB"},
        "train": {"max_grad_norm": 0.05},
    }
    engine = zero.initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-2), config=config)[0]
    if is_streamed:
        place(engine, piece_numel=512)
    else:
        force(engine, [Placement(0, fact.numel) for fact in engine.facts])
    carried = counted(engine)
    _train(engine, whole, 3)
    engine.check_integrity()
    weights = {name: value.clone() for name, value in engine.module.state_dict().items()}
    engine.close()
    return weights, len(carried)


def test_each_rank_streams_its_own_part() -> None:
    streamed, resident = run_ranks(_rank, 2, True), run_ranks(_rank, 2, False)
    assert all(num_pieces > 0 for _, num_pieces in streamed)
    for name, value in resident[0][0].items():
        assert torch.equal(streamed[0][0][name], value), name
        assert torch.equal(streamed[1][0][name], value), name
