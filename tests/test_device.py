"""The real device's figures, with host memory that is counted in place of an accelerator's allocator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemini.accelerator import AcceleratorDevice


class Allocator:
    """What ``torch.accelerator`` tells of memory: bytes now, and the highest since the last reset, as they come and go."""

    def __init__(self) -> None:
        self.allocated_bytes = 0
        self.peak_bytes = 0

    def add(self, num_bytes: int) -> None:
        self.allocated_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)

    def reset(self, device: object) -> None:
        del device
        self.peak_bytes = self.allocated_bytes


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    made = Allocator()
    answers = {
        "is_available": lambda: True,
        "current_device_index": lambda: 0,
        "current_accelerator": lambda: torch.device("cpu"),
        "get_memory_info": lambda device: (700, 1000),
        "memory_reserved": lambda device: 200,
        "memory_allocated": lambda device: made.allocated_bytes,
        "max_memory_allocated": lambda device: made.peak_bytes,
        "reset_peak_memory_stats": made.reset,
        "synchronize": lambda device: None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.accelerator, name, answer)
    empty, resize = torch.empty, torch.UntypedStorage.resize_

    def counted_empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        buffer = empty(*args, **kwargs)
        made.add(buffer.nbytes)
        return buffer

    def counted_resize(storage: torch.UntypedStorage, num_bytes: int) -> Any:
        made.add(num_bytes - storage.nbytes())
        return resize(storage, num_bytes)

    monkeypatch.setattr(torch, "empty", counted_empty)
    monkeypatch.setattr(torch.UntypedStorage, "resize_", counted_resize)
    return made


def test_what_this_process_holds_is_its_own(allocator: Allocator) -> None:
    device = AcceleratorDevice()
    assert device.capacity_bytes == 700 + 200
    assert device.name == "cpu:0"
    with pytest.raises(ValueError, match="cannot cap a cpu device"):
        AcceleratorDevice(cap_bytes=100)
    assert not device.register_host_memory(0, 8)


def test_peaks_that_do_not_coincide_are_told_apart(allocator: Allocator) -> None:
    """The allocator knows the peak of the sum only; activations may be highest while little model data is there."""
    device = AcceleratorDevice()
    device.reset_peaks()
    chunk = device.allocate(100, torch.int8)
    allocator.add(10)
    allocator.add(-10)
    device.give_back(chunk)
    device.take_again(chunk, 20)
    allocator.add(80)
    allocator.add(-80)
    memory = device.memory()
    assert (memory.peak_bytes, memory.non_model_peak_bytes) == (110, 80)
    assert (memory.model_data_bytes, memory.non_model_bytes) == (20, 0)
    device.forget(chunk)
    allocator.add(-20)  # the last reference is gone
    device.reset_peaks()
    assert device.memory().peak_bytes == device.memory().non_model_peak_bytes == 0
    assert device.lifetime_peaks().device_bytes == 110
    assert device.lifetime_peaks().non_model_bytes == 80


def test_copies_of_the_manager_are_no_work_of_the_model(allocator: Allocator) -> None:
    device = AcceleratorDevice()
    ones = torch.ones(8)
    device.counts_work = True
    with device.activity():
        ones.add_(1)
        with device.bookkeeping():
            ones.add_(1)
            ones.copy_(torch.zeros(8))
        ones.add_(1)
    assert device.work.num_ops == 2
    assert device.work.traffic_bytes == 2 * 2 * ones.nbytes


@given(events=st.lists(st.tuples(st.sampled_from(["chunk", "activation", "window"]), st.integers(1, 50)), max_size=40))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_figures_of_any_history_are_exact(allocator: Allocator, events: list[tuple[str, int]]) -> None:
    allocator.__init__()  # type: ignore[misc]
    device = AcceleratorDevice()
    device.reset_peaks()
    chunks: list[torch.Tensor] = []
    activations: list[int] = []
    peak = non_model_peak = 0
    for what, numel in events:
        if what == "window":
            device.reset_peaks()
            peak, non_model_peak = allocator.allocated_bytes, sum(activations)
        elif what == "chunk":
            if numel % 3 or not chunks:
                chunks.append(device.allocate(numel, torch.int8))
            else:
                device.give_back(chunks.pop())
        elif numel % 3 or not activations:
            activations.append(numel)
            allocator.add(numel)
        else:
            allocator.add(-activations.pop())
        peak = max(peak, allocator.allocated_bytes)
        non_model_peak = max(non_model_peak, sum(activations))
        memory = device.memory() if numel % 2 else None
        if memory is not None:
            assert (memory.peak_bytes, memory.non_model_peak_bytes) == (peak, non_model_peak)
            assert memory.non_model_bytes == sum(activations)
    memory = device.memory()
    assert (memory.peak_bytes, memory.non_model_peak_bytes) == (peak, non_model_peak)
