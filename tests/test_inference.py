"""Engines that only infer: plans before the first pass, of their own, that hold while keys and values grow."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

from gemini.dryrun import fake_conversions, fake_mode
from gemini.plan import DoesNotFitError
from gemini.units import parse_bytes
from tests.generation_case import KINDS, generating, model_of, prompts, settings, tokens_of
from zero.config.loading import load_config
from zero.dryrun import Blueprint, Generation, InferenceWalk
from zero.generation import Sampling
from zero.inference import make_inference_engine
from zero.passes import PassPlanner

EXPECTED = Generation(4, 48, ((1, 48), (4, 24)))
CAPACITIES = ("256KiB", "400KiB", "1MiB")


def _simulated(memory: str, **more: Any) -> dict[str, Any]:
    return {"type": "simulated", "memory": memory, **more}


@pytest.mark.parametrize(
    "kind",
    ["opt-post-norm", *(pytest.param(kind, marks=pytest.mark.full) for kind in KINDS if kind != "opt-post-norm")],
)
def test_any_device_gives_the_same_tokens_and_holds_what_fits(kind: str) -> None:
    wanted = None
    held = []
    for memory in ("256KiB", "400KiB", "1MiB"):
        asked = [*zip(prompts(8, seed=2, longest=24), settings(8, seed=2), strict=True)]
        limits = {"max_rows": 4, "max_tokens": 48, "max_batch_tokens": 96, "max_cache_bytes": 96 << 10}
        with generating(model_of(kind), _simulated(memory), planned=EXPECTED, **limits) as generator:
            jobs = [generator.submit(prompt, sampling) for prompt, sampling in asked]
            generator.run()
            tokens = [tokens_of(job) for job in jobs]
            engine = generator.engine
            assert engine.device.memory().peak_bytes <= parse_bytes(memory)
            held.append(engine.plan.resident_parameter_bytes)
        wanted = wanted or tokens
        assert tokens == wanted
    assert held[0] <= held[-1] == sum(parameter.nbytes for parameter in model_of(kind).parameters())


def test_a_model_that_fits_stays_and_nothing_is_fetched() -> None:
    with generating(model_of("llama"), _simulated("1MiB"), planned=EXPECTED, max_rows=4, max_tokens=48) as generator:
        jobs = [generator.submit(prompt, Sampling(max_new_tokens=8)) for prompt in prompts(6, longest=24)]
        generator.run()
        assert all(job.done.is_set() for job in jobs)
        assert generator.statistics.streamed_bytes == 0


def test_a_pass_fetches_no_more_than_was_said() -> None:
    config = load_config({"device": _simulated("192KiB", profile="rtx3090")})
    engine, outlook = make_inference_engine(model_of("llama"), config, expected=Generation(1, 32))
    model: Any = engine.module
    tokens = torch.tensor([prompts(1, longest=1)[0]])
    assert outlook.device_bytes > 0
    assert outlook.tokens_per_s > 0
    assert f"about {outlook.tokens_per_s:.3g} tokens/s with 1 row of 32 tokens" in outlook.text
    output = None
    for _ in range(16):
        before_bytes = engine.manager.transfer.h2d_bytes
        cache = None if output is None else output.past_key_values
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        assert engine.manager.transfer.h2d_bytes - before_bytes <= outlook.streamed_bytes
    engine.close()


def test_plans_hold_while_keys_and_values_grow() -> None:
    with patch.object(PassPlanner, "_replan", autospec=True, side_effect=PassPlanner._replan) as replanned:
        model: Any = model_of("llama")
        config = load_config({"device": _simulated("256KiB")})
        engine, _ = make_inference_engine(model, config, expected=Generation(2, 40))
        ids = torch.tensor(prompts(1, longest=1) * 2)[:, :1].repeat(1, 8)
        model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=1)
        assert replanned.call_count <= 1  # once, if the real passes needed a little more than the dry ones
        engine.check_integrity()
        engine.close()


def test_keys_and_values_count_once() -> None:
    """In the room that plans keep for them, and not again in the moments after the block that has made them."""
    with fake_mode(), fake_conversions():
        walk = InferenceWalk(model_of("opt-pre-norm"), load_config({}))
        found = walk.walk(Generation(4, 40))
    blocks = [moment for moment in found.trace.moments if ".layers." in moment.label]
    assert len(blocks) == 3
    assert len({moment.non_model_peak_bytes for moment in blocks}) == 1
    model: Any = model_of("opt-pre-norm")
    config = load_config({"device": _simulated("400KiB")})
    engine, outlook = make_inference_engine(model, config, expected=Generation(4, 40))
    ids = torch.tensor([prompt[:1] * 36 for prompt in prompts(4, longest=1)])
    model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=1)
    assert engine.plan.resident_parameter_bytes == outlook.device_bytes > 0  # nothing made it give way
    engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_walked_through(kind: str) -> None:
    (found,) = Blueprint(model_of(kind)).inference(load_config({"device": _simulated("1MiB")}), [Generation(3, 40)])
    assert found.cache_bytes > 0


def test_more_than_was_expected_works_too() -> None:
    plain: Any = model_of("llama")
    ids = torch.tensor(prompts(1, longest=1) * 3)[:, :1].repeat(1, 12)
    wanted = plain.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=1)
    model: Any = model_of("llama")
    engine, _ = make_inference_engine(model, load_config({"device": _simulated("256KiB")}), expected=Generation(1, 4))
    for _ in range(2):
        assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=1), wanted)
        engine.check_integrity()
    engine.close()


@pytest.mark.parametrize("memory", CAPACITIES)
def test_it_fits_or_it_is_refused_before_the_first_pass(memory: str) -> None:
    """Prefill of all rows, then every token to the last: never out of memory after a yes."""
    model: Any = model_of("opt-pre-norm")
    rows, tokens = 3, 40
    config = load_config({"device": _simulated(memory)})
    if memory == "256KiB":
        with pytest.raises(DoesNotFitError, match="smallest change that would fit.* or fewer rows or tokens at a time"):
            make_inference_engine(model, config, expected=Generation(rows, tokens))
        return
    engine, _ = make_inference_engine(model, config, expected=Generation(rows, tokens))
    with patch.object(engine._planner, "offload_everything", side_effect=AssertionError("not as planned")):
        ids = torch.tensor([prompt[:1] * (tokens - 20) for prompt in prompts(rows, longest=1)])
        output = model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=1)
    assert output.shape == (rows, tokens)
    assert engine.device.memory().peak_bytes <= parse_bytes(memory)
    engine.close()
