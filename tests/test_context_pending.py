"""A model loaded inside ``ZeroInitContext`` before it is taken over, and the context itself."""

from __future__ import annotations

import copy
import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    OPTForCausalLM,
    PreTrainedModel,
)

import zero
from tests.context_models import (
    MODELS,
    assert_same,
    config,
    load_both,
    num_pending,
    save,
    through_an_engine,
)
from zero.errors import UserError

# -- before initialize -------------------------------------------------------------------------------------------------


@pytest.fixture
def streamed(tmp_path: Path) -> Any:
    save("opt, tied", tmp_path / "model")
    with zero.ZeroInitContext():
        return OPTForCausalLM.from_pretrained(tmp_path / "model")


def test_running_and_saving_are_refused_until_initialize(streamed: Any, tmp_path: Path) -> None:
    ids = torch.arange(4, 8)[None]
    for use in (
        lambda: streamed(ids),
        lambda: streamed.generate(ids, max_new_tokens=1),
        lambda: streamed.save_pretrained(tmp_path / "out"),
        lambda: streamed.state_dict(),
    ):
        with pytest.raises(UserError, match=r"zero\.initialize\(\) first"):
            use()
    assert not (tmp_path / "out").exists(), "nothing is written"
    assert num_pending(streamed) == len(list(streamed.parameters()))
    engine, *_ = zero.initialize(streamed, config=config())
    assert engine(ids).logits.isfinite().all()
    engine.close()
    streamed.generate(ids, max_new_tokens=1)
    streamed.save_pretrained(tmp_path / "out")
    assert not streamed._forward_pre_hooks
    assert not streamed._state_dict_pre_hooks
    assert "save_pretrained" not in vars(streamed)


def test_an_optimizer_made_before_initialize_sees_the_same_parameters(streamed: Any) -> None:
    optimizer = torch.optim.Adagrad(streamed.parameters(), lr=1e-2, initial_accumulator_value=0.5)
    assert num_pending(streamed) == len(list(streamed.parameters()))
    before = [id(parameter) for parameter in streamed.parameters()]
    engine, *_ = zero.initialize(streamed, optimizer, config=config())
    assert [id(parameter) for parameter in streamed.parameters()] == before
    ids = torch.arange(4, 8)[None]
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.close()


def test_what_asks_for_a_value_gets_it(tmp_path: Path) -> None:
    save("llama, untied", tmp_path)
    models = load_both(LlamaForCausalLM, tmp_path)
    for model in models:
        torch.manual_seed(2)
        model.resize_token_embeddings(100)
        with torch.no_grad():
            model.model.norm.weight.mul_(2)
            model.model.layers[0].mlp.up_proj.weight[0] = 7
        nn.init.normal_(model.model.layers[1].mlp.down_proj.weight)
        model.model.layers[1].input_layernorm.weight.requires_grad_(False)
        model.model.layers[1].self_attn.q_proj.weight.data.copy_(model.model.layers[0].self_attn.q_proj.weight)
    assert num_pending(models[1]) == len(list(models[1].parameters())) - 7
    through_an_engine(models[1])
    assert_same(*models)


def test_metadata_needs_no_values(streamed: Any) -> None:
    weight = streamed.model.decoder.layers[0].fc1.weight
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device) == ((64, 32), torch.float32, torch.device("cpu"))
    assert weight.stride() == (32, 1)
    assert weight.is_contiguous()
    assert weight.requires_grad
    assert weight.is_leaf
    assert weight.grad is None
    assert torch.zeros_like(weight).stride() == (32, 1)
    assert "fc1.weight" in repr(weight)
    assert streamed.num_parameters() > 0
    assert num_pending(streamed) == len(list(streamed.parameters()))


def test_an_alias_shares_the_values(streamed: Any) -> None:
    weight = streamed.model.decoder.layers[0].fc1.weight
    alias = weight.detach()
    alias.fill_(3)
    assert (weight == 3).all()


def test_a_deep_copy_is_pending_too_and_independent(streamed: Any, tmp_path: Path) -> None:
    twin = copy.deepcopy(streamed)
    assert num_pending(twin) == num_pending(streamed) > 0
    assert twin.lm_head.weight is twin.model.decoder.embed_tokens.weight
    through_an_engine(streamed)
    with pytest.raises(UserError, match="cannot run"):
        twin(torch.ones(1, 2, dtype=torch.long))
    through_an_engine(twin)
    assert_same(OPTForCausalLM.from_pretrained(tmp_path / "model"), twin)


def test_lora_on_a_streamed_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    save("opt, tied", tmp_path)
    losses = []
    for model in load_both(OPTForCausalLM, tmp_path):
        total = num_pending(model)
        torch.manual_seed(3)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        assert num_pending(adapted) == total, "adapters need no values of the base"
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        engine, *_ = zero.initialize(adapted, optimizer, config=config())
        engine.eval()
        ids = torch.arange(4, 20).reshape(2, 8)
        for _ in range(2):
            engine.zero_grad()
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        engine.close()
    assert losses[:2] == losses[2:]


def test_files_are_closed_once_everything_is_read(streamed: Any) -> None:
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("no /proc")

    def num_open() -> int:
        gc.collect()
        return sum("model.safetensors" in str(os.path.realpath(link)) for link in folder.iterdir())

    assert num_open() == 1
    engine, *_ = zero.initialize(streamed, config=config())
    assert num_open() == 0
    engine.close()


# -- the context itself ------------------------------------------------------------------------------------------------


def test_models_made_directly_are_made_as_ever() -> None:
    kind, opt = MODELS["opt, tied"]
    torch.manual_seed(5)
    plain = kind(opt)
    torch.manual_seed(5)
    with zero.ZeroInitContext():
        made = kind(opt)
        layer = nn.Linear(3, 3)
    assert num_pending(made) == 0
    assert layer.weight.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), made.parameters(), strict=True))
    through_an_engine(made)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), made.parameters(), strict=True))


def _methods() -> list[Any]:
    names = (
        (PreTrainedModel, "from_pretrained"),
        (PreTrainedModel, "_load_pretrained_model"),
        (AutoModelForCausalLM, "from_pretrained"),
    )
    return [owner.__dict__[name] for owner, name in names]


def test_transformers_is_restored_after_nesting_and_exceptions(tmp_path: Path) -> None:
    save("opt, tied", tmp_path)
    before, context = _methods(), zero.ZeroInitContext()
    with context:
        inside = _methods()
        assert all(a is not b for a, b in zip(before, inside, strict=True))
        with context, zero.ZeroInitContext():
            assert all(a is b for a, b in zip(inside, _methods(), strict=True))
        assert num_pending(OPTForCausalLM.from_pretrained(tmp_path)) > 0, "still inside the outer one"
    assert all(a is b for a, b in zip(before, _methods(), strict=True))
    with pytest.raises(ZeroDivisionError), context:
        raise ZeroDivisionError
    with pytest.raises(UserError), context:
        OPTForCausalLM.from_pretrained(tmp_path / "nothing")
    assert all(a is b for a, b in zip(before, _methods(), strict=True))
    assert num_pending(OPTForCausalLM.from_pretrained(tmp_path)) == 0


def test_other_threads_load_as_ever(tmp_path: Path) -> None:
    save("opt, tied", tmp_path)
    loaded: list[Any] = []
    with zero.ZeroInitContext():
        thread = threading.Thread(target=lambda: loaded.append(OPTForCausalLM.from_pretrained(tmp_path)))
        thread.start()
        thread.join()
        mine = OPTForCausalLM.from_pretrained(tmp_path)
    assert num_pending(mine) > 0
    assert num_pending(loaded[0]) == 0
    assert loaded[0](torch.ones(1, 2, dtype=torch.long)).logits.isfinite().all()


def test_an_exception_in_one_thread_leaves_another_ones_context_open(tmp_path: Path) -> None:
    save("opt, tied", tmp_path)

    def fail() -> None:
        with pytest.raises(UserError), zero.ZeroInitContext():
            OPTForCausalLM.from_pretrained(tmp_path / "nothing")

    with zero.ZeroInitContext():
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        assert num_pending(OPTForCausalLM.from_pretrained(tmp_path)) > 0
