"""``auto`` on devices of many capacities runs wherever ``cpu`` runs, as plain PyTorch and never over capacity."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gemini.plan import DoesNotFitError
from tests.direct_case import Net, Play, inputs, managed, mean_square, run_plain
from tests.sampled import sampled

Round = Callable[[Play, int], None]
NUM_ROUNDS = 4
NET = functools.partial(Net, width=16, num_blocks=3)
# From where ``cpu`` begins to run up to where all optimizer states stay on the device. The last two failed once because
# the last update kept a view of a chunk.
NO_ROOM_BYTES = 6 << 10
CAPACITIES = [*range(8 << 10, 38 << 10, 3 << 10), 34816, 34944]


def _loss(play: Play, index: int) -> Any:
    return mean_square(play.model(inputs(index)))


def _update(play: Play, loss: Any) -> None:
    loss.backward()
    play.check()
    play.note(loss)
    play.optimizer.step()
    play.check()
    play.optimizer.zero_grad()


def steady(play: Play, index: int) -> None:
    """One batch shape, nothing else."""
    _update(play, _loss(play, index))


def own_evaluation_between(play: Play, index: int) -> None:
    """From the third round on, after plans have been made; the model is called directly."""
    loss = _loss(play, index)
    if index > 1:
        play.note(play.eval(index + 1))
    _update(play, loss)


def evaluation_between(play: Play, index: int) -> None:
    """The same through the engine."""
    call = play.engine or play.model
    loss = mean_square(call(inputs(index)))
    if index > 1:
        with torch.no_grad():
            play.note(call(inputs(index + 1)))
    _update(play, loss)


def second_forward(play: Play, index: int) -> None:
    """Two graphs at a time, through the engine, from the third round on."""
    call = play.engine or play.model
    loss = mean_square(call(inputs(index)))
    if index > 1:
        loss = loss + mean_square(call(inputs(index + 1)))
    _update(play, loss)


def norms_between(play: Play, index: int) -> None:
    """From the third round on."""
    loss = _loss(play, index)
    if index > 1:
        play.note([parameter.detach().norm().item() for parameter in play.model.parameters()])
    _update(play, loss)


def gathered_after(play: Play, index: int) -> None:
    _update(play, _loss(play, index))
    with play.gathered() as model, torch.no_grad():
        model.head.weight.mul_(1.01)
    play.model.state_dict()


def _loop(one: Round) -> Callable[[Play], None]:
    def loop(play: Play) -> None:
        for index in range(NUM_ROUNDS):
            one(play, index)
        play.note([value.tolist() for value in play.model.state_dict().values()])

    return loop


def _ran(one: Round, placed: str, capacity_bytes: int) -> list[Any] | None:
    """What the loop noted; None where the device was too small."""
    try:
        with managed(placed, NET, capacity_bytes=capacity_bytes) as play:
            _loop(one)(play)
        return play.log
    except (torch.OutOfMemoryError, DoesNotFitError):
        return None


@functools.cache
def _plain(one: Round) -> list[Any]:
    return run_plain(_loop(one), NET).log


@pytest.mark.parametrize(
    "one",
    sampled([steady, evaluation_between, own_evaluation_between, second_forward, norms_between, gathered_after], 3),
    ids=lambda one: one.__name__,
)
def test_auto_runs_wherever_cpu_runs(one: Round) -> None:
    """``managed`` and ``check`` see to it that the books balance and the device is never over capacity."""
    failed = []
    for capacity_bytes in CAPACITIES:
        log = _ran(one, "auto", capacity_bytes)
        if log is not None:
            assert log == _plain(one), f"other numbers at {capacity_bytes} bytes"
        elif _ran(one, "cpu", capacity_bytes) is not None:
            failed.append(capacity_bytes)
    assert failed == []


def test_the_sweep_begins_where_cpu_begins_to_run() -> None:
    ran = [_ran(steady, "cpu", capacity_bytes) is not None for capacity_bytes in (NO_ROOM_BYTES, CAPACITIES[0])]
    assert ran == [False, True]
