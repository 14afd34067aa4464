"""Host memory: exact bytes, a budget, pinning; and the books over all tiers."""

from __future__ import annotations

import gc
import mmap
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.arena import HostArena, HostMemoryError
from gemini.device import HostDevice
from gemini.simulated import SimulatedDevice
from gemini.store import Kind, Store, Tier


class PinningDevice(HostDevice):
    """Pins what it is told to, as far as ``limit_bytes`` goes."""

    def __init__(self, limit_bytes: int = 1 << 30) -> None:
        super().__init__()
        self.registered: dict[int, int] = {}
        self.limit_bytes = limit_bytes

    def register_host_memory(self, address: int, num_bytes: int) -> bool:
        if sum(self.registered.values()) + num_bytes > self.limit_bytes:
            return False
        self.registered[address] = num_bytes
        return True

    def unregister_host_memory(self, address: int) -> None:
        del self.registered[address]


DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.bool]


@given(
    requests=st.lists(st.tuples(st.integers(0, 5000), st.sampled_from(DTYPES), st.booleans()), max_size=20),
    pin=st.booleans(),
    budget_bytes=st.one_of(st.none(), st.integers(0, 40_000)),
    limit_bytes=st.integers(0, 40_000),
)
@settings(max_examples=100, deadline=None)
def test_every_byte_is_counted_once(
    requests: list[tuple[int, torch.dtype, bool]], pin: bool, budget_bytes: int | None, limit_bytes: int
) -> None:
    device = PinningDevice(limit_bytes)
    arena = HostArena(device, pin, budget_bytes)
    held: list[torch.Tensor] = []
    for numel, dtype, releases in requests:
        num_bytes = numel * dtype.itemsize
        fits = budget_bytes is None or arena.host_bytes + num_bytes <= budget_bytes
        try:
            buffer = arena.allocate(numel, dtype)
        except HostMemoryError:
            assert not fits
        else:
            assert fits or num_bytes == 0
            assert (buffer.shape, buffer.dtype, buffer.nbytes) == ((numel,), dtype, num_bytes)
            assert not buffer.any(), "fresh memory is not zero"
            buffer.fill_(1)
            held.append(buffer)
        if releases and held:
            arena.release(held.pop(0))
        assert arena.host_bytes == sum(buffer.nbytes for buffer in held)
        assert arena.pinned_bytes == sum(device.registered.values()) <= arena.host_bytes
        assert arena.pinned_bytes == 0 or pin
        assert set(device.registered) <= {buffer.data_ptr() for buffer in held}
    while held:
        arena.release(held.pop())
    assert arena.host_bytes == arena.pinned_bytes == len(device.registered) == 0


def test_pinned_memory_is_not_rounded_up() -> None:
    arena = HostArena(PinningDevice())
    buffers = [arena.allocate(n, torch.float32) for n in (1, 1025, 262_145)]
    assert arena.pinned_bytes == arena.host_bytes == 4 * (1 + 1025 + 262_145)
    # A mapping begins at a page, which is what registering needs.
    assert all(buffer.data_ptr() % mmap.PAGESIZE == 0 for buffer in buffers)


def test_the_refusal_says_what_there_is_and_what_to_do() -> None:
    arena = HostArena(HostDevice(), budget_bytes=3 << 20)
    kept = arena.allocate(1 << 19, torch.float32)
    with pytest.raises(
        HostMemoryError, match=r"2\.00 MiB more .* 2\.00 MiB of the budget of 3\.00 MiB .* memory\.host"
    ):
        arena.allocate(1 << 19, torch.float32)
    assert arena.host_bytes == kept.nbytes
    arena.release(kept)
    arena.allocate(1 << 19, torch.float32)


def test_what_the_system_does_not_give_is_refused_in_words() -> None:
    arena = HostArena(HostDevice())
    with pytest.raises(HostMemoryError, match="operating system gave no"):
        arena.allocate(1 << 55, torch.float32)
    assert arena.host_bytes == 0


def test_memory_lives_as_long_as_a_view_of_it() -> None:
    arena = HostArena(HostDevice())
    buffer = arena.allocate(1 << 16, torch.float32)
    view = buffer[10:20]
    view.fill_(7)
    arena.release(buffer)
    del buffer
    gc.collect()
    assert view.tolist() == [7.0] * 10


# -- the books -------------------------------------------------------------------------------------------------------


@pytest.fixture
def store() -> Iterator[Store]:
    device = SimulatedDevice(1 << 20)
    yield Store(device, HostArena(device))
    device.close()


def test_bytes_by_tier_and_kind(store: Store) -> None:
    values = store.allocate(Tier.DEVICE, Kind.PARAMETERS, 10, torch.bfloat16)
    master = store.allocate(Tier.HOST, Kind.MASTER, 10, torch.float32)
    gathered = store.allocate(Tier.DEVICE, Kind.GATHERED, 4, torch.float32)
    assert store.kinds(Tier.DEVICE) == {"parameters": 20, "gathered": 16}
    assert store.kinds(Tier.HOST) == {"master": 40}
    assert (store.tier_bytes(Tier.DEVICE), store.tier_bytes(Tier.HOST), store.tier_bytes(Tier.DISK)) == (36, 40, 0)
    store.check_integrity()
    store.free(Tier.DEVICE, Kind.GATHERED, gathered)
    assert gathered.untyped_storage().nbytes() == 0, "a gathered buffer keeps its identity and loses its memory"
    store.free(Tier.DEVICE, Kind.PARAMETERS, values)
    assert values.untyped_storage().nbytes() == 20, "the memory of other buffers goes with their last reference"
    store.free(Tier.HOST, Kind.MASTER, master)
    assert store.kinds(Tier.DEVICE) == store.kinds(Tier.HOST) == {}
    store.check_integrity()


def test_books_that_do_not_balance_are_found(store: Store) -> None:
    buffer = store.allocate(Tier.DEVICE, Kind.PARAMETERS, 10, torch.float32)
    store.device.give_back(buffer)
    with pytest.raises(RuntimeError, match="device: buffers add up to 40 bytes, the device counted 0"):
        store.check_integrity()
    store.bytes_by.clear()
    store.bytes_by[Tier.HOST, Kind.MASTER] = 8
    with pytest.raises(RuntimeError, match="host: buffers add up to 8"):
        store.check_integrity()
    store.bytes_by.update({(Tier.HOST, Kind.PARAMETERS): -8})
    with pytest.raises(RuntimeError, match="negative"):
        store.check_integrity()


def test_a_request_that_fails_is_not_counted(store: Store) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        store.allocate(Tier.DEVICE, Kind.OPTIMIZER, 1 << 20, torch.float32)
    store.host.budget_bytes = 3
    with pytest.raises(HostMemoryError):
        store.allocate(Tier.HOST, Kind.OPTIMIZER, 1, torch.float32)
    store.check_integrity()
    assert not +store.bytes_by
