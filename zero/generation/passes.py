"""One pass through the model for several buckets, and what becomes of it when something fails."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gemini.plan import DoesNotFitError
from zero.errors import UserError
from zero.generation.buckets import Bucket
from zero.generation.facts import ModelFacts
from zero.generation.sweep import Sweep

if TYPE_CHECKING:
    from zero.engine import Engine

logger = logging.getLogger("zero")

GOOD_PASSES = 32
"""After so many without a shortage of memory, twice as much is tried as after it."""
_ALL = 1 << 10

Outcome = torch.Tensor | Exception
"""Logits of the last position, [rows, vocabulary] in fp32 on the device; or why there are none."""


def ran_out(error: BaseException) -> bool:
    """Whether fewer rows may help."""
    return isinstance(error, (torch.OutOfMemoryError, DoesNotFitError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def without_traces(error: Exception) -> Exception:
    """The error without its frames, which refer to tensors on the device, and by way of their callers to the error.

    Where it is not for want of memory the log has it with them.
    """
    if not ran_out(error):
        logger.warning("a forward failed", exc_info=error)
    chain: list[BaseException] = [error]
    for link in chain:
        chain += [other for other in (link.__cause__, link.__context__) if other is not None and other not in chain]
        link.__traceback__ = None
    return error


class Passes:
    """Runs buckets through the model of an engine.

    Args:
        engine: whose model it is.
        facts: of the model.
        pad: token number of padding.

    Attributes:
        num_forwards: so far.
    """

    def __init__(self, engine: Engine, facts: ModelFacts, pad: int) -> None:
        self._engine = engine
        self._facts = facts
        self._pad = pad
        sweep = Sweep(engine)
        self._sweep: Sweep | None = sweep if sweep.blocks else None
        self.num_forwards = 0
        # Of all forwards that go together the hidden states are there at the same time.
        self._most_together = _ALL
        self._num_good = 0

    def run(self, buckets: Sequence[Bucket]) -> list[Outcome]:
        """One outcome for each bucket; weights cross the link once for all of them where they can."""
        outcomes: list[Outcome] = []
        with torch.no_grad(), self._evaluating():
            while len(outcomes) < len(buckets):
                outcomes += self._some(buckets[len(outcomes) :][: self._most_together])
        self._num_good += 1
        if self._num_good % GOOD_PASSES == 0:
            self._most_together = min(_ALL, 2 * self._most_together)
        return outcomes

    def _some(self, buckets: Sequence[Bucket]) -> list[Outcome]:
        outcomes = None
        if len(buckets) > 1 and self._sweep is not None:
            outcomes = self._together(buckets, self._sweep)
        if outcomes is None:
            outcomes = [self._alone(bucket) for bucket in buckets]
        return outcomes

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self._engine.module.training
        if was_training:
            self._engine.eval()
        try:
            yield
        finally:
            if was_training:
                self._engine.train()

    def _together(self, buckets: Sequence[Bucket], sweep: Sweep) -> list[Outcome] | None:
        """None where they must be run one after the other: that needs less memory, and tells which of them failed."""
        inputs = [self._inputs(bucket) for bucket in buckets]
        calls = [functools.partial(self._forward, self._engine.module, values) for values in inputs]
        most = max(inputs, key=lambda values: int(values["input_ids"].numel()))
        try:
            outcomes: list[Outcome] = list(sweep.run(calls, tuple(most["input_ids"].shape)))
        except UserError as error:
            logger.info("%s: buckets of rows run one after the other", error)
            self._sweep = None
            return None
        except Exception as error:
            logger.debug("%d forwards together failed, each is run alone: %s", len(buckets), error)
            if ran_out(error):
                self._most_together, self._num_good = max(1, len(buckets) // 2), 0
            return None
        self.num_forwards += len(buckets)
        return outcomes

    def _alone(self, bucket: Bucket) -> Outcome:
        try:
            logits = self._forward(self._engine, self._inputs(bucket))
        except Exception as error:
            return without_traces(error)
        finally:
            self._engine._last_batch = ((), {}, 1)  # kept for refusals of training passes; it refers to the cache
        self.num_forwards += 1
        return logits

    def _inputs(self, bucket: Bucket) -> dict[str, Any]:
        device = self._engine.device
        with device.activity():
            ids, mask, positions = (tensor.to(device.torch_device) for tensor in bucket.inputs(self._pad))
        values = {"input_ids": ids, "attention_mask": mask, "past_key_values": bucket.cache, **self._facts.options}
        if self._facts.takes_positions:
            values["position_ids"] = positions
        return values

    def _forward(self, model: Any, values: dict[str, Any]) -> torch.Tensor:
        logits = model(**values).logits
        with self._engine.device.activity():
            last: torch.Tensor = logits[:, -1].float()
            return last.clone() if last.untyped_storage().nbytes() > last.nbytes else last
