"""The model zoo: each architecture of transformers builds, and plain PyTorch trains it, repeatably."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests import zoo

_QUICK = zoo.BUILT[::8]
_SLOW = tuple(name for name in zoo.BUILT if name not in _QUICK)
_NUM_STEPS = 3
_MAX_PARAMS_BYTES = 2 * 2**20

Run = tuple[list[float], dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _train(model_type: str, seed: int = 0) -> Run:
    """Returns the losses of three AdamW steps on one batch, and the weights after them."""
    model = zoo.build(model_type, seed)
    inputs = zoo.batch(model_type, model, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(seed)
    losses = []
    for _ in range(_NUM_STEPS):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, dict(model.state_dict())


def _differing(first: Run, second: Run) -> list[str]:
    names = [name for name, value in first[1].items() if not torch.equal(value, second[1][name])]
    return names if first[0] == second[0] else ["loss", *names]


def _check_trains_repeatably(model_type: str) -> None:
    first = _train(model_type)
    assert all(map(math.isfinite, first[0]))
    assert first[0][-1] < first[0][0]
    assert _differing(first, _train(model_type)) == []


@pytest.mark.parametrize("model_type", _QUICK)
def test_sampled_architecture_trains_repeatably(model_type: str) -> None:
    _check_trains_repeatably(model_type)


@pytest.mark.full
@pytest.mark.parametrize("model_type", _SLOW)
def test_architecture_trains_repeatably(model_type: str) -> None:
    _check_trains_repeatably(model_type)


def test_another_seed_gives_another_run() -> None:
    assert "loss" in _differing(_train("llama", seed=0), _train("llama", seed=1))


def test_each_architecture_is_built_or_has_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(zoo.ARCHITECTURES) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(zoo.NOT_BUILT) <= set(zoo.ARCHITECTURES)
    assert set(zoo.BUILT) == set(zoo.ARCHITECTURES) - set(zoo.NOT_BUILT)
    assert all(len(reason) > 20 for reason in zoo.NOT_BUILT.values())
    with capsys.disabled():
        print(
            f"\nzoo: {len(zoo.ARCHITECTURES)} architectures, {len(zoo.BUILT)} built, not built: {dict(zoo.NOT_BUILT)}"
        )


@pytest.mark.parametrize("model_type", sorted(zoo.NOT_BUILT))
def test_reason_for_not_building_still_holds(model_type: str) -> None:
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    assert "labels" not in inspect.signature(model_class.forward).parameters
    with pytest.raises(KeyError, match="no labels"):
        zoo.build(model_type)


@pytest.mark.parametrize("model_type", _QUICK)
def test_sampled_architecture_is_tiny_fp32_and_in_blocks(model_type: str) -> None:
    facts = zoo.describe(model_type)
    assert facts.params_bytes <= _MAX_PARAMS_BYTES
    assert facts.num_blocks >= 2
    assert all(param.dtype == torch.float32 for param in zoo.build(model_type).parameters())


@pytest.mark.full
def test_no_architecture_is_large() -> None:
    sizes = {name: zoo.describe(name).params_bytes for name in zoo.BUILT}
    assert {name: size for name, size in sizes.items() if size > _MAX_PARAMS_BYTES} == {}


def test_facts_of_known_architectures() -> None:
    assert zoo.describe("gpt2").tied == (("transformer.wte.weight", "lm_head.weight"),)
    assert zoo.describe("llama").tied == ()
    assert zoo.describe("llama").blocks == {"model.layers": 2}
    assert zoo.describe("gpt2").draws_random
    assert not zoo.describe("llama").draws_random
    assert zoo.describe("roformer").num_frozen == 1
    assert any("encoder_attn" in name for name in zoo.describe("bart").unused)
    assert any(len(group) > 1 and "shared_transf" in group[0] for group in zoo.describe("zamba").tied)


def test_building_keeps_the_random_generator_and_any_layer_kind() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    hybrid = zoo.build("qwen3_next")
    assert torch.equal(before, torch.get_rng_state())
    assert set(hybrid.config.layer_types) == {"linear_attention", "full_attention"}


def test_batch_has_padding_without_labels() -> None:
    inputs = zoo.batch("llama", zoo.build("llama"), batch_size=3, tokens=10)
    assert inputs["input_ids"].shape == (3, 10)
    padded = inputs["attention_mask"] == 0
    assert padded.sum() == 3
    assert (inputs["labels"][padded] == -100).all()
    assert torch.equal(inputs["labels"][~padded], inputs["input_ids"][~padded])
