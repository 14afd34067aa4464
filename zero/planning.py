"""Does it fit, and how: a config walked through on fake tensors before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gemini.device import Device
from gemini.dryrun import fake_conversions, fake_mode
from gemini.exchange import ALONE
from gemini.homes import spill
from gemini.hostinfo import host_memory
from gemini.plan import ChunkFacts, DoesNotFitError, Plan, disk_bytes, host_bytes
from gemini.policy import Policy, least_capacity_bytes
from gemini.segment import Placement
from gemini.timeline import required_bytes
from gemini.trace import Moment, Trace
from gemini.windows import SHORT, longer_window
from zero.config.loading import for_trainer
from zero.config.schema import Config
from zero.division import Division, DryExchange
from zero.dryrun import CannotWalkError, models_own_code, walk, walk_again, walk_evaluation
from zero.engine import Engine
from zero.host_room import disk_refusal, host_refusal, host_rows, sum_of
from zero.liger import require_kernels
from zero.models.build import dress, model_config, set_checkpointing
from zero.optim.fused import all_fused
from zero.optim.update import step_bytes
from zero.optimizers import build_optimizer
from zero.setup import make_policy
from zero.updating import begins_updates_early, fuses_by_default, update_bytes_per_numel, update_piece_numel

logger = logging.getLogger("zero")

Shape = tuple[int, int]
"""Rows of a batch, and tokens per row."""

_SCALARS_BYTES = 4096
"""Losses, norms and the like that a loop holds beside its last batches while it evaluates: less than this."""


@dataclass(frozen=True)
class DryRun:
    """What a config's passes need, whatever the device.

    Attributes:
        num_parameters: of the model, tied ones once.
        facts: of its chunks.
        trace: of one pass over the config's shape.
        update_bytes_per_numel: temporaries of the optimizer's arithmetic.
        fuses: updates on the device are torch's fused kernel.
        evaluation: of one evaluation batch; None where there is none.
        double: of a micro-batch of twice the rows; None where nobody asked.
        other_checkpointing: with activation checkpointing where the config has none, and the other way round; likewise.
        again: makes the dry run of a config that differs in other ways; likewise.
    """

    num_parameters: int
    facts: list[ChunkFacts]
    trace: Trace
    update_bytes_per_numel: int
    evaluation: Moment | None = None
    double: Trace | None = None
    other_checkpointing: Trace | None = None
    fuses: bool = False
    again: Callable[[Config], DryRun] | None = None

    @property
    def whole(self) -> Trace:
        """Training and evaluation as one trace, to say what both need."""
        evaluation = [self.evaluation] if self.evaluation is not None else []
        moments = [*self.trace.moments, *evaluation]
        about = self.trace
        return Trace(moments, about.batch_shapes, step_peak_bytes=about.step_peak_bytes, resident=about.resident)

    @property
    def tight_device_bytes(self) -> int:
        """The smallest device that is accepted under ``auto``."""
        return required_bytes(self.facts, [Placement() for _ in self.facts], self.whole)

    @property
    def least_device_bytes(self) -> int:
        """The smallest device to be advised: with room for activations that grow from pass to pass."""
        return least_capacity_bytes(self.facts, self.whole)


@dataclass(frozen=True)
class PlannedRun:
    """What a dry run found, and what was decided from it.

    Attributes:
        dry: what the passes need, on the device that it was planned for.
        plan: what the policy decided for the device's capacity; None if it does not fit.
        refusal: why not, if it does not fit.
        host_bytes: model data that the plan keeps on the host; of the all-offloaded one if it does not fit.
        host_peak_bytes: model data on the host at the highest: before the first plan, or during the steps.
        host_available_bytes: host memory free at the time.
        disk_bytes: model data that the plan keeps on disk.
    """

    dry: DryRun
    plan: Plan | None
    refusal: DoesNotFitError | None
    host_bytes: int
    host_peak_bytes: int
    host_available_bytes: int
    disk_bytes: int = 0

    def require(self) -> Plan:
        """The plan.

        Raises:
            DoesNotFitError: there is none.
        """
        if self.refusal is not None:
            raise self.refusal
        if self.plan is None:
            raise RuntimeError("a planned run has either a plan or a refusal")
        return self.plan


def plan_run(
    config: Config,
    device: Device,
    tokenizer: Any = None,
    host_available_bytes: int | None = None,
    evaluation_shape: Shape | None = None,
    num_ranks: int | None = None,
    num_local_ranks: int | None = None,
) -> PlannedRun:
    """Walks one micro-batch of the config's shape through the model without loading it.

    Args:
        config: of the run.
        device: that it is planned for.
        tokenizer: of the run, for a model given inline.
        host_available_bytes: of the machine that it is planned for; by default what this one has free.
        evaluation_shape: of the largest evaluation batch; None where nothing is evaluated.
        num_ranks: that share the chunks; by default what ``[parallel]`` says.
        num_local_ranks: of them on this machine, which share its host memory; by default all.

    Raises:
        CannotWalkError: the model fails on tensors without values (its forward branches on them, say), so that only the
            warm-up of the real run can tell.
    """
    config = for_trainer(config)
    num_ranks = num_ranks or config.parallel.data or 1
    dry = dry_run_of(config, tokenizer, evaluation_shape, num_ranks)
    free_bytes = host_available_bytes or host_memory().available_bytes
    limit_bytes = min(free_bytes, config.memory.host or free_bytes)
    early_bytes = room_for_early_updates(config, type(device), dry, limit_bytes, num_ranks)
    policy = make_policy(config, device, early_bytes=early_bytes)
    return decide(config, policy, dry, device.capacity_bytes, host_available_bytes, num_local_ranks or num_ranks)


def room_for_early_updates(config: Config, device: type[Device], dry: DryRun, limit_bytes: int, num_ranks: int) -> int:
    """Host memory for what updates inside backward overwrite, in bytes: what :func:`zero.updating.early_bytes` will say.

    Args:
        config: of the run.
        device: its kind.
        dry: what the passes need.
        limit_bytes: that the run may take.
        num_ranks: processes: several have no such updates.
    """
    if num_ranks > 1 or not begins_updates_early(config, device):
        return 0
    facts = dry.facts if config.memory.disk is None else spill(dry.facts, limit_bytes)
    spare_bytes = limit_bytes - host_bytes(facts, [Placement() for _ in facts])
    return max(0, min(spare_bytes // 2, sum(fact.companion_bytes for fact in facts)))


def dry_run_of(
    config: Config, tokenizer: Any, evaluation_shape: Shape | None, num_ranks: int, variants: bool = False
) -> DryRun:
    """The dry run of the model and the micro-batch that a config names; the arguments are those of :func:`dry_run`.

    Raises:
        CannotWalkError: the model failed.
        UserError: ``train.liger`` does not know the model.
    """
    shape = (config.train.per_device_train_batch_size, config.data.seq_length)
    transformers_config = model_config(config, tokenizer)

    def build() -> nn.Module:
        from transformers import AutoModelForCausalLM

        options = {"attn_implementation": config.model.attn_implementation} if config.model.attn_implementation else {}
        model = dress(AutoModelForCausalLM.from_config(transformers_config, dtype=torch.float32, **options), config)
        if config.train.liger:
            require_kernels(model)
        return model

    found = dry_run(build, config, shape, evaluation_shape, num_ranks, variants)
    if not variants:
        return found
    return replace(found, again=lambda changed: dry_run_of(changed, tokenizer, evaluation_shape, num_ranks))


def assumed_evaluation_shape(config: Config) -> Shape | None:
    """The largest evaluation batch there can be, before the data are read; None where nothing will be evaluated."""
    data = config.data
    if data.train is None or (data.eval is None and data.eval_split is None and data.eval_fraction == 0):
        return None
    return config.train.per_device_eval_batch_size, data.seq_length


def dry_run(
    build: Callable[[], nn.Module],
    config: Config,
    shape: Shape,
    evaluation_shape: Shape | None = None,
    num_ranks: int = 1,
    variants: bool = False,
) -> DryRun:
    """Runs forward and backward of one micro-batch, or of a window that goes through the model layer by layer, on fake
    tensors, and forward of one evaluation batch.

    Args:
        build: makes the model; called inside the fake mode.
        config: of the run.
        shape: of the micro-batch.
        evaluation_shape: of the evaluation batch; None: there is none.
        num_ranks: that share the chunks.
        variants: walk through the neighbours of the config as well: twice the rows, the other activation checkpointing.

    Raises:
        CannotWalkError: the model failed.
    """
    with fake_mode():
        with models_own_code(), fake_conversions():
            model = build()
        model.train()
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        optimizer = build_optimizer(model, config)
        update_bytes, fuses = update_bytes_per_numel(optimizer, config), all_fused(optimizer, fuses_by_default(config))
        exchange = DryExchange(Division(0, num_ranks, config.parallel.replicate)) if num_ranks > 1 else ALONE
        num_in_turn = config.train.num_in_turn
        num_walked = SHORT if num_in_turn > SHORT + 1 else num_in_turn
        trace, engine = walk(model, optimizer, config, (), _batch(shape), exchange, num_walked)
        if num_in_turn > num_walked:
            trace = _long_window(engine, trace, _batch(shape), num_in_turn)
        evaluation = None
        if evaluation_shape is not None:
            batches_bytes = sum(t.nbytes for t in _batch(shape).values()) * config.train.gradient_accumulation_steps
            evaluation = walk_evaluation(engine, _batch(evaluation_shape), batches_bytes + _SCALARS_BYTES)
        double, other_checkpointing = _neighbours(engine, config, shape) if variants else (None, None)
    return DryRun(num_parameters, engine.facts, trace, update_bytes, evaluation, double, other_checkpointing, fuses)


def _walk_pass(engine: Engine, config: Config, batch: dict[str, torch.Tensor]) -> Trace:
    num_in_turn = config.train.num_in_turn
    if num_in_turn <= SHORT + 1:
        return walk_again(engine, batch, num_in_turn)
    return _long_window(engine, walk_again(engine, batch, SHORT), batch, num_in_turn)


def _long_window(engine: Engine, short: Trace, batch: dict[str, torch.Tensor], num_micro_batches: int) -> Trace:
    """Of a window too long to be walked through, unless there is no other way."""
    longer = longer_window(short, walk_again(engine, batch, SHORT + 1), num_micro_batches)
    return longer if longer is not None else walk_again(engine, batch, num_micro_batches)


def _neighbours(engine: Engine, config: Config, shape: Shape) -> tuple[Trace, Trace | None]:
    engine.train()
    double = _walk_pass(engine, config, _batch((2 * shape[0], shape[1])))
    try:
        set_checkpointing(engine.module, "non_reentrant" if config.train.checkpointing == "off" else "off")
        return double, _walk_pass(engine, config, _batch(shape))
    except (CannotWalkError, ValueError, AttributeError) as error:  # not every model has it
        logger.debug("no dry run with other activation checkpointing: %s", error)
        return double, None


def _batch(shape: Shape) -> dict[str, torch.Tensor]:
    tokens = torch.ones(shape, dtype=torch.long)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def decide(
    config: Config,
    policy: Policy,
    dry: DryRun,
    capacity_bytes: int,
    host_available_bytes: int | None = None,
    num_local_ranks: int = 1,
    checks_disk: bool = True,
) -> PlannedRun:
    """The policy's answer for a capacity, and what the host must hold for each of the ranks that share it.

    Args:
        config: of the run.
        policy: that decides.
        dry: what the passes need.
        capacity_bytes: of the device.
        host_available_bytes: of the machine; by default what this one has free.
        num_local_ranks: that share host and disk.
        checks_disk: whether ``memory.disk`` is on this machine, which tells how much room there is.
    """
    available_bytes = host_available_bytes or host_memory().available_bytes
    limit_bytes = min(available_bytes, config.memory.host or available_bytes) // num_local_ranks
    if config.memory.disk is not None:
        dry = replace(dry, facts=spill(dry.facts, limit_bytes))
    dry = replace(dry, trace=_on_device(dry, capacity_bytes))
    plan: Plan | None = None
    refusal: DoesNotFitError | None = None
    try:
        plan = _plan(policy, dry, capacity_bytes)
    except DoesNotFitError as error:
        refusal = error
    placements = plan.placements if plan is not None else [Placement() for _ in dry.facts]
    rows = host_rows(policy, dry.facts, placements, plan)
    peak_bytes = sum_of(rows)
    if refusal is None and peak_bytes > limit_bytes:
        refusal = host_refusal(config, policy, dry.facts, rows, limit_bytes)
    on_disk = disk_bytes(dry.facts, [Placement() for _ in dry.facts] if policy.name == "auto" else placements)
    if refusal is None and config.memory.disk is not None and checks_disk:
        refusal = disk_refusal(config.memory.disk, on_disk * num_local_ranks)
    if refusal is not None:
        plan = None
    staying = host_bytes(dry.facts, placements), peak_bytes, available_bytes, disk_bytes(dry.facts, placements)
    return PlannedRun(dry, plan, refusal, *staying)


def _on_device(dry: DryRun, capacity_bytes: int) -> Trace:
    """The trace with what depends on the device; the dry run's own may serve for others beside it."""
    return replace(
        dry.trace,
        step_peak_bytes=step_bytes(dry.facts, dry.update_bytes_per_numel, capacity_bytes),
        streamed_piece_numel=update_piece_numel(dry.facts, dry.fuses, capacity_bytes),
    )


def _plan(policy: Policy, dry: DryRun, capacity_bytes: int) -> Plan:
    """The plan for the training pass, an evaluation batch having been found to fit as well."""
    try:
        plan = policy.decide(dry.facts, dry.trace, capacity_bytes)
    except DoesNotFitError as error:
        raise policy.refusal(dry.facts, dry.whole, capacity_bytes) from error
    if dry.evaluation is not None:
        # Where it needs the room, "auto" takes everything off the device before an evaluation batch.
        placements = [Placement() for _ in dry.facts] if policy.name == "auto" else plan.placements
        if required_bytes(dry.facts, placements, Trace([dry.evaluation])) > capacity_bytes:
            raise policy.refusal(dry.facts, dry.whole, capacity_bytes)
    return plan
