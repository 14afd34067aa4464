"""The simulated device: everything counts, nothing goes over, released memory is poison, and nothing leaks."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from gemini.device import Device
from gemini.simulated import SimulatedDevice
from gemini.tracker import StorageTracker
from gemini.work import tensors_in

CAPACITY_BYTES = 4096


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    made = SimulatedDevice(CAPACITY_BYTES)
    yield made
    made.close()


# -- capacity --------------------------------------------------------------------------------------------------------


def test_chunks_activations_and_temporaries_share_one_capacity(device: SimulatedDevice) -> None:
    chunk = device.allocate(512, torch.float32)
    with device.activity():
        kept = torch.empty(256)
        memory = device.memory()
        assert (memory.model_data_bytes, memory.non_model_bytes, memory.peak_bytes) == (2048, 1024, 3072)
        with pytest.raises(
            torch.OutOfMemoryError, match=r"allocate 2\.00 KiB; capacity 4\.00 KiB, model data 2\.00 KiB"
        ):
            torch.empty(512)
        with pytest.raises(torch.OutOfMemoryError):
            kept + torch.empty(256)  # the temporary fits, the result beside it does not
        assert device.memory().peak_bytes == CAPACITY_BYTES
        with pytest.raises(torch.OutOfMemoryError):
            device.allocate(257, torch.float32)
        device.give_back(chunk)
        torch.empty(512)
        with pytest.raises(torch.OutOfMemoryError):
            device.take_again(chunk, 1024)
        device.take_again(chunk, 768)
        assert device.memory().model_data_bytes == 3072
        del kept
    assert device.memory().non_model_bytes == 0
    assert device.memory().peak_bytes == CAPACITY_BYTES


def test_what_computation_makes_outside_any_activity_is_not_on_the_device(device: SimulatedDevice) -> None:
    outside = torch.empty(5000)
    with device.activity(), device.bookkeeping():
        inside = torch.empty(5000)
    assert device.memory().non_model_bytes == 0
    del outside, inside


def test_views_and_results_in_place_count_once(device: SimulatedDevice) -> None:
    with device.activity():
        whole = torch.zeros(64)
        views = [whole[8:], whole.view(8, 8).t(), whole.add_(1), whole.expand(4, 64)]
        assert device.memory().non_model_bytes == 256
        copies = [whole.clone(), whole.to(torch.float64)]
        assert device.memory().non_model_bytes == 256 + 256 + 512
        del whole
        assert device.memory().non_model_bytes == 1024, "a storage that views still hold was let go"
        del views
        assert device.memory().non_model_bytes == 768
        del copies
    assert device.memory().non_model_bytes == 0


def test_what_an_operator_returns_in_a_nest_counts(device: SimulatedDevice) -> None:
    with device.activity():
        values, indices = torch.arange(32.0).topk(4)
        assert device.memory().non_model_bytes == 4 * 4 + 4 * 8
        parts = torch.arange(32.0).split(8)
        assert device.memory().non_model_bytes == 4 * 4 + 4 * 8 + 128
    del values, indices, parts
    assert list(tensors_in([torch.ones(1), (None, 3, [torch.ones(2)])]))[1].numel() == 2


@given(sizes=st.lists(st.tuples(st.integers(1, 400), st.booleans(), st.booleans()), max_size=30))
@settings(max_examples=60, deadline=None)
def test_no_order_of_requests_goes_over(sizes: list[tuple[int, bool, bool]]) -> None:
    device = SimulatedDevice(CAPACITY_BYTES)
    chunks: list[torch.Tensor] = []
    activations: list[torch.Tensor] = []
    with device.activity():
        for numel, is_chunk, drops in sizes:
            in_use = sum(t.nbytes for t in chunks + activations)
            try:
                (chunks if is_chunk else activations).append(
                    device.allocate(numel, torch.float32) if is_chunk else torch.empty(numel)
                )
            except torch.OutOfMemoryError:
                assert in_use + 4 * numel > CAPACITY_BYTES, "a request that fits was refused"
            else:
                assert in_use + 4 * numel <= CAPACITY_BYTES
            if drops and chunks:
                device.give_back(chunks.pop(0))
            if drops and activations:
                activations.pop(0)
            memory = device.memory()
            assert memory.model_data_bytes == sum(t.nbytes for t in chunks)
            assert memory.non_model_bytes == sum(t.nbytes for t in activations)
            assert memory.peak_bytes <= CAPACITY_BYTES
    device.close()


@pytest.mark.parametrize("capacity_bytes", [0, -1])
def test_a_capacity_must_be_positive(capacity_bytes: int) -> None:
    with pytest.raises(ValueError, match="positive capacity"):
        SimulatedDevice(capacity_bytes)


# -- windows and peaks -----------------------------------------------------------------------------------------------


def test_peaks_are_of_a_window_and_of_a_life(device: SimulatedDevice) -> None:
    with device.activity():
        torch.empty(512)
        device.reset_peaks()
        assert device.memory().peak_bytes == device.memory().non_model_peak_bytes == 0
        chunk = device.allocate(100, torch.float32)
        torch.empty(50)
        assert device.memory().non_model_peak_bytes == 200
        assert device.memory().peak_bytes == 600
        device.give_back(chunk)
        device.reset_peaks()
    peaks = device.lifetime_peaks()
    assert (peaks.device_bytes, peaks.model_data_bytes, peaks.non_model_bytes) == (2048, 400, 2048)


def test_a_refused_request_tells_what_would_have_been_needed(device: SimulatedDevice) -> None:
    with device.activity():
        kept = torch.empty(256)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(1000)
        assert device.refused_bytes == kept.nbytes + 4000
        assert device.memory().non_model_peak_bytes == 1024
    device.reset_peaks()
    assert device.refused_bytes == 0


# -- poison ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_memory_is_poison_when_it_comes_and_when_it_goes(device: SimulatedDevice, dtype: torch.dtype) -> None:
    buffer = device.allocate(8, dtype)
    view = buffer[2:4]
    assert buffer.isnan().all()
    buffer.fill_(1)
    device.give_back(buffer)
    assert buffer.untyped_storage().nbytes() == 0
    device.take_again(buffer, 8)
    assert view.isnan().all(), "a saved view does not see the memory that came back under it"


def test_what_is_forgotten_lives_and_counts_as_long_as_somebody_holds_it(device: SimulatedDevice) -> None:
    """A graph that saved a resident weight before its chunk left: its values must still be there in backward."""
    buffer = device.allocate(8, torch.float32).fill_(2)
    view = buffer[2:4]
    device.forget(buffer)
    del buffer
    assert view.tolist() == [2, 2]
    memory = device.memory()
    assert (memory.model_data_bytes, memory.non_model_bytes) == (0, 32)
    with pytest.raises(torch.OutOfMemoryError):
        device.allocate(CAPACITY_BYTES // 4, torch.float32)
    del view
    assert device.memory().non_model_bytes == 0


@pytest.mark.parametrize("poison", [True, False])
def test_poison_can_be_turned_off(poison: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is in memory that nobody has written to is chance, and may be NaN as well.
    filled: list[float] = []
    fill = torch.Tensor.fill_
    monkeypatch.setattr(torch.Tensor, "fill_", lambda tensor, value: (filled.append(value), fill(tensor, value))[1])
    device = SimulatedDevice(CAPACITY_BYTES, poison=poison)
    buffer = device.allocate(4, torch.float32)
    device.give_back(buffer)
    device.take_again(buffer, 4)
    assert bool(filled) == poison
    assert buffer.isnan().all() or not poison
    device.close()


_READS = {
    "sum": lambda t: t.sum(),
    "matmul": lambda t: torch.ones(2, 4) @ t,
    "in a list": lambda t: torch.cat([torch.ones(4), t]),
    "in place": lambda t: t.add_(1),
    "as an option": lambda t: torch.add(torch.ones(4), torch.ones(4), out=t),
    "as a keyword": lambda t: torch.ops.aten.clamp.Tensor(torch.ones(4), min=t),
    "copied from": lambda t: torch.empty(4).copy_(t),
    "by a view": lambda t: t.view(2, 2) * 1,
}


@pytest.mark.parametrize("read", _READS.values(), ids=_READS)
def test_a_released_view_raises_instead_of_ending_the_process(device: SimulatedDevice, read: object) -> None:
    buffer = device.allocate(8, torch.float32)
    view = buffer[:4]
    with device.activity():
        device.give_back(buffer)
        with pytest.raises(RuntimeError, match="memory was given back"):
            read(view)  # type: ignore[operator]
        device.take_again(buffer, 8)
        buffer.fill_(1)
        read(view)  # type: ignore[operator]


def test_a_released_view_read_in_backward_raises_and_the_process_lives() -> None:
    """In a process of its own: without the guard it is a segmentation fault."""
    code = """
        import torch
        from gemini.simulated import SimulatedDevice
        device = SimulatedDevice(1 << 20)
        buffer = device.allocate(16, torch.float32).fill_(1.0)
        weight = torch.nn.Parameter(torch.empty(4, 4))
        weight.data = buffer.view(4, 4)
        x = torch.ones(2, 4, requires_grad=True)
        with device.activity():
            loss = (x @ weight.t()).sum()
            device.give_back(buffer)
            try:
                loss.backward()
            except RuntimeError as error:
                print("lives:", "given back" in str(error))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "lives: True\n"), done.stderr


# -- activities ------------------------------------------------------------------------------------------------------


def test_activities_nest_and_end_with_an_error(device: SimulatedDevice) -> None:
    with device.activity():
        with device.activity():
            first = torch.empty(10)
        second = torch.empty(10)
        assert device.memory().non_model_bytes == 80
        with pytest.raises(ZeroDivisionError), device.activity():
            _ = 1 // 0
        third = torch.empty(10)
        assert device.memory().non_model_bytes == 120
    with pytest.raises(ZeroDivisionError), device.activity():
        _ = 1 // 0
    outside = torch.empty(10)
    assert device.memory().non_model_bytes == 120
    with device.activity():
        fourth = torch.empty(10)
        assert device.memory().non_model_bytes == 160
    del first, second, third, fourth, outside


def test_two_devices_count_each_for_itself(device: SimulatedDevice) -> None:
    other = SimulatedDevice(CAPACITY_BYTES)
    with device.activity():
        mine = torch.empty(10)
    with other.activity():
        theirs = torch.empty(20)
    assert (device.memory().non_model_bytes, other.memory().non_model_bytes) == (40, 80)
    del mine, theirs
    other.close()


def test_a_backward_pass_is_watched_only_while_it_is_expected(device: SimulatedDevice) -> None:
    seen: list[int] = []
    x = torch.ones(8, requires_grad=True)

    def backward() -> int:
        seen.clear()
        x.grad = None
        y = x * 2
        y.register_hook(lambda gradient: seen.append(device.memory().non_model_bytes))
        y.sum().backward()
        return seen[0]

    assert backward() == 0
    device.expects_backward = True
    assert backward() > 0
    device.expects_backward = False
    assert backward() == 0


def test_closing_the_last_device_restores_the_entry_point() -> None:
    gc.collect()
    before = torch.autograd.backward
    first = SimulatedDevice(CAPACITY_BYTES)
    second = SimulatedDevice(CAPACITY_BYTES)
    watched = torch.autograd.backward
    first.expects_backward = second.expects_backward = True
    first.close()
    assert torch.autograd.backward == watched
    x = torch.ones(8, requires_grad=True)
    (x * 2).sum().backward()
    assert first.lifetime_peaks().non_model_bytes == 0, "a closed device still counts"
    assert second.lifetime_peaks().non_model_bytes > 0
    second.close()
    assert torch.autograd.backward == before or "_BackwardWatch" in repr(before)
    second.close()  # twice is once


# -- no leak ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_two_hundred_steps_leave_nothing_behind(recompute: bool | None) -> None:
    device = SimulatedDevice(1 << 20)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    device.expects_backward = True
    live, storages, peaks = [], [], []
    for _ in range(200):
        device.reset_peaks()
        x = torch.randn(4, 8, requires_grad=True)
        with device.activity():
            out = model(x) if recompute is None else checkpoint(model, x, use_reentrant=recompute)
            loss = (out**2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del out, loss, x
        live.append(device.memory().non_model_bytes)
        storages.append(len(device._tracker._storages))
        peaks.append(device.memory().non_model_peak_bytes)
    # Parameters count from the first operator that returns a view of them; after the first step nothing more comes.
    assert len(set(live[1:])) == len(set(storages[1:])) == len(set(peaks[1:])) == 1
    assert live[-1] <= sum(p.nbytes for p in model.parameters())
    assert peaks[-1] > live[-1] + 4 * 8 * 4
    del model, optimizer
    gc.collect()
    assert device.memory().non_model_bytes == 0
    device.close()


def test_buffers_that_come_and_go_leave_nothing_behind(device: SimulatedDevice) -> None:
    for _ in range(200):
        buffer = device.allocate(100, torch.float32)
        device.give_back(buffer)
        device.take_again(buffer, 100)
        device.forget(buffer)
        del buffer
    assert device.memory().model_data_bytes == 0
    assert not device._tracker._storages


def test_a_tracker_that_goes_first_is_not_missed() -> None:
    tracker = StorageTracker(lambda num_bytes: None)
    with tracker:
        made = torch.empty(4)
    assert tracker.live_bytes == 16
    del tracker
    gc.collect()
    del made  # its end is told to nobody


def test_the_contract_has_defaults_that_do_nothing() -> None:
    class Least(SimulatedDevice):
        activity = Device.activity
        bookkeeping = Device.bookkeeping

    least = Least(CAPACITY_BYTES)
    with least.activity(), least.bookkeeping():
        torch.empty(10)
    assert least.memory().non_model_bytes == 0
    assert Device.refused_bytes.fget(least) == 0  # type: ignore[attr-defined]
    least.close()
