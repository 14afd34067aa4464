"""An engine that only infers: what stays on the device, and how fast a pass will be, said before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from gemini.clock import DISK, IN
from gemini.device import Device
from gemini.plan import ChunkFacts, DoesNotFitError, Plan, disk_bytes, host_bytes
from gemini.policy import Policy
from gemini.units import format_bytes
from zero.config.schema import Config
from zero.dryrun import Blueprint, Generation, InferenceNeeds, Scoring
from zero.engine import Engine
from zero.host_room import require_room_for_values
from zero.passes import expected_trace
from zero.probing import has_rates, inference_profile
from zero.ranks import join_ranks, make_exchange
from zero.setup import make_device, policy_for, survey

logger = logging.getLogger("zero")


@dataclass(frozen=True)
class Outlook:
    """What generation will be like.

    Attributes:
        device_bytes: of the model that stay on the device.
        host_bytes: that stay on the host.
        disk_bytes: that stay on disk.
        streamed_bytes: that each pass fetches.
        cache_bytes_per_token: of the keys and values of one position of one row.
        room_bytes: that the plan leaves for keys and values.
        pass_s: predicted seconds of a pass, of one token per row where texts are written; 0 where they are not known.
        num_rows: that share such a pass.
        num_tokens: of each row in such a pass.
        row_tokens: most that a row has, keys and values of earlier passes included: what such a pass reads back.
        link_s: of them, seconds that the link to the device works.
        disk_s: likewise the disk.
    """

    device_bytes: int
    host_bytes: int
    disk_bytes: int
    streamed_bytes: int
    cache_bytes_per_token: int
    room_bytes: int
    pass_s: float
    num_rows: int
    link_s: float = 0.0
    disk_s: float = 0.0
    num_tokens: int = 1
    row_tokens: int = 1

    @property
    def tokens_per_s(self) -> float:
        """Of all rows together; 0 where it is not known."""
        return self.num_rows * self.num_tokens / self.pass_s if self.pass_s else 0.0

    @property
    def text(self) -> str:
        """In one line, for people."""
        places = (("on the device", self.device_bytes), ("on the host", self.host_bytes), ("on disk", self.disk_bytes))
        parts = [", ".join(f"{format_bytes(num_bytes)} {place}" for place, num_bytes in places if num_bytes)]
        if self.streamed_bytes:
            parts.append(f"{format_bytes(self.streamed_bytes)} fetched in each pass")
        if self.pass_s:
            rows = f"{self.num_rows} row{'s' if self.num_rows > 1 else ''} of {self.row_tokens:,} tokens"
            parts.append(f"about {self.tokens_per_s:.3g} tokens/s with {rows}{self._limit}")
        return "; ".join(parts)

    @property
    def _limit(self) -> str:
        if max(self.link_s, self.disk_s) < 0.5 * self.pass_s:
            return ""
        return ", held back by the disk" if self.disk_s > self.link_s else ", held back by the link to the device"


def make_inference_engine(
    model: nn.Module,
    config: Config,
    device: Device | None = None,
    expected: Generation | None = None,
    fewer: bool = False,
    cache_bytes: int | None = None,
) -> tuple[Engine, Outlook]:
    """Takes a model over for passes without gradients.

    Args:
        model: any ``torch.nn.Module``; what its parameters say about gradients stays as it is.
        config: of the run.
        device: one made already; by default the one that ``[device]`` names.
        expected: the largest passes there will be.
        fewer: fewer rows and tokens will do where so many do not fit.
        cache_bytes: of keys and values that will lie on the device, less where tokens are; by default those of all that
            is expected.

    Raises:
        gemini.plan.DoesNotFitError: not even with one unit at a time on the device, or not with that cache beside.
    """
    world = join_ranks(config)
    device = device or make_device(config)
    exchange = make_exchange(config, world)
    try:
        about = survey(model, config, None, exchange, only_infers=True)
        policy = policy_for(config, device, inference_profile(config, device, exchange))
        wishes = _Wishes(expected or Generation(), fewer, cache_bytes)
        ahead = _look_ahead(Blueprint(model), config, device, policy, about.facts, wishes)
        require_room_for_values(config, about.facts, about.limit_bytes, exchange.num_local)
    except BaseException:
        device.close()
        raise
    engine = Engine(model, None, None, config, device, None, exchange=exchange, only_infers=True)
    try:
        if ahead is not None:
            engine._planner.expect(ahead.found, ahead.held_bytes, ahead.plan)
        return engine, _outlook(engine, ahead, ahead.found.asked if ahead is not None else wishes.expected)
    except BaseException:
        engine.close()
        raise


@dataclass(frozen=True)
class _Wishes:
    """What is asked for; the fields are arguments of :func:`make_inference_engine`."""

    expected: Generation
    fewer: bool
    cache_bytes: int | None

    def __iter__(self) -> Iterator[Generation]:
        """To be tried, the largest first."""
        asked = self.expected
        yield asked
        while self.fewer and not asked.is_least:
            asked = asked.halved
            yield asked

    def room_bytes(self, found: InferenceNeeds) -> int:
        """For keys and values."""
        if self.cache_bytes is None:
            return found.cache_bytes
        return self.cache_bytes * found.asked.tokens // self.expected.tokens


@dataclass(frozen=True)
class _Ahead:
    """What is known before anything is loaded.

    Attributes:
        found: by the dry run.
        room_bytes: for keys and values.
        held_bytes: of them, on a device that is not the host.
        plan: that leaves this room.
    """

    found: InferenceNeeds
    room_bytes: int
    held_bytes: int
    plan: Plan


def _look_ahead(
    blueprint: Blueprint, config: Config, device: Device, policy: Policy, facts: list[ChunkFacts], wishes: _Wishes
) -> _Ahead | None:
    """The first wish that fits; None where a model cannot be walked through.

    Raises:
        gemini.plan.DoesNotFitError: none does; of the last, which is the smallest.
    """
    refusal: DoesNotFitError | None = None
    for found in blueprint.inference(config, wishes):
        room_bytes = wishes.room_bytes(found)
        held_bytes = 0 if device.is_host else room_bytes
        try:
            plan = policy.decide(facts, expected_trace(found, held_bytes), device.capacity_bytes)
        except DoesNotFitError as error:
            refusal = error
            continue
        if found.asked != wishes.expected:
            logger.log(
                logging.INFO if isinstance(found.asked, Scoring) else logging.WARNING,  # whose batches follow the plan
                "%d x %d tokens may not fit on the device; planned for %d x %d",
                wishes.expected.rows,
                wishes.expected.tokens,
                found.asked.rows,
                found.asked.tokens,
            )
        return _Ahead(found, room_bytes, held_bytes, plan)
    if refusal is not None:
        raise refusal
    logger.info(
        "this model cannot be walked through beforehand: its first passes will show what can stay on the device"
    )
    return None


def _outlook(engine: Engine, ahead: _Ahead | None, asked: Generation) -> Outlook:
    plan, facts = engine.plan, engine.facts
    is_timed = ahead is not None and has_rates(engine.config, engine.device)
    return Outlook(
        plan.resident_parameter_bytes,
        host_bytes(facts, plan.placements),
        disk_bytes(facts, plan.placements),
        plan.predicted_h2d_bytes,
        0 if ahead is None else ahead.found.cache_bytes_per_token,
        0 if ahead is None else ahead.room_bytes,
        plan.predicted_step_s if is_timed else 0.0,
        asked.rows,
        plan.predicted_busy_s.get(IN, 0.0),
        plan.predicted_busy_s.get(DISK, 0.0),
        asked.tokens if isinstance(asked, Scoring) else 1,
        asked.tokens,
    )
