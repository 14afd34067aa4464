"""Memory that nobody uses goes back to the operating system."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zero
from gemini.arena import HostArena
from gemini.device import HostDevice
from gemini.heap import LARGE_BYTES, give_back_free_memory, own_mapping
from gemini.hostinfo import process_rss_bytes
from gemini.simulated import SimulatedDevice
from zero.precision import gradient_statistics, unscaled

MB = 10**6
glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do without")


def in_a_process_of_its_own(test: Callable[[], None]) -> Callable[[], None]:
    """What other tests have left running, or in the heap, is not in the figures."""

    def alone() -> None:
        call = f"from tests import test_heap; test_heap.{test.__name__}.here()"
        root = Path(__file__).parents[1]
        done = subprocess.run([sys.executable, "-c", call], cwd=root, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    alone.here = test  # type: ignore[attr-defined]
    alone.__name__ = test.__name__
    return alone


@glibc_only
@in_a_process_of_its_own
def test_buffers_that_come_and_go_leave_nothing_behind() -> None:
    device = SimulatedDevice(1 << 30)
    numel = 8 << 20
    buffers = [device.allocate(numel, torch.uint8).fill_(1) for _ in range(4)]
    small = []
    give_back_free_memory()
    before_bytes = process_rss_bytes()
    for _ in range(10):
        for buffer in buffers:
            device.give_back(buffer)
        for buffer in buffers:
            device.take_again(buffer, numel)
            buffer.fill_(1)
            small.append(torch.ones(1000))  # what keeps a heap from shrinking
    assert process_rss_bytes() - before_bytes < numel
    for buffer in buffers:
        device.give_back(buffer)
    assert process_rss_bytes() - before_bytes < -3 * numel


@glibc_only
@in_a_process_of_its_own
def test_a_large_block_inside_own_mapping_goes_when_it_is_freed() -> None:
    with own_mapping(64 * MB):
        blocks = [torch.ones(8 * MB, dtype=torch.uint8) for _ in range(8)]
    keep = torch.ones(1000)
    held_bytes = process_rss_bytes()
    blocks.clear()
    assert held_bytes - process_rss_bytes() > 60 * MB
    assert keep.sum() == 1000
    with own_mapping(LARGE_BYTES - 1):  # nothing to do for small ones
        pass


def _freed_bytes() -> int:
    """What goes back to the machine of 64 MB of computation's blocks, each with something small behind it."""
    blocks, small = [], []
    for _ in range(8):
        blocks.append(torch.ones(8 * MB, dtype=torch.uint8))
        small.append(torch.ones(1000))
    held_bytes = process_rss_bytes()
    blocks.clear()
    return held_bytes - process_rss_bytes()


@glibc_only
@in_a_process_of_its_own
def test_where_the_host_is_the_device_computation_leaves_no_holes() -> None:
    devices = [HostDevice(), HostDevice()]
    for device in devices:
        device.allocate(16, torch.float32)
    assert _freed_bytes() > 60 * MB
    devices[0].close()
    devices[0].close()  # once more does nothing
    assert _freed_bytes() > 60 * MB, "another engine is still there"
    devices[1].close()
    assert _freed_bytes() < 60 * MB, "the heap is the user's own again"


_COPIES = """
import torch
from gemini.device import HostDevice
from gemini.hostinfo import process_rss_bytes

MB = 10**6
device, small = HostDevice(), []
buffers = [device.allocate(2 * MB, torch.uint8).fill_(1) for _ in range(16)]
for _ in range(5):
    for buffer in buffers:
        device.give_back(buffer)
        small.append(torch.ones(1000))
    for buffer in buffers:
        device.take_again(buffer, 2 * MB)
        buffer.fill_(1)
        small.append(torch.ones(1000))
held_bytes = process_rss_bytes()
for buffer in buffers:
    device.give_back(buffer)
print(held_bytes - process_rss_bytes())
"""


@glibc_only
def test_gathered_copies_on_the_host_give_their_memory_back() -> None:
    """In a process of its own: holes that others left in the heap would be filled first."""
    done = subprocess.run([sys.executable, "-c", _COPIES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 30 * MB


def test_the_norm_of_the_largest_gradients_keeps_no_copy() -> None:
    scratch: dict[torch.device, torch.Tensor] = {}
    small, large = torch.ones(1000, dtype=torch.bfloat16), torch.ones(9 << 20, dtype=torch.bfloat16)
    kept = unscaled(small, 1.0, scratch)
    assert scratch[small.device].data_ptr() == kept.data_ptr()
    assert torch.equal(unscaled(large, 0.5, scratch), large.float() * 0.5)
    assert sum(buffer.nbytes for buffer in scratch.values()) <= 4 * small.numel()


def _engine(**memory: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 300), nn.Tanh(), nn.Linear(300, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = {
        "device": {"type": "simulated", "memory": "64MiB"},
        "memory": {"policy": "cpu", **memory},
        "precision": {"dtype": "bf16"},
    }
    engine, *_ = zero.initialize(model, optimizer, config=settings)
    return model, engine


def _backward(engine: Any) -> None:
    engine.backward(engine(torch.ones(3, 7, dtype=torch.bfloat16)).float().square().sum())


def test_zero_grad_frees_gradients_as_torch_does() -> None:
    model, engine = _engine()
    _backward(engine)
    assert engine.memory_report().host_bytes_by_kind["gradients"] == 2 * sum(f.numel for f in engine.facts)
    shown = model[0].weight.grad
    values = shown.clone()
    engine.step()
    assert torch.equal(model[0].weight.grad, values), "until zero_grad it can be looked at"
    engine.zero_grad()
    assert "gradients" not in engine.memory_report().host_bytes_by_kind
    assert model[0].weight.grad is None
    assert torch.equal(shown, values), "what the user still holds stays"
    engine.check_integrity()
    _backward(engine)
    engine.step()
    engine.check_integrity()
    engine.close()


def test_zero_grad_frees_gradients_where_the_host_is_the_device() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 300), nn.Tanh(), nn.Linear(300, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = {"device": {"type": "cpu"}, "precision": {"dtype": "bf16"}}
    engine, *_ = zero.initialize(model, optimizer, config=config)
    _backward(engine)
    shown = model[0].weight.grad
    values = shown.clone()
    engine.step()
    gradients_bytes = 2 * sum(fact.numel for fact in engine.facts)
    assert engine.memory_report().device_bytes_by_kind["gradients"] == gradients_bytes
    engine.zero_grad()
    assert "gradients" not in engine.memory_report().device_bytes_by_kind
    assert torch.equal(shown, values), "what the user still holds stays"
    engine.check_integrity()
    _backward(engine)
    engine.step()
    engine.check_integrity()
    engine.close()


def test_pinned_gradients_stay_for_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedDevice, "register_host_memory", lambda *_: True)
    monkeypatch.setattr(SimulatedDevice, "unregister_host_memory", lambda *_: None)
    _, engine = _engine()
    assert engine.memory_report().pinned_bytes > 0
    _backward(engine)
    engine.step()
    engine.zero_grad()
    assert "gradients" in engine.memory_report().host_bytes_by_kind
    engine.close()


@pytest.mark.parametrize("inverse_scale", [1.0, 2.0**-7, 1 / 3])
def test_the_norm_in_a_shared_buffer_is_the_same_to_the_last_bit(inverse_scale: float) -> None:
    model, engine = _engine()
    _backward(engine)
    gradients = [p.grad.to(torch.float32) * inverse_scale for p in model.parameters()]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    statistics = gradient_statistics(engine._ordered, inverse_scale)
    assert statistics.norm == norm.item()
    assert statistics.norm > 0
    engine.close()


def test_host_memory_comes_zero_filled() -> None:
    """Companions of segments rely on it: they are not written before they are used."""
    arena = HostArena(SimulatedDevice(1 << 20), pin=False)
    for numel in (1, 1000, 3_000_000):
        dirty = arena.allocate(numel, torch.float32).fill_(5)
        arena.release(dirty)
        del dirty
        assert not arena.allocate(numel, torch.float32).any()
