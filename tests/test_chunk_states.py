"""The table of legal moves, and every illegal one, through the table and through a chunk's own methods."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory_case import House, build, close, equal_chunks, gradient_like, spec

from gemini.arena import HostMemoryError
from gemini.chunk import Chunk
from gemini.segment import GRADIENT, MASTER, Placement
from gemini.state import LEGAL_MOVES, IllegalMoveError, Move, TensorState, next_state
from gemini.store import Kind, Tier
from gemini.tensor import ChunkTensor

S = TensorState
ILLEGAL = [(move, state) for move in Move for state in S if state not in LEGAL_MOVES[move]]


def test_the_table_is_what_the_states_promise() -> None:
    assert set(LEGAL_MOVES) == set(Move)
    assert len(ILLEGAL) == len(Move) * len(S) - 16
    # Values leave the device only from where nobody reads them, and a gradient only to its owner.
    assert set(LEGAL_MOVES[Move.RELEASE]) == {S.HOLD, S.HOLD_AFTER_FORWARD, S.HOLD_AFTER_BACKWARD}
    assert set(LEGAL_MOVES[Move.REDUCE]) == {S.READY_FOR_REDUCE}
    for move, state in itertools.product(Move, S):
        after = LEGAL_MOVES[move].get(state)
        if after is not None:
            assert next_state(move, state, chunk=0, tensor="w") is after
            assert after is not state
    # Every state can be reached from FREE and can get back to it.
    reached = {S.FREE}
    for _ in S:
        reached |= {after for move in Move for state, after in LEGAL_MOVES[move].items() if state in reached}
    assert reached == set(S)


@pytest.mark.parametrize(("move", "state"), ILLEGAL, ids=lambda value: value.name)
def test_an_illegal_move_names_everything(move: Move, state: TensorState) -> None:
    with pytest.raises(IllegalMoveError) as raised:
        next_state(move, state, chunk=17, tensor="block.3.weight", step=29, rank=5)
    text = str(raised.value)
    for word in ("chunk 17", "block.3.weight", move.name, state.name, "step 29", "rank 5"):
        assert word in text
    for allowed in LEGAL_MOVES[move]:
        assert allowed.name in text


# -- through the chunk's own methods ---------------------------------------------------------------------------------


def _brought_to(state: TensorState) -> tuple[House, Chunk, ChunkTensor]:
    """A chunk of two tensors, the first in ``state`` and the second holding (or free with it)."""
    house = build([[spec("a", 6), spec("b", 4)]])
    chunk = house.chunks[0]
    chunk.step = 3
    tensor = chunk.tensors[0]
    if state is S.FREE:
        return house, chunk, tensor
    chunk.fetch()
    if state in (S.COMPUTE, S.HOLD_AFTER_FORWARD, S.HOLD_AFTER_BACKWARD):
        chunk.acquire(tensor)
    if state is S.HOLD_AFTER_FORWARD:
        chunk.let_go(tensor, Move.END_FORWARD)
    if state is S.HOLD_AFTER_BACKWARD:
        chunk.let_go(tensor, Move.END_BACKWARD)
    if state is S.READY_FOR_REDUCE:
        chunk.take_slot(tensor, gradient_like(tensor, 1))
    assert tensor.state is state
    return house, chunk, tensor


CALLS: dict[Move, Callable[[Chunk, ChunkTensor], None]] = {
    Move.FETCH: lambda chunk, _: chunk.fetch(),
    Move.ACQUIRE: lambda chunk, tensor: chunk.acquire(tensor),
    Move.LET_GO: lambda chunk, tensor: chunk.let_go(tensor, Move.LET_GO),
    Move.END_FORWARD: lambda chunk, tensor: chunk.let_go(tensor, Move.END_FORWARD),
    Move.END_BACKWARD: lambda chunk, tensor: chunk.let_go(tensor, Move.END_BACKWARD),
    Move.TAKE_SLOT: lambda chunk, tensor: chunk.take_slot(tensor, gradient_like(tensor, 2)),
    Move.RESTORE: lambda chunk, tensor: chunk.restore(tensor),
    Move.REDUCE: lambda chunk, _: chunk.reduce(),
    Move.RELEASE: lambda chunk, _: chunk.release(),
}
# A second holder is counted, not moved; a gradient has dismissed all holders, whose leaving is then nothing.
COUNTED = {(Move.ACQUIRE, S.COMPUTE)}
DISMISSED = {(move, S.READY_FOR_REDUCE) for move in (Move.LET_GO, Move.END_FORWARD, Move.END_BACKWARD)}
# reduce() takes each tensor by the move that its state asks for: RELEASE where there is no gradient.
REDUCES = {(Move.REDUCE, state) for state in LEGAL_MOVES[Move.RELEASE]}


def _picture(house: House, chunk: Chunk) -> list[Any]:
    house.device.synchronize()
    tensors = [(t.state, t.num_holders, t.has_gradient, t.parameter.data_ptr()) for t in chunk.tensors]
    buffer = chunk.buffer.clone() if chunk.on_device else None
    companions = {key: value.clone() for s in chunk.segments for key, value in s.companions.items()}
    return [
        tensors,
        house.store.bytes_by.copy(),
        house.transfer.h2d_bytes,
        house.transfer.d2h_bytes,
        buffer,
        companions,
    ]


def _same(before: list[Any], after: list[Any]) -> None:
    assert before[:4] == after[:4]
    for mine, theirs in ((before[4], after[4]), *((before[5][k], after[5].get(k)) for k in before[5])):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine.nan_to_num(1e9), theirs.nan_to_num(1e9))
    assert before[5].keys() == after[5].keys()


@pytest.mark.parametrize(
    ("move", "state"), sorted(set(ILLEGAL) - COUNTED - DISMISSED - REDUCES, key=str), ids=lambda value: value.name
)
def test_an_illegal_call_raises_and_changes_nothing(move: Move, state: TensorState) -> None:
    house, chunk, tensor = _brought_to(state)
    before = _picture(house, chunk)
    with pytest.raises(IllegalMoveError, match=r"chunk 0, tensor [ab]: .* is not a legal move .*; step 3, rank 0"):
        CALLS[move](chunk, tensor)
    _same(before, _picture(house, chunk))
    house.manager.store.check_integrity()
    chunk.check_integrity()
    close(house)


@pytest.mark.parametrize(("move", "state"), [(m, s) for m in Move for s in LEGAL_MOVES[m]], ids=lambda v: v.name)
def test_a_legal_call_ends_where_the_table_says(move: Move, state: TensorState) -> None:
    house, chunk, tensor = _brought_to(state)
    CALLS[move](chunk, tensor)
    assert tensor.state is LEGAL_MOVES[move][state]
    chunk.check_integrity()
    house.store.check_integrity()
    close(house)


@pytest.mark.parametrize("move", sorted((m for m, _ in DISMISSED), key=str), ids=lambda move: move.name)
def test_holders_that_a_gradient_dismissed_may_leave(move: Move) -> None:
    house, chunk, tensor = _brought_to(S.COMPUTE)
    chunk.acquire(tensor)
    chunk.take_slot(tensor, gradient_like(tensor, 1))
    for _ in range(2):
        chunk.let_go(tensor, move)
    assert (tensor.state, tensor.num_holders) == (S.READY_FOR_REDUCE, 0)
    close(house)


@pytest.mark.parametrize("move", [Move.LET_GO, Move.END_FORWARD, Move.END_BACKWARD], ids=lambda move: move.name)
def test_the_last_of_several_holders_moves_the_tensor(move: Move) -> None:
    house, chunk, tensor = _brought_to(S.COMPUTE)
    chunk.acquire(tensor)
    chunk.let_go(tensor, move)
    assert (tensor.state, tensor.num_holders) == (S.COMPUTE, 1)
    with pytest.raises(IllegalMoveError):
        chunk.release()
    chunk.let_go(tensor, move)
    assert (tensor.state, tensor.num_holders) == (LEGAL_MOVES[move][S.COMPUTE], 0)
    with pytest.raises(IllegalMoveError):
        chunk.let_go(tensor, move)
    assert tensor.num_holders == 0
    close(house)


def test_reduce_with_a_tensor_in_use_sends_nothing() -> None:
    """A gradient sent by a call that then fails would be sent, and added, a second time."""
    house, chunk, tensor = _brought_to(S.READY_FOR_REDUCE)
    chunk.acquire(chunk.tensors[1])
    with pytest.raises(IllegalMoveError, match="tensor b"):
        chunk.reduce()
    assert not tensor.has_gradient
    assert GRADIENT not in chunk.segments[0].companions
    chunk.let_go(chunk.tensors[1], Move.END_BACKWARD)
    chunk.reduce()
    assert torch.equal(chunk.companion_of(tensor, GRADIENT), gradient_like(tensor, 1))
    close(house)


def test_resident_values_are_neither_overwritten_nor_released() -> None:
    house = build([[spec("a", 6), spec("b", 4)]])
    chunk = house.chunks[0]
    chunk.place(Placement(10, 10))
    for call in (lambda: chunk.take_slot(chunk.tensors[0], gradient_like(chunk.tensors[0], 1)), chunk.release):
        with pytest.raises(RuntimeError, match="resident values"):
            call()
    with pytest.raises(IllegalMoveError):
        chunk.fetch()
    chunk.check_integrity()
    assert torch.equal(chunk.tensors[0].parameter, house.originals["a"])
    close(house)


@pytest.mark.parametrize("resident", [False, True])
def test_a_chunk_in_use_is_not_moved(resident: bool) -> None:
    house = build([[spec("a", 6), spec("b", 4)]])
    chunk = house.chunks[0]
    if resident:
        chunk.place(Placement(10, 0))
    else:
        chunk.fetch()
    chunk.acquire(chunk.tensors[1])
    before = _picture(house, chunk)
    with pytest.raises(IllegalMoveError, match="tensor b: RELEASE from COMPUTE"):
        chunk.place(Placement(0, 10))
    _same(before, _picture(house, chunk))
    with pytest.raises(IllegalMoveError):
        chunk.dissolve()
    _same(before, _picture(house, chunk))
    close(house)


# -- no room in the middle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", ["reduce", "restore", "deliver"])
def test_a_host_without_room_keeps_the_gradient_and_the_books(call: str, dtype: torch.dtype) -> None:
    house = build([[spec("a", 6, dtype=dtype), spec("b", 4, dtype=dtype)]])
    chunk = house.chunks[0]
    a, b = chunk.tensors
    chunk.fetch()
    chunk.take_slot(a, gradient_like(a, 1))
    house.arena.budget_bytes = house.arena.host_bytes + 10 * dtype.itemsize - 1
    before = _picture(house, chunk)
    attempt = {
        "reduce": chunk.reduce,
        "restore": lambda: chunk.restore(a),
        "deliver": lambda: chunk.deliver(b, gradient_like(b, 2)),
    }
    with pytest.raises(HostMemoryError, match=r"memory\.host"):
        attempt[call]()
    _same(before, _picture(house, chunk))
    house.store.check_integrity()
    house.arena.budget_bytes = None
    attempt[call]()
    if chunk.on_device:
        chunk.reduce()
    assert torch.equal(chunk.companion_of(a, GRADIENT), gradient_like(a, 1))
    house.store.check_integrity()
    close(house)


@pytest.mark.parametrize("cut", [0, 5])
def test_no_room_to_widen_a_gradient_loses_nothing_and_adds_nothing_twice(cut: int) -> None:
    """Sums over micro-batches are fp32; the narrow first gradient must outlive the attempt, in all its segments."""
    house = build([[spec("a", 6, dtype=torch.bfloat16), spec("b", 4, dtype=torch.bfloat16)]])
    chunk = house.chunks[0]
    a, b = chunk.tensors
    chunk.place(Placement(cut, cut))
    for tensor in (a, b):
        chunk.deliver(tensor, gradient_like(tensor, 1))
    chunk.fetch()
    for tensor in (a, b):
        chunk.take_slot(tensor, gradient_like(tensor, 2))
    house.arena.budget_bytes = house.arena.host_bytes
    with pytest.raises(HostMemoryError):
        chunk.reduce()
    house.store.check_integrity()
    assert all(tensor.state is TensorState.READY_FOR_REDUCE for tensor in chunk.tensors)
    for tensor in (a, b):
        assert torch.equal(
            chunk.companion_of(tensor, GRADIENT), gradient_like(tensor, 1, chunk.companion_of(tensor, GRADIENT).dtype)
        )
    house.arena.budget_bytes = None
    chunk.reduce()
    for tensor in (a, b):
        expected = gradient_like(tensor, 1, torch.float32) + gradient_like(tensor, 2, torch.float32)
        assert torch.equal(chunk.companion_of(tensor, GRADIENT), expected)
    house.store.check_integrity()
    close(house)


def test_a_device_without_room_leaves_a_chunk_free() -> None:
    house = equal_chunks(2, numel=8, capacity_bytes=40)
    house.chunks[0].fetch()
    with pytest.raises(torch.OutOfMemoryError):
        house.chunks[1].fetch()
    assert {t.state for t in house.chunks[1].tensors} == {S.FREE}
    for chunk in house.chunks:
        chunk.check_integrity()
    house.store.check_integrity()
    house.chunks[0].release()
    house.chunks[1].fetch()
    close(house)


def test_a_host_without_room_for_the_master_frees_the_values_again() -> None:
    with pytest.raises(HostMemoryError):
        build([[spec("a", 8, dtype=torch.bfloat16)]], host_bytes=16 + 31)
    house = build([[spec("a", 8, dtype=torch.bfloat16)]], host_bytes=16 + 32)
    layout, store, transfer = house.layouts[0], house.store, house.transfer
    house.arena.budget_bytes = 48 + 16
    parameter = torch.nn.Parameter(torch.ones(8), requires_grad=False)
    with pytest.raises(HostMemoryError):
        Chunk(layout, [parameter], store, transfer, keep_master=True)
    assert house.arena.host_bytes == 48
    assert store.bytes_by[Tier.HOST, Kind.PARAMETERS] == 16
    assert torch.equal(parameter, torch.ones(8))
    close(house)


# -- what a chunk takes over -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool], ids=str
)
def test_parameters_of_any_dtype(dtype: torch.dtype) -> None:
    trainable = dtype.is_floating_point
    house = build([[spec("a", 3, 4, dtype=dtype, trainable=trainable), spec("b", 5, dtype=dtype, trainable=trainable)]])
    chunk = house.chunks[0]
    for tensor in chunk.tensors:
        free = tensor.parameter
        assert free.shape == tensor.entry.spec.shape
        assert free.isnan().all() if trainable else (free.unique().numel() == 1)
    chunk.fetch()
    for tensor in chunk.tensors:
        chunk.acquire(tensor)
        assert torch.equal(tensor.parameter, house.originals[tensor.name].to(dtype))
    master = chunk.segments[0].companions.get(MASTER)
    assert (master is not None) == trainable
    assert not trainable or torch.equal(chunk.companion_of(chunk.tensors[0], MASTER), house.originals["a"])
    close(house)


def test_strides_of_the_users_parameter_are_kept() -> None:
    transposed = spec("t", 3, 5)
    transposed = type(transposed)("t", torch.Size([3, 5]), (1, 3), torch.float32, True)
    house = build([[spec("a", 4), transposed]])
    chunk = house.chunks[0]
    tensor = chunk.tensors[1]
    chunk.fetch()
    chunk.acquire(tensor)
    assert tensor.parameter.stride() == (1, 3)
    assert torch.equal(tensor.parameter, house.originals["t"])
    gradient = torch.arange(15.0).reshape(3, 5)
    chunk.take_slot(tensor, gradient)
    chunk.reduce()
    assert torch.equal(chunk.companion_of(tensor, GRADIENT), gradient)
    chunk.deliver(tensor, gradient)
    chunk.deliver(tensor, torch.ones(1, 1).expand(3, 5))
    assert torch.equal(chunk.companion_of(tensor, GRADIENT), 2 * gradient + 1)
    close(house)


def test_a_gradient_that_could_not_leave_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    house = equal_chunks(1)
    chunk, tensor = house.chunks[0], house.tensors[0]
    gradient = gradient_like(tensor, 1)
    with monkeypatch.context() as patch:

        def refused(*args: object, **kwargs: object) -> None:
            raise MemoryError

        patch.setattr(house.transfer, "gradient_out", refused)
        with pytest.raises(MemoryError):
            chunk.deliver(tensor, gradient)
    assert not tensor.has_gradient
    chunk.deliver(tensor, gradient)
    assert torch.equal(chunk.companion_of(tensor, GRADIENT), gradient)
    close(house)


@pytest.mark.parametrize("was_there", [False, True])
@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt])
def test_a_fetch_that_breaks_off_leaves_the_chunk_free(
    error: type[BaseException], was_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = equal_chunks(1)
    chunk, tensor = house.chunks[0], house.tensors[0]
    if was_there:
        chunk.fetch()
        chunk.release()
    with monkeypatch.context() as patch:

        def lost(*args: object) -> None:
            raise error("another process is lost, say")

        patch.setattr(house.transfer, "to_gathered", lost)
        with pytest.raises(error):
            chunk.fetch()
    house.manager.check_integrity()
    assert tensor.state is TensorState.FREE
    assert house.store.tier_bytes(Tier.DEVICE) == house.device.model_data_bytes == 0
    chunk.fetch()
    chunk.acquire(tensor)
    assert torch.equal(tensor.parameter, house.originals[tensor.name])
    chunk.let_go(tensor, Move.LET_GO)
    chunk.dissolve(keep_values=False)
    close(house)


def test_dissolving_gives_everything_back() -> None:
    house = build([[spec("a", 6), spec("b", 4)], [spec("c", 7, dtype=torch.bfloat16)]])
    house.chunks[0].place(Placement(10, 3))
    house.chunks[1].fetch()
    for chunk in house.chunks:
        chunk.dissolve()
    assert house.store.tier_bytes(Tier.HOST) == house.store.tier_bytes(Tier.DEVICE) == 0
    assert house.arena.host_bytes == house.device.model_data_bytes == 0
    for tensor in house.tensors:
        assert torch.equal(tensor.parameter, house.originals[tensor.name].to(tensor.entry.spec.dtype))
    close(house)
