"""What generation would take on published cards, computed and not measured: this project's plan beside the limit of hooks
that fetch each tensor when its module runs.

Ours is the plan of a dry run, in virtual time. Of accelerate the device map is its own; a forward then takes what it
computes and, one after the other, a copy of every offloaded tensor from pageable memory, at half the rate of the link.
Hooks and launches between them are not counted.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from generation_accelerate import PAGEABLE, brought_bytes, device_map_of
from generation_systems import generation_of, non_model_bytes, opt_config, walk_through

from gemini.accelerator import AcceleratorDevice
from gemini.plan import ChunkFacts, DoesNotFitError
from gemini.profile import NAMED, HardwareProfile
from gemini.schedule import moment_costs
from zero.config.loading import load_config
from zero.dryrun import InferenceNeeds
from zero.setup import policy_for

PLACES = (("opt-6.7b", "rtx3060-8gb"), ("opt-13b", "rtx3090"), ("opt-30b", "rtx3090"), ("opt-66b", "h100"))
BATCHES = (1, 4, 8, 16, 32)
PROMPT, NEW = 512, 32


@dataclasses.dataclass(frozen=True)
class Limit:
    """One system with one batch on one card.

    Attributes:
        shape: of the model.
        card: name of its profile.
        system: ``ours`` or ``accelerate``.
        batch: rows at a time.
        tokens_per_s: of all rows, in passes of one token each.
        link_bytes_per_pass: to the device.
        resident_bytes: of the model that stay there.
    """

    shape: str
    card: str
    system: str
    batch: int
    tokens_per_s: float
    link_bytes_per_pass: int
    resident_bytes: int


def limits_of(
    shape: str, card: str, batches: tuple[int, ...] = BATCHES, prompt: int = PROMPT, new: int = NEW
) -> list[Limit]:
    """Every batch that fits, of both systems."""
    from transformers import OPTForCausalLM

    wishes = [generation_of(batch, prompt, new) for batch in batches]
    facts, needs = walk_through(shape, "bf16", wishes)
    with torch.device("meta"):
        model = OPTForCausalLM(opt_config(shape)).to(torch.bfloat16)
    found = []
    for need in needs:
        found += [ours(shape, NAMED[card], facts, need), peers(shape, NAMED[card], facts, need, model)]
    return [limit for limit in found if limit is not None]


def ours(shape: str, profile: HardwareProfile, facts: list[ChunkFacts], need: InferenceNeeds) -> Limit | None:
    """What is planned; None where so many rows do not fit."""
    trace = copy.deepcopy(need.trace)
    for moment in trace.moments:
        moment.raise_non_model(moment.non_model_peak_bytes + need.cache_bytes)
    policy = policy_for(load_config({}), AcceleratorDevice, profile)
    try:
        plan = policy.decide(facts, trace.with_work_of(need.light), profile.capacity_bytes)
    except DoesNotFitError:
        return None
    rows = need.asked.rows
    rate, num_bytes = rows / plan.predicted_step_s, plan.predicted_h2d_bytes
    return Limit(shape, profile.name, "ours", rows, rate, num_bytes, plan.resident_parameter_bytes)


def peers(
    shape: str, profile: HardwareProfile, facts: list[ChunkFacts], need: InferenceNeeds, model: torch.nn.Module
) -> Limit | None:
    """Compute and copies in turn; None where not even one module at a time fits."""
    share_bytes = profile.capacity_bytes - non_model_bytes(need)
    if share_bytes < max(fact.gathered_bytes for fact in facts):
        return None
    where = device_map_of(model, share_bytes, 1 << 50)
    brought = brought_bytes(model, where)
    compute_s = sum(cost.duration_s for cost in moment_costs(facts, need.light, profile))
    pass_s = compute_s + brought / (PAGEABLE * profile.h2d_bytes_per_s)
    whole_bytes = sum(parameter.nbytes for parameter in model.parameters())
    rows = need.asked.rows
    return Limit(shape, profile.name, "accelerate", rows, rows / pass_s, brought, max(0, whole_bytes - brought))
