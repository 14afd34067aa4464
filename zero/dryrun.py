"""A model walked through on fake tensors: what a pass would need, without the memory for it."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gemini.dryrun import DryArena, DryDevice, fake_copy, fake_mode
from gemini.exchange import ALONE, Exchange
from gemini.trace import EVALUATION, Moment, Trace
from zero.config.loading import load_config
from zero.config.schema import Config
from zero.errors import UserError
from zero.likelihoods import scoring, scoring_inputs

if TYPE_CHECKING:
    from zero.engine import Engine

logger = logging.getLogger("zero")


class CannotWalkError(RuntimeError):
    """The model's own code failed on tensors without values; says with what."""


@contextlib.contextmanager
def models_own_code() -> Iterator[None]:
    """Around calls of the model's code in a dry run, which may fail in any way there; ours outside may not.

    Raises:
        CannotWalkError: it did.
    """
    try:
        yield
    except (CannotWalkError, UserError):
        raise
    except Exception as error:
        said = str(error).strip().partition("\n")[0][:200]
        raise CannotWalkError(f"{type(error).__name__}: {said}") from error


def walk(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    config: Config,
    args: Any,
    kwargs: Any,
    exchange: Exchange = ALONE,
    num_micro_batches: int = 1,
) -> tuple[Trace, Engine]:
    """Forward and backward of one pass, everything offloaded. Call it inside the fake mode.

    Args:
        model: with fake parameters; it is taken over.
        optimizer: over them, for the bytes of its states.
        config: of the run; its policy does not matter here.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        exchange: how chunks are divided.
        num_micro_batches: that go through the model layer by layer, all with these arguments.

    Returns:
        The trace, and the engine that made it.

    Raises:
        CannotWalkError: the model failed, as it does where its forward depends on values.
    """
    from zero.engine import Engine

    memory: dict[str, Any] = {"policy": "cpu", "pin": False, "host": "null", "disk": "null"}
    if config.memory.policy == "static":  # its fractions belong to no other policy
        memory |= {"policy": "static", "resident_parameters": 0.0, "resident_optimizer": 0.0}
    offloaded = load_config(config, {"memory": memory, "train": {"compile": False}, "optimizer": {"early": False}})
    engine = Engine(model, optimizer, None, offloaded, DryDevice(), None, arena=DryArena, exchange=exchange)
    with models_own_code():
        if num_micro_batches > 1:
            _walk_window(engine, kwargs, num_micro_batches)
        else:  # nothing but the loss outlives the forward, as in a loop
            engine.backward(_some_loss(engine(*args, **kwargs)))
    if engine.manager.trace is None:
        raise RuntimeError("the dry run recorded nothing")
    # These depend on the device, which is not that of the dry run.
    engine.manager.trace.step_peak_bytes = engine.manager.trace.streamed_piece_numel = 0
    return engine.manager.trace, engine


def _walk_window(engine: Engine, batch: dict[str, Any], num_micro_batches: int) -> None:
    engine.run_window([batch] * num_micro_batches, loss=lambda output, _: _some_loss(output))


def walk_again(engine: Engine, batch: dict[str, torch.Tensor], num_micro_batches: int = 1) -> Trace:
    """Another pass, of another shape or of a model that has been changed since. Call it inside the fake mode.

    Args:
        engine: from :func:`walk`; its own trace stays as it is.
        batch: keyword arguments of the model.
        num_micro_batches: that go through it layer by layer.

    Raises:
        CannotWalkError: the model failed.
    """
    manager = engine.manager
    before, manager.trace = manager.trace, None
    try:
        engine.zero_grad()
        with models_own_code():
            if num_micro_batches > 1:
                _walk_window(engine, batch, num_micro_batches)
            else:
                engine.backward(_some_loss(engine(**batch)))
        again = manager.trace
    finally:
        manager.trace = before
    if again is None:
        raise RuntimeError("the dry run recorded nothing")
    again.step_peak_bytes = again.streamed_piece_numel = 0
    return again


def walk_evaluation(engine: Engine, batch: dict[str, torch.Tensor], held_bytes: int = 0) -> Moment:
    """Forward of one batch without gradients, everything offloaded. Call it inside the fake mode, after a training pass.

    Args:
        engine: from :func:`walk`.
        batch: keyword arguments of the model.
        held_bytes: what the loop holds on the device meanwhile.

    Returns:
        What the pass needs, as one moment that reads every chunk.

    Raises:
        CannotWalkError: the model failed, as it does where its forward depends on values.
    """
    engine.eval()
    engine.device.reset_peaks()
    with models_own_code(), torch.no_grad():
        engine(**batch)
    memory = engine.device.memory()
    return Moment(
        " x ".join(str(length) for length in batch["input_ids"].shape) + " tokens",
        EVALUATION,
        [fact.index for fact in engine.facts],
        non_model_peak_bytes=memory.non_model_peak_bytes + held_bytes,
        gathered_peak_bytes=engine.device.model_data_peak_bytes,
        both_peak_bytes=memory.peak_bytes + held_bytes,
    )


@dataclass(frozen=True)
class Generation:
    """The largest passes that there will be.

    Attributes:
        rows: sequences at a time.
        tokens: of each, in all.
        prefills: rows and tokens of passes that begin sequences; by default all of them at once.
    """

    rows: int = 1
    tokens: int = 1
    prefills: tuple[tuple[int, int], ...] = ()

    @property
    def first_passes(self) -> tuple[tuple[int, int], ...]:
        """:attr:`prefills`, or what stands for them."""
        return self.prefills or ((self.rows, self.tokens),)

    @property
    def halved(self) -> Generation:
        """The same with half the rows, and half the tokens of each."""
        most = max(1, self.tokens // 2)
        prefills = dict.fromkeys((max(1, rows // 2), min(tokens, most)) for rows, tokens in self.prefills)
        return Generation(max(1, self.rows // 2), most, tuple(prefills))

    @property
    def is_least(self) -> bool:
        """Whether there is nothing to halve."""
        return max(self.rows, self.tokens, *(length for shape in self.prefills for length in shape)) == 1


@dataclass(frozen=True)
class Scoring(Generation):
    """Passes that tell how likely each token is, and keep no keys and values.

    Attributes:
        most_logits: see :func:`zero.likelihoods.scoring`.
    """

    most_logits: int = 1

    @property
    def halved(self) -> Scoring:
        """The same with half the rows: texts are as long as they are."""
        return replace(self, rows=max(1, self.rows // 2))

    @property
    def is_least(self) -> bool:
        """Whether there is nothing to halve."""
        return self.rows == 1


@dataclass(frozen=True)
class InferenceNeeds:
    """What a dry run found of them.

    Attributes:
        asked: the passes.
        trace: of all of them, each moment's highest; without keys and values, but for those that the moment itself makes.
        light: of the last token of each row, which reads all that is cached.
        cache_bytes_per_token: of keys and values.
    """

    asked: Generation
    trace: Trace
    light: Trace
    cache_bytes_per_token: int

    @property
    def cache_bytes(self) -> int:
        """Of all rows at the end."""
        return self.asked.rows * self.asked.tokens * self.cache_bytes_per_token


class InferenceWalk:
    """Passes without gradients, everything offloaded. Make and use it inside the fake mode.

    Args:
        model: with fake parameters; it is taken over.
        config: of the run.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        from zero.engine import Engine

        offloaded = load_config(config, {"memory": {"policy": "cpu", "pin": False, "host": "null", "disk": "null"}})
        self._model = model
        self._engine = Engine(model, None, None, offloaded, DryDevice(), None, arena=DryArena, only_infers=True)
        # For all keys and values that passes make.
        self._engine._planner.room_bytes = self._engine.device.capacity_bytes

    def walk(self, asked: Generation) -> InferenceNeeds:
        """The first passes, and the last.

        Raises:
            CannotWalkError: the model failed.
        """
        if isinstance(asked, Scoring):
            trace = self._scoring_pass(asked)
            return InferenceNeeds(asked, trace, trace, 0)
        light, cache = self._last_pass(asked)
        for moment in light.moments:  # products of single tokens wait for the weights, which therefore count as traffic
            moment.traffic_bytes += sum(self._engine.facts[chunk].gathered_bytes for chunk in moment.reads)
        (rows, tokens), *others = asked.first_passes
        trace, _ = self._pass(rows, tokens)
        for rows, tokens in others:
            trace.absorb(self._pass(rows, tokens)[0])
        trace.absorb(light)
        return InferenceNeeds(asked, trace, light, -(-cache_bytes_of(cache) // (asked.rows * asked.tokens)))

    def _last_pass(self, asked: Generation) -> tuple[Trace, Any]:
        """And the cache after it."""
        cache = getattr(self._pass(asked.rows, max(1, asked.tokens - 1))[1], "past_key_values", None)
        if asked.tokens < 2 or not cache_bytes_of(cache):
            return self._pass(asked.rows, 1)[0], cache
        return self._pass(asked.rows, 1, cache, asked.tokens)[0], cache

    def _scoring_pass(self, asked: Scoring) -> Trace:
        """One forward. Only the first row's tokens are looked at: those of the others need no more memory."""
        tokens = torch.ones((asked.rows, asked.tokens), dtype=torch.long)
        looked_at = torch.arange(asked.tokens)
        with scoring(self._model, looked_at, torch.zeros_like(looked_at), asked.most_logits):
            return self._forward(scoring_inputs(self._model, tokens, torch.ones_like(tokens)))[0]

    def _pass(self, rows: int, tokens: int, cache: Any = None, num_seen: int = 0) -> tuple[Trace, Any]:
        """One forward, and what it returned; with a cache the mask is of all ``num_seen`` tokens."""
        inputs = inference_inputs(self._model, torch.ones((rows, tokens), dtype=torch.long))
        if cache is not None:
            inputs |= {"past_key_values": cache, "attention_mask": torch.ones((rows, num_seen), dtype=torch.long)}
        return self._forward(inputs)

    def _forward(self, inputs: dict[str, Any]) -> tuple[Trace, Any]:
        self._engine.manager.trace = None
        with models_own_code():
            output = self._model(**inputs)
        trace = self._engine.manager.trace
        if trace is None:
            raise RuntimeError("the dry run recorded nothing")
        return trace, output


def inference_inputs(model: nn.Module, tokens: torch.Tensor) -> dict[str, Any]:
    """Arguments for a pass that fills a cache and wants the logits of the last position only, as far as it can say so."""
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": True}
    options = {"logits_to_keep": 1, "output_router_logits": False}
    parameters = inspect.signature(model.forward).parameters
    return inputs | {name: value for name, value in options.items() if name in parameters}


def cache_bytes_of(cache: Any) -> int:
    """Of the keys and values that a pass has left; 0 where the model keeps none."""
    layers = getattr(cache, "layers", ())
    kept = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in kept if isinstance(tensor, torch.Tensor))


def _some_loss(output: Any) -> torch.Tensor:
    """The model's loss, or for a model without one a scalar of all that it returned."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
    return torch.stack([leaf.float().sum() for leaf in leaves]).sum()


class Blueprint:
    """A fake copy of a model, kept to answer one question: what would this batch need, or have needed?

    It takes no memory to speak of. A model that cannot be copied has no answer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._mode = fake_mode()
        self._model: nn.Module | None = None
        try:
            self._model = fake_copy(model, self._mode)
        except Exception as error:  # a model may hold anything; without a copy the question stays open
            logger.debug("no blueprint of this model: %s", error)

    def trace(
        self, config: Config, args: Any, kwargs: Any, num_micro_batches: int = 1, exchange: Exchange = ALONE
    ) -> Trace | None:
        """The trace of a training pass over a batch of these shapes; None where it cannot be told."""
        model, self._model = self._model, None  # the walk takes the copy over, so it serves once
        if model is None:
            return None
        fake_args, fake_kwargs = pytree.tree_map_only(torch.Tensor, self._mode.from_tensor, (args, kwargs))
        try:
            with self._mode:
                return walk(model, None, config, fake_args, fake_kwargs, exchange, num_micro_batches)[0]
        except Exception as error:  # only advice is lost, and the refusal that asks for it must come out
            logger.debug("the blueprint cannot be walked through: %s", error)
            return None

    def inference(self, config: Config, wishes: Iterable[Generation]) -> Iterator[InferenceNeeds]:
        """What generation needs, one wish after the other as they are asked for; none where it cannot be told."""
        model, self._model = self._model, None
        if model is None:
            return
        try:
            with self._mode:
                walk = InferenceWalk(model, config)
            for asked in wishes:
                with self._mode:
                    found = walk.walk(asked)
                yield found
        except CannotWalkError as error:  # plans are then made from passes
            logger.debug("the blueprint cannot be walked through: %s", error)
