"""The states of one tensor in a chunk, and the only moves between them.

The state says where the tensor's bytes on the *device* are and who may touch them. The values themselves are never
lost: host (or a resident segment) keeps them, and a chunk on the device is a copy taken for a while. The exception is
``READY_FOR_REDUCE``, where the slot has been handed to the gradient.
"""

from __future__ import annotations

from enum import Enum, unique


@unique
class TensorState(Enum):
    """Where a tensor's device bytes are, and who may touch them."""

    __hash__ = object.__hash__  # members are single objects; Enum's own is a Python function

    FREE = "free"
    """No bytes on the device: the parameter points at a NaN placeholder of its shape. Nobody may compute with it."""

    HOLD = "hold"
    """Values lie in the gathered buffer and nobody uses them: fetched ahead, or used by a pass without gradients.
    The manager may release them at any time."""

    COMPUTE = "compute"
    """Values lie in the gathered buffer and at least one holder (a running module, or a unit's backward) may read
    them at any moment. Nobody may release, move or overwrite them."""

    HOLD_AFTER_FORWARD = "hold_after_forward"
    """Values lie in the gathered buffer, forward is over, backward will want them. The manager may release them and
    fetch them again."""

    HOLD_AFTER_BACKWARD = "hold_after_backward"
    """Values lie in the gathered buffer, the unit's backward is over and no gradient took the slot (frozen, unused, or
    the gradient is still under way). The manager may release them."""

    READY_FOR_REDUCE = "ready_for_reduce"
    """The slot in the gathered buffer holds the *gradient*; the values are gone from the device. The bytes may only be
    sent to the gradient's owner."""


@unique
class Move(Enum):
    """What can happen to a tensor. Every move is one method of :class:`gemini.chunk.Chunk`."""

    __hash__ = object.__hash__  # members are single objects; Enum's own is a Python function

    FETCH = "fetch"
    ACQUIRE = "acquire"
    LET_GO = "let_go"
    END_FORWARD = "end_forward"
    END_BACKWARD = "end_backward"
    TAKE_SLOT = "take_slot"
    RESTORE = "restore"
    REDUCE = "reduce"
    RELEASE = "release"


_S = TensorState

LEGAL_MOVES: dict[Move, dict[TensorState, TensorState]] = {
    # host -> device copy of the whole chunk is queued
    Move.FETCH: {_S.FREE: _S.HOLD},
    # a holder begins to read; further holders are counted, not moved
    Move.ACQUIRE: {
        _S.HOLD: _S.COMPUTE,
        _S.HOLD_AFTER_FORWARD: _S.COMPUTE,
        _S.HOLD_AFTER_BACKWARD: _S.COMPUTE,
    },
    # the last holder of a pass without gradients is done
    Move.LET_GO: {_S.COMPUTE: _S.HOLD},
    # the last holder in forward is done; backward will come back
    Move.END_FORWARD: {_S.COMPUTE: _S.HOLD_AFTER_FORWARD},
    # the last holder in backward is done
    Move.END_BACKWARD: {_S.COMPUTE: _S.HOLD_AFTER_BACKWARD},
    # the gradient is complete and overwrites the values in the slot
    Move.TAKE_SLOT: {
        _S.HOLD: _S.READY_FOR_REDUCE,
        _S.COMPUTE: _S.READY_FOR_REDUCE,
        _S.HOLD_AFTER_FORWARD: _S.READY_FOR_REDUCE,
        _S.HOLD_AFTER_BACKWARD: _S.READY_FOR_REDUCE,
    },
    # the values are wanted once more (a layer shared by two checkpointed regions): the gradient goes out, values return
    Move.RESTORE: {_S.READY_FOR_REDUCE: _S.HOLD},
    # the gradient goes to its owner and the chunk's device memory is given back
    Move.REDUCE: {_S.READY_FOR_REDUCE: _S.FREE},
    # the chunk's device memory is given back, nothing to save
    Move.RELEASE: {
        _S.HOLD: _S.FREE,
        _S.HOLD_AFTER_FORWARD: _S.FREE,
        _S.HOLD_AFTER_BACKWARD: _S.FREE,
    },
}
"""The table of legal moves: ``LEGAL_MOVES[move][state]`` is the state after. A pair that is not here raises."""

HOLDING = frozenset({_S.HOLD, _S.HOLD_AFTER_FORWARD, _S.HOLD_AFTER_BACKWARD})
"""States in which values lie on the device and may be dropped without saving anything."""


class IllegalMoveError(RuntimeError):
    """A tensor was asked for a move that its state does not allow: a bug in the engine, never the user's fault."""


def next_state(move: Move, state: TensorState, *, chunk: int, tensor: str, step: int = 0, rank: int = 0) -> TensorState:
    """The state after ``move``.

    Raises:
        IllegalMoveError: if the table has no such move; names chunk, tensor, from, move, step and rank.
    """
    try:
        return LEGAL_MOVES[move][state]
    except KeyError:
        allowed = ", ".join(s.name for s in LEGAL_MOVES[move])
        raise IllegalMoveError(
            f"chunk {chunk}, tensor {tensor}: {move.name} from {state.name} is not a legal move "
            f"(allowed from: {allowed}); step {step}, rank {rank}"
        ) from None
