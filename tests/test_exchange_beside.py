"""Exchanges between ranks that go on beside the program: begun early enough, waited for, and the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemini.clock import COMPUTE, EXCHANGE, Clock
from gemini.device import Event, HostDevice, InlineStream
from gemini.profile import HardwareProfile
from gemini.simulated import SimulatedDevice, StreamOrder
from tests.rank_case import NUM_STEPS, digest, make_model, share
from tests.ranks import run_ranks, try_ranks

DIVIDED = {"replicate": "1KiB"}


class Work:
    """Something that goes on, and says when it is waited for."""

    def __init__(self, said: list[str], name: str) -> None:
        self.said, self.name = said, name

    def wait(self) -> None:
        """It has ended."""
        self.said.append(f"{self.name} waited for")


def _begin(said: list[str], name: str) -> Any:
    def begin() -> list[Work]:
        said.append(f"{name} begun")
        return [Work(said, name)]

    return begin


class TestStreams:
    def test_on_the_host_it_begins_at_once_and_its_event_waits_for_it(self) -> None:
        said: list[str] = []
        stream = InlineStream()
        stream.exchange(_begin(said, "a"), 8, stream.record())
        event = stream.record()
        later = stream.record()
        assert said == ["a begun"]
        assert later.is_done
        assert not event.is_done
        HostDevice().wait(event)
        event.synchronize()
        assert said == ["a begun", "a waited for"]
        assert event.is_done

    def test_simulated_it_begins_when_somebody_waits(self) -> None:
        said: list[str] = []
        device = SimulatedDevice(1 << 20, order=StreamOrder.PROCRASTINATING)
        copies, between = device.stream("in"), device.stream("between")
        source, target = torch.ones(4), torch.zeros(4)
        copies.copy(target, source)

        def begin() -> list[Work]:
            said.append(f"copied {float(target.sum()):g}")
            return _begin(said, "a")()

        between.exchange(begin, 8, copies.record())
        event = between.record()
        assert said == []
        device.wait(event)
        assert said == ["copied 4", "a begun", "a waited for"], "what it reads is there before it begins"
        device.close()

    def test_before_the_program_waits_for_other_ranks_all_begin_in_order(self) -> None:
        said: list[str] = []
        device = SimulatedDevice(1 << 20, order=StreamOrder.PROCRASTINATING)
        between = device.stream("between")
        done: Event = between.record()
        between.exchange(_begin(said, "a"), 8, done)
        between.exchange(_begin(said, "b"), 8, done)
        late = torch.zeros(1)
        between.copy(late, torch.ones(1))
        device.begin_exchanges()
        assert said == ["a begun", "a waited for", "b begun", "b waited for"]
        assert late.item() == 0.0, "copies behind them are in no hurry"
        device.close()


class TestClock:
    def test_beside_the_computation_unless_it_is_part_of_it(self) -> None:
        clock = Clock(HardwareProfile(rank_link_bytes_per_s=10.0, launch_s=0.0))
        assert clock.exchange_beside(20, 1.0) == pytest.approx(3.0)
        clock.compute(2.0)
        assert clock.compute_s == pytest.approx(2.0), "computation goes on"
        clock.exchange(10)
        assert clock.compute_s == pytest.approx(4.0), "one exchange at a time"
        assert clock.busy_s[EXCHANGE] == pytest.approx(3.0)
        assert clock.busy_s[COMPUTE] == pytest.approx(2.0)


# -- runs ----------------------------------------------------------------------------------------------------------------


def _train(device: dict[str, Any], memory: dict[str, Any], accumulation: int = 1) -> Any:
    import torch.distributed as dist

    import zero

    rank = dist.get_rank()
    model = make_model("opt")
    config = {
        "device": device,
        "memory": memory,
        "parallel": DIVIDED,
        "train": {"gradient_accumulation_steps": accumulation, "max_grad_norm": 1.0},
    }
    engine, *_ = zero.initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-3), config=config)
    for step in range(NUM_STEPS * accumulation):
        engine.zero_grad()
        loss = engine(**share(step, 0, rank, 2)).loss
        engine.backward(loss)
        engine.step()
        engine.check_integrity()
    return engine, float(loss.detach())


def overlapped(accumulation: int, pieces_on_way: int | None, prefetch: int | str, staging_bytes: int) -> Any:
    """The hash of all weights, with other settings of what goes on beside the program."""
    from zero import reduction

    if pieces_on_way is not None:
        reduction._MOST_ON_WAY_ON_HOST = pieces_on_way
    reduction._MOST_STAGING_BYTES_ON_HOST = staging_bytes
    engine, loss = _train({"type": "cpu"}, {"prefetch": prefetch}, accumulation)
    return digest(engine.module.state_dict()), loss


@pytest.mark.parametrize("accumulation", [1, pytest.param(3, marks=pytest.mark.full)])
def test_no_bit_depends_on_what_goes_on_beside_the_program(accumulation: int) -> None:
    plain = run_ranks(overlapped, 2, accumulation, 0, 0, 1 << 21)
    # Pieces of 64 elements a rank: many of them, most of which are on their way together.
    for settings in ((None, "auto", 1 << 21), (3, 2, 256), (1, 1, 1024)):
        assert run_ranks(overlapped, 2, accumulation, *settings) == plain, settings
    assert plain[0][0] == plain[1][0]


def what_happens() -> list[str]:
    """Forward and backward of a step, on the host: what begins and is waited for, among the layers' computation."""
    from zero.reduction import Reducer
    from zero.sharding import RankExchange, _Gathering

    said: list[str] = []
    begin, wait, together, finish = (
        RankExchange._begin_gather,
        _Gathering.wait,
        Reducer.together,
        Reducer._finish_oldest,
    )

    def begin_gather(self: Any, chunk: Any) -> Any:
        said.append(f"gather {chunk.layout.unit_name}")
        return begin(self, chunk)

    def waited(self: Any) -> None:
        if self._works:
            said.append(f"wait {self.chunk.layout.unit_name}")
        wait(self)

    def reduced(self: Any, chunk: Any, runs: Any) -> None:
        said.append(f"reduce {chunk.layout.unit_name}")
        together(self, chunk, runs)

    def finished(self: Any) -> None:
        said.append(f"sum {self._on_way[0].chunk.layout.unit_name}")
        finish(self)

    RankExchange._begin_gather, _Gathering.wait = begin_gather, waited
    Reducer.together, Reducer._finish_oldest = reduced, finished
    engine, _ = _train({"type": "cpu"}, {})
    for number, layer in enumerate(engine.module.model.decoder.layers):
        layer.register_forward_hook(lambda *_, number=number: said.append(f"forward {number}"))
    said.clear()
    batch = share(0, 0, torch.distributed.get_rank(), 2)
    engine.zero_grad()
    engine.backward(engine(**batch).loss)
    said.append("step")
    engine.step()
    return said


def test_values_come_while_the_layer_before_computes_and_gradients_go_while_backward_goes_on() -> None:
    for said in run_ranks(what_happens, 2):
        unit = "model.decoder.layers.{}"
        for number in (1, 2):
            name = unit.format(number)
            forward = said.index(f"forward {number - 1}")
            assert said.index(f"gather {name}") < forward < said.index(f"wait {name}")
        first, second = (unit.format(number) for number in (2, 1))
        assert said.index(f"reduce {first}") < said.index(f"reduce {second}") < _last(said, f"sum {first}")


def _last(said: list[str], what: str) -> int:
    return len(said) - 1 - said[::-1].index(what)


def without_a_wait() -> bool:
    """On the simulated device, whose exchanges begin when somebody waits for them: is all well where nobody does?"""
    SimulatedDevice.wait = lambda self, event: None  # type: ignore[method-assign]
    _, loss = _train({"type": "simulated", "memory": "1MiB"}, {"policy": "cpu", "prefetch": 2})
    return bool(torch.tensor(loss).isfinite())


def test_a_missing_wait_shows() -> None:
    """What was not there yet is read, or what has gone is written."""
    assert not any(rank.well and rank.result for rank in try_ranks(without_a_wait, 2, timeout_s=60))
