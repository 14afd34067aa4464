"""The dry run: what it says must be what a real pass needs."""

from __future__ import annotations

import re

import pytest
import torch

import zero
from gemini.dryrun import fake_copy, fake_mode
from gemini.plan import DoesNotFitError
from gemini.policy import least_capacity_bytes
from tests import exactness, zoo
from zero.config.loading import load_config
from zero.dryrun import Blueprint, walk
from zero.planning import plan_run
from zero.setup import make_device

VALUE_DEPENDENT = {
    "blt",
    "dbrx",
    "jetmoe",
    "longcat_flash",
    "qwen4_exp",
    "qwen4_exp_text",
    "reformer",
    "xlm",
    "xmod",
}
"""Their forward branches on values, so fake tensors cannot walk through it."""

SMALL_OPT = {
    "model_type": "opt",
    "vocab_size": 512,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}


def _config(**device: object) -> dict[str, object]:
    return {
        "device": {"type": "simulated", "memory": "4MiB", **device},
        "model": {"config": SMALL_OPT, "tokenizer": "builtin"},
        "data": {"train": "builtin", "seq_length": 32},
        "train": {"per_device_train_batch_size": 2},
        "optimizer": {"kernel": "torch"},
    }


def _dry_least_bytes(model_type: str) -> int:
    mode = fake_mode()
    model = zoo.build(model_type)
    batch = zoo.batch(model_type, model)
    duplicate = fake_copy(model, mode)
    fake = {key: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    with mode:
        trace, engine = walk(duplicate, torch.optim.AdamW(duplicate.parameters()), load_config(None), (), fake)
    return least_capacity_bytes(engine.facts, trace)


def _compare(model_types: list[str]) -> None:
    for model_type in model_types:
        real_bytes = exactness.least_capacity(model_type)
        assert _dry_least_bytes(model_type) == pytest.approx(real_bytes, rel=0.02), model_type


def test_a_sample_of_architectures_needs_what_the_dry_run_says() -> None:
    known = [name for name in zoo.BUILT if name not in VALUE_DEPENDENT]
    _compare(["opt", "gpt2", "llama", "mixtral", *known[::20]])


@pytest.mark.full
def test_every_architecture_needs_what_the_dry_run_says() -> None:
    _compare([name for name in zoo.BUILT if name not in VALUE_DEPENDENT])


def test_the_original_model_is_not_touched() -> None:
    model = zoo.build("opt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    blueprint = Blueprint(model)
    batch = zoo.batch("opt", model)
    assert blueprint.trace(load_config(None), (), batch) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_that_branches_on_values_has_no_answer() -> None:
    model = zoo.build("xlm")
    assert Blueprint(model).trace(load_config(None), (), zoo.batch("xlm", model)) is None


def test_plan_run_predicts_the_measured_peak_within_5_percent() -> None:
    config = load_config(_config())
    planned = plan_run(config, make_device(config))
    assert planned is not None
    assert planned.plan is not None
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in SMALL_OPT.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **fields), dtype=torch.float32)
    engine, *_ = zero.initialize(model, torch.optim.AdamW(model.parameters()), config=config)
    tokens = torch.ones(2, 32, dtype=torch.long)
    for _ in range(4):
        engine.zero_grad()
        engine.backward(engine(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss)
        engine.step()
    measured_bytes = engine.memory_report().device_peak_bytes
    engine.close()
    assert planned.plan.predicted_device_peak_bytes == pytest.approx(measured_bytes, rel=0.05)


@pytest.mark.parametrize("memory", ["300KiB", "900KiB", "1100KiB"])
def test_a_refusal_names_a_capacity_that_works(memory: str) -> None:
    config = load_config(_config(memory=memory))
    planned = plan_run(config, make_device(config))
    assert planned is not None
    assert planned.refusal is not None
    assert {tier for _, tier, _, _ in planned.refusal.rows} == {"device"}
    advised = re.search(r"device.memory of at least (\d+KiB)", str(planned.refusal))
    assert advised is not None
    enough = load_config(_config(memory=advised.group(1)))
    planned = plan_run(enough, make_device(enough))
    assert planned is not None
    assert planned.plan is not None


def test_the_engine_refuses_with_a_capacity_that_works() -> None:
    with pytest.raises(DoesNotFitError) as refusal:
        exactness.managed("opt", 100 * 1024)
    advised = re.search(r"device.memory of at least (\d+)KiB", str(refusal.value))
    assert advised is not None
    run, _ = exactness.managed("opt", int(advised.group(1)) * 1024)
    assert run.losses == exactness.plain("opt").losses


def test_a_host_budget_that_is_too_small_is_refused() -> None:
    config = load_config({**_config(), "memory": {"host": "800KiB"}})
    planned = plan_run(config, make_device(config))
    assert planned is not None
    assert planned.refusal is not None
    assert "host" in str(planned.refusal)
