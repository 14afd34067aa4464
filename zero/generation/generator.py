"""Many requests at a time on one engine: they join and leave between passes through the model.

What a pass costs is the model coming over the link, once, however many rows go through it. So all rows that fit run
together, and each border between two passes lets rows in and out.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gemini.device import Device
from gemini.hostinfo import host_memory
from gemini.units import format_bytes
from zero.errors import UserError
from zero.generation.buckets import Bucket
from zero.generation.cache import CacheAccount, rounded
from zero.generation.choosing import choose
from zero.generation.counting import Counting
from zero.generation.facts import ModelFacts, facts_of
from zero.generation.jobs import Job
from zero.generation.limits import GenerationStatistics, Limits
from zero.generation.passes import GOOD_PASSES, Passes, ran_out, without_traces
from zero.generation.pieces import Piece
from zero.generation.prompts import PromptReader
from zero.generation.requests import Requests
from zero.generation.rows import Row
from zero.generation.sampling import Sampling
from zero.generation.scheduler import Scheduler

if TYPE_CHECKING:
    from zero.engine import Engine

logger = logging.getLogger("zero")

MOST_CHOICES = 128
_UNLIMITED = 1 << 20
"""Tokens of a request to a model that has no most."""


class Generator:
    """Generation on an engine; passes run in whichever one thread calls :meth:`run_pass`.

    Args:
        engine: around a causal language model of transformers; no other pass may be under way.
        tokenizer: of the model.
        limits: what it may use.

    Attributes:
        engine: the engine.
        limits: the same, with what was left open filled in.

    Raises:
        UserError: the model cannot generate, or a limit cannot be met.
    """

    def __init__(self, engine: Engine, tokenizer: Any, limits: Limits = Limits()) -> None:  # noqa: B008
        facts = facts_of(engine.module, tokenizer)
        self.limits = resolved_limits(limits, facts, engine.device)
        self.engine = engine
        self._facts = facts
        self._account = CacheAccount(engine.device, self.limits.max_cache_bytes or 0, limits.cache_on_host)
        self._scheduler = Scheduler(facts.num_layers, self._account, self.limits, facts.position_bytes)
        pad = getattr(tokenizer, "pad_token_id", None)
        self._passes = Passes(engine, facts, pad if pad is not None and pad < facts.num_tokens else 0)
        self._reader = PromptReader(tokenizer, facts.num_tokens, self.limits.max_tokens or 0)
        # Of its own: a tokenizer is not to be used by two threads at a time.
        decoder = copy.deepcopy(tokenizer)
        self._decode = functools.partial(decoder.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._requests = Requests()
        self._counting = Counting()
        self._snapshot = GenerationStatistics()
        self._num_good_passes = 0

    # -- in any thread -----------------------------------------------------------------------------------------------

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token numbers of a prompt.

        Raises:
            UserError: it is empty, too long, no UTF-8, or has numbers that the model has no token for.
        """
        return self._reader.read(prompt)

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling,
        n: int = 1,
        on_piece: Callable[[Piece], None] | None = None,
    ) -> Job:
        """Queues a request.

        Args:
            prompt: text, or token numbers.
            sampling: its settings.
            n: answers to it.
            on_piece: called in the passes' thread with whatever a pass adds; if it raises, the request fails with that.
                When a request fails, its choices end as "cancelled", and :attr:`Job.error` is set by then.

        Raises:
            UserError: it cannot be carried out; nothing is queued.
        """
        tokens = self.encode(prompt)
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MOST_CHOICES:
            raise UserError(f"n = {n!r}: must be a whole number, from 1 to {MOST_CHOICES}")
        self._require_room(len(tokens), sampling.max_new_tokens)
        job = Job(tuple(tokens), sampling, n, on_piece)
        seed = secrets.randbits(62) if sampling.seed is None else sampling.seed
        ends = self._facts.ends
        self._requests.arrive(job, [Row(job, index, seed, self._decode, ends) for index in range(n)])
        return job

    def _require_room(self, num_prompt: int, num_new: int) -> None:
        most = self.limits.max_tokens or 0
        if num_prompt + num_new > most:
            raise UserError(
                f"max_new_tokens = {num_new}: the prompt has {num_prompt} tokens and at most {most} are read and added in "
                f"all; allowed is at most {most - num_prompt}"
            )
        if not self._scheduler.fits_alone(num_prompt + num_new - 1):
            needed_bytes = self._scheduler.needed_bytes([num_prompt + num_new])
            raise UserError(
                f"max_new_tokens = {num_new}: keys and values of {num_prompt + num_new} tokens take about "
                f"{format_bytes(needed_bytes)}, and limits.max_cache_bytes is {format_bytes(self._account.max_bytes)}; "
                "ask for fewer tokens, or raise it"
            )

    def cancel(self, job: Job) -> None:
        """Its rows are freed at the next pass border; nothing if it is done."""
        self._requests.cancel(job)

    @property
    def statistics(self) -> GenerationStatistics:
        """A snapshot, as of the last pass; what waits, as of now."""
        snapshot = self._snapshot
        return dataclasses.replace(snapshot, num_waiting=snapshot.num_waiting + self._requests.num_arrived)

    # -- in the passes' thread ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """Passes until nothing is left."""
        while self.run_pass():
            pass

    def run_pass(self) -> bool:
        """Joins, one pass through the model, leaves; False: there was nothing to do.

        Whatever goes wrong in a pass goes to the requests that it concerns, see :meth:`Job.result`.
        """
        scheduler, counting = self._scheduler, self._counting
        scheduler.queue(self._requests.take_in())
        shortage = self._settle()
        scheduler.admit()
        if not scheduler.buckets:
            return self._nothing_runs()
        started_s, before_bytes = time.perf_counter(), self.engine.manager.transfer.h2d_bytes
        num_running = scheduler.num_rows
        shortage |= self._take_over(list(scheduler.buckets), num_running)
        shortage |= self._settle()
        self._adapt(shortage, num_running)
        counting.num_passes += 1
        counting.busy_s += time.perf_counter() - started_s
        counting.streamed_bytes += self.engine.manager.transfer.h2d_bytes - before_bytes
        self._publish()
        return True

    def close(self) -> None:
        """Cancels whatever is left, and gives the memory back."""
        self._requests.end_all()
        self._scheduler.settle()
        self._publish()

    def _settle(self) -> bool:
        """At a border: ended rows leave, buckets are put together; True if memory ran out, and rows wait again."""
        try:
            self._scheduler.settle()
        except Exception as error:
            if not ran_out(error):
                raise
            return True
        return False

    def _nothing_runs(self) -> bool:
        """Whether somebody waits whom no cache holds: a position costs more than the model's config says."""
        self._publish()
        if not self._scheduler.waiting:
            return False
        error = UserError(f"keys and values do not fit in {format_bytes(self._account.max_bytes)}")
        self._requests.end(self._scheduler.waiting[0].job, error)
        return True

    def _take_over(self, buckets: list[Bucket], num_running: int) -> bool:
        """One pass, and the next token of every row; True if memory ran out."""
        shortage = False
        outcomes = self._passes.run(buckets)
        for bucket in buckets:
            outcome = outcomes.pop(0)
            error = outcome if isinstance(outcome, Exception) else self._advance(bucket, outcome)
            del outcome
            if error is not None:
                shortage |= self._failed(bucket, error, num_running)
        return shortage

    def _advance(self, bucket: Bucket, logits: torch.Tensor) -> Exception | None:
        try:
            with self.engine.device.activity():
                chosen = choose(logits, bucket.rows)
        except Exception as error:
            return without_traces(error)
        self._counting.add(bucket)
        bucket.commit()
        self._scheduler.measure(bucket)
        for row, one in zip(bucket.rows, chosen, strict=True):
            if row.finish_reason is not None:
                continue  # another choice of its request has failed in this very pass
            if one is None:
                self._requests.end(row.job, RuntimeError("the model gave logits that are not numbers"))
            else:
                self._counting.num_new_tokens += 1
                self._requests.hand_out(row, row.take(one))
        return None

    # -- failures ----------------------------------------------------------------------------------------------------

    def _failed(self, bucket: Bucket, error: Exception, num_running: int) -> bool:
        """A forward failed; True if for want of memory."""
        shortage = ran_out(error)
        if shortage and num_running > 1:
            logger.info("memory ran out with %d rows: fewer run from now on", num_running)
        else:
            logger.warning("%d rows failed: %s: %s", len(bucket.rows), type(error).__name__, error)
            for row in bucket.rows:
                self._requests.end(row.job, error)
        self._scheduler.give_up(bucket)
        return shortage

    def _adapt(self, shortage: bool, num_running: int) -> None:
        """Fewer rows after a shortage, and more again once it has gone well for a while."""
        scheduler = self._scheduler
        if shortage:
            self._num_good_passes = 0
            scheduler.most_rows = max(1, num_running // 2)
        elif scheduler.most_rows < self.limits.max_rows:
            self._num_good_passes += 1
            if self._num_good_passes >= GOOD_PASSES:
                self._num_good_passes = 0
                scheduler.most_rows = min(self.limits.max_rows, 2 * scheduler.most_rows)

    # -- figures -----------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        counting = self._counting
        self._snapshot = GenerationStatistics(
            num_waiting=self._scheduler.num_waiting,
            num_rows=self._scheduler.num_rows,
            num_passes=counting.num_passes,
            num_forwards=self._passes.num_forwards,
            num_prompt_tokens=counting.num_prompt_tokens,
            num_new_tokens=counting.num_new_tokens,
            padding_fraction=counting.padding_fraction,
            cache_bytes=self._account.num_bytes,
            cache_peak_bytes=self._account.peak_bytes,
            streamed_bytes=counting.streamed_bytes,
            tokens_per_s=counting.tokens_per_s,
        )


def resolved_limits(limits: Limits, facts: ModelFacts, device: Device) -> Limits:
    """Limits with what was left open filled in.

    Args:
        limits: as they were given.
        facts: of the model.
        device: that it runs on.

    Raises:
        UserError: the model does not read so many tokens.
    """
    max_tokens = limits.max_tokens
    if facts.max_positions is not None and max_tokens is not None and max_tokens > facts.max_positions:
        raise UserError(f"limits.max_tokens = {max_tokens}: the model reads at most {facts.max_positions}")
    if max_tokens is None:
        max_tokens = facts.max_positions or _UNLIMITED
    max_cache_bytes = limits.max_cache_bytes
    if max_cache_bytes is None:
        is_host = limits.cache_on_host or device.is_host
        room_bytes = host_memory().available_bytes if is_host else device.capacity_bytes
        # A fourth part, or what the longest text alone needs, with a tensor that is being made anew.
        row_bytes = rounded(max_tokens) * facts.position_bytes * 5 // 4
        max_cache_bytes = max(1, min(room_bytes // 2, max(room_bytes // 4, row_bytes)))
    return dataclasses.replace(limits, max_tokens=max_tokens, max_cache_bytes=max_cache_bytes)
