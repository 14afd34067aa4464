"""Whenever copies run, the numbers are the same; and where a wait is missing, they are not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_case import ROOMY_BYTES, House, build, close, spec

from gemini.accelerator import AcceleratorDevice
from gemini.device import HostDevice
from gemini.plan import Plan
from gemini.policy import Policy
from gemini.segment import GRADIENT, MASTER, Placement
from gemini.simulated import SimulatedDevice, StreamOrder
from gemini.simulated_queues import SimulatedStream
from gemini.store import Tier
from gemini.transfer import Transfer

NUM_LAYERS = 3
WIDTH = 4


def _house(dtype: torch.dtype, order: StreamOrder, seed: int = 0, capacity_bytes: int = ROOMY_BYTES) -> House:
    units = [[spec(f"{i}.w", WIDTH, WIDTH, dtype=dtype), spec(f"{i}.b", WIDTH, dtype=dtype)] for i in range(NUM_LAYERS)]
    house = build(units, capacity_bytes=capacity_bytes, order=order)
    house.device._random.seed(seed)
    return house


def _train(house: House, placements: list[Placement], num_steps: int = 3) -> list[torch.Tensor]:
    """Layers ``x @ w + b`` by hand through the manager: fetch, compute, gradient out, update; returns all weights."""
    manager, dtype = house.manager, house.layouts[0].dtype
    manager.apply(Plan("test", placements))
    for step in range(num_steps):
        x = torch.linspace(-1, 1, WIDTH).repeat(2, 1).to(dtype)
        manager.begin_pass(True, (2, WIDTH))
        inputs = []
        for number, chunk in enumerate(house.chunks):
            manager.enter(f"layer{number}")
            manager.begin_moment(f"layer{number}", "forward")
            w, b = chunk.tensors
            inputs.append(x)
            manager.read(w)
            manager.read(b)
            x = torch.tanh(x @ w.parameter + b.parameter)
            manager.leave()
        manager.end_forward_pass()
        manager.begin_backward()
        flow = x
        for number, chunk in reversed(list(enumerate(house.chunks))):
            manager.begin_unit_backward(f"layer{number}")
            w, b = chunk.tensors
            manager.unpack(w)
            before = flow
            flow = before @ w.parameter.t()
            manager.take_gradient(w, inputs[number].t() @ before)
            manager.take_gradient(b, before.sum(0))
            manager.end_unit_backward(f"layer{number}")
        manager.end_backward()
        manager.check_integrity()
        _update(house)
        if step == 0 and manager.trace is not None:
            plan = Policy("cpu").decide(house.facts, manager.trace, house.device.capacity_bytes)
            plan.placements = placements
            manager.apply(plan)
    return [tensor.chunk.values_of(tensor) for tensor in house.tensors]


def _update(house: House) -> None:
    house.manager.release_stale()
    for chunk in house.chunks:
        for segment in chunk.segments:
            master = segment.companions[MASTER]
            master.sub_(segment.companions[GRADIENT].float(), alpha=0.1)
            if segment.master_is_values:
                continue
            rounded = master.to(segment.values.dtype)
            if segment.value_tier is segment.companion_tier:
                segment.values.copy_(rounded)
            elif segment.value_tier is Tier.DEVICE:
                house.transfer.values_in(segment.values, rounded)
            else:
                house.transfer.values_out(segment.values, rounded)
        for tensor in chunk.tensors:
            tensor.has_gradient = False


PLACEMENTS = {
    "offloaded": [Placement()] * NUM_LAYERS,
    "cut in two": [Placement(7, 3), Placement(3, 7), Placement(20, 0)],
    "resident": [Placement(20, 20)] * NUM_LAYERS,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("placements", PLACEMENTS.values(), ids=PLACEMENTS)
def test_orders_and_seeds_give_identical_bits(placements: list[Placement], dtype: torch.dtype) -> None:
    runs = [(StreamOrder.IMMEDIATE, 0), (StreamOrder.PROCRASTINATING, 0)]
    runs += [(StreamOrder.RANDOM, seed) for seed in range(12)]
    results = []
    for order, seed in runs:
        house = _house(dtype, order, seed)
        results.append(_train(house, placements))
        close(house)
    assert all(values.isfinite().all() for values in results[0])
    assert not torch.equal(results[0][0], _house(dtype, StreamOrder.IMMEDIATE).originals["0.w"].to(dtype)), "no update"
    for result in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], result, strict=True))


@given(seed=st.integers(0, 10**6), capacity_bytes=st.integers(350, 900))
@settings(max_examples=30, deadline=None)
def test_random_orders_on_small_devices(seed: int, capacity_bytes: int) -> None:
    plain = _house(torch.float32, StreamOrder.IMMEDIATE)
    tight = _house(torch.float32, StreamOrder.RANDOM, seed, capacity_bytes)
    pairs = zip(_train(plain, PLACEMENTS["offloaded"]), _train(tight, PLACEMENTS["offloaded"]), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    close(plain)
    close(tight)


# -- a wait is removed -----------------------------------------------------------------------------------------------


def _no_wait_before_reading(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimulatedDevice, "wait", lambda self, event: None)


def _no_wait_for_gradients(patch: pytest.MonkeyPatch) -> None:
    original = Transfer.gradient_out

    def hasty(self: Transfer, *args: object, **kwargs: object) -> None:
        patch.setattr("gemini.simulated_queues.SimulatedEvent.synchronize", lambda self: None)
        original(self, *args, **kwargs)  # type: ignore[arg-type]
        patch.setattr("gemini.simulated_queues.SimulatedEvent.synchronize", _synchronize)

    patch.setattr(Transfer, "gradient_out", hasty)


def _no_wait_for_new_values(patch: pytest.MonkeyPatch) -> None:
    def hasty(self: Transfer, target: torch.Tensor, source: torch.Tensor) -> None:
        self._out.copy(target, source)

    patch.setattr(Transfer, "values_out", hasty)
    patch.setattr(Transfer, "values_in", hasty)


def _synchronize(event: object) -> None:
    event._stream.run_until(event._position)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("remove", "placements"),
    [
        (_no_wait_before_reading, "offloaded"),
        (_no_wait_before_reading, "cut in two"),
        (_no_wait_for_gradients, "offloaded"),
        (_no_wait_for_new_values, "cut in two"),
    ],
)
def test_a_missing_wait_is_a_wrong_number(
    remove: Callable[[pytest.MonkeyPatch], None], placements: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = _house(torch.float32, StreamOrder.IMMEDIATE)
    right = _train(house, PLACEMENTS[placements])
    close(house)
    remove(monkeypatch)
    house = _house(torch.float32, StreamOrder.PROCRASTINATING)
    wrong = _train(house, PLACEMENTS[placements])
    assert not all(torch.equal(mine, theirs) for mine, theirs in zip(right, wrong, strict=True))
    close(house)


def test_without_the_wait_before_reading_the_computation_sees_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    _no_wait_before_reading(monkeypatch)
    house = _house(torch.float32, StreamOrder.PROCRASTINATING)
    chunk = house.chunks[0]
    chunk.fetch()
    chunk.acquire(chunk.tensors[0])
    assert chunk.tensors[0].parameter.isnan().all()
    monkeypatch.undo()
    house.device.wait(house.transfer.fetched_event())
    assert torch.equal(chunk.tensors[0].parameter, house.originals["0.w"])
    close(house)


def test_a_source_overwritten_too_early_is_seen() -> None:
    """A copy reads its source when it runs, not when it is queued."""
    device = SimulatedDevice(1 << 20)
    stream = device.stream("in")
    target, source = device.allocate(4, torch.float32), torch.ones(4)
    stream.copy(target, source)
    source.fill_(2.0)
    device.synchronize()
    assert torch.equal(target, torch.full((4,), 2.0))
    device.close()


# -- streams themselves ----------------------------------------------------------------------------------------------


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    made = SimulatedDevice(1 << 20)
    yield made
    made.close()


def test_an_event_runs_its_queue_so_far_and_no_further(device: SimulatedDevice) -> None:
    stream, other = device.stream("in"), device.stream("out")
    targets = [device.allocate(2, torch.float32) for _ in range(4)]
    for number, target in enumerate(targets[:3]):
        stream.copy(target, torch.full((2,), float(number)))
        if number == 1:
            event = stream.record()
    other.copy(targets[3], torch.ones(2))
    event.synchronize()
    assert [bool(target.isnan().any()) for target in targets] == [False, False, True, True]
    device.wait(event)
    assert targets[2].isnan().all()
    device.synchronize()
    assert [target[0].item() for target in targets] == [0.0, 1.0, 2.0, 1.0]


def test_memory_given_back_under_a_queued_copy(device: SimulatedDevice) -> None:
    """A real allocator waits for the streams that use a block: the copy gets its bytes, but no sooner than it runs."""
    stream = device.stream("out")
    buffer, landing = device.allocate(2, torch.float32), torch.zeros(2)
    buffer.fill_(5.0)
    stream.copy(landing, buffer)
    stream.copy(buffer, torch.ones(2))
    later = torch.zeros(2)
    stream.copy(later, torch.ones(2))
    device.give_back(buffer)
    assert landing.tolist() == [0.0, 0.0], "the copy ran though nobody waited for it"
    stream.record().synchronize()
    assert landing.tolist() == [5.0, 5.0]
    assert later.tolist() == [1.0, 1.0]
    assert buffer.untyped_storage().nbytes() == 0


def test_a_queue_that_another_thread_has_emptied_meanwhile(device: SimulatedDevice) -> None:
    stream = device.stream("out")
    landing = torch.zeros(2)
    stream.copy(landing, torch.ones(2))
    event = stream.record()
    thread = threading.Thread(target=event.wait_beside)
    thread.start()
    thread.join()
    assert isinstance(stream, SimulatedStream)
    stream.run_one()  # the program had seen that something was pending
    assert event.is_done
    assert landing.tolist() == [1.0, 1.0]


def test_a_gradient_whose_sum_breaks_off_keeps_nobody_waiting(device: SimulatedDevice) -> None:
    transfer = Transfer(device)
    arrival = transfer.gradient_out(torch.zeros(3), torch.ones(2), Tier.HOST, add=True)
    assert arrival is not None
    with pytest.raises(RuntimeError, match="size"):
        arrival.settle()
    assert not transfer._on_way, "what is too much on its way would be waited for without end"
    device.most_bytes_on_way = 0
    target = torch.zeros(2)
    later = transfer.gradient_out(target, torch.ones(2), Tier.HOST, add=True)
    assert later is not None
    assert later.is_settled
    arrival.settle()
    assert target.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_computation_that_broke_off_is_told_to_everyone_who_waits(
    error: type[BaseException], device: SimulatedDevice
) -> None:
    stream = device.stream("update")
    before, calls = stream.record(), []

    def work() -> None:
        calls.append(1)
        raise error

    stream.run(work, 1)
    after = stream.record()
    with pytest.raises(error):
        after.synchronize()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broke off"):
            after.synchronize()
    before.synchronize()
    device.synchronize()
    assert calls == [1], "it is not begun anew: nobody knows how far it came"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_job_that_broke_off_is_told_to_everyone_who_waits(
    error: type[BaseException], device: SimulatedDevice
) -> None:
    def work() -> None:
        raise error

    job = device.host_queue(None).submit(work)
    with pytest.raises(error):
        job.wait()
    with pytest.raises((ValueError, RuntimeError)):
        job.wait()


def test_random_orders_differ_and_repeat(device: SimulatedDevice) -> None:
    def pending(seed: int) -> list[int]:
        drawn = SimulatedDevice(1 << 20, StreamOrder.RANDOM, seed)
        streams = [drawn.stream("in"), drawn.stream("out")]
        counts = []
        for number in range(30):
            streams[number % 2].copy(drawn.allocate(1, torch.float32), torch.ones(1))
            counts.append(sum(stream.num_pending for stream in streams if isinstance(stream, SimulatedStream)))
        drawn.close()
        return counts

    assert pending(1) == pending(1)
    assert len({tuple(pending(seed)) for seed in range(5)}) == 5


def test_the_host_as_a_device_copies_at_once() -> None:
    host = HostDevice()
    stream = host.stream("in")
    target = host.allocate(3, torch.float32)
    stream.copy(target, torch.ones(3))
    stream.wait_compute()
    host.wait(stream.record())
    host.synchronize()
    assert torch.equal(target, torch.ones(3))
    assert host.memory().model_data_bytes == host.lifetime_peaks().model_data_bytes == 12
    host.give_back(target)
    assert host.memory().model_data_bytes == 0
    assert not host.register_host_memory(0, 8)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_it_says_what_to_use() -> None:
    with pytest.raises(ValueError, match="cpu or simulated"):
        AcceleratorDevice()
