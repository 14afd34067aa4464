"""The core of the exactness suite on a real accelerator; the same code on the simulated one, so that it cannot rot.

``python -m pytest -m gpu tests/test_accelerator.py`` needs an accelerator, and of packages what ``zero.initialize`` needs
beside transformers and pytest.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import zero
from gemini.plan import ChunkFacts, Plan
from gemini.segment import Placement
from zero.engine import Engine

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, by the first product on a GPU
VOCAB, ROWS, LENGTH, NUM_STEPS = 512, 4, 64, 5
BLOCKS = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": VOCAB}
DEVICES = ["simulated", pytest.param("cuda", marks=pytest.mark.gpu)]
CAP = {"simulated": "40MiB", "cuda": "2GiB"}


@pytest.fixture
def _repeats_to_the_bit(where: str) -> Iterator[None]:
    """Whatever comes in another order on an accelerator does not. With ``warn_only`` fused attention stays as it is."""
    with sdpa_kernel(SDPBackend.MATH) if where == "cuda" else contextlib.nullcontext():
        torch.use_deterministic_algorithms(where == "cuda", warn_only=True)
        yield
    torch.use_deterministic_algorithms(False)


def _opt() -> nn.Module:
    return OPTForCausalLM(OPTConfig(**BLOCKS, ffn_dim=256, word_embed_proj_dim=128, dropout=0.0))


def _gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=VOCAB, n_embd=128, n_layer=4, n_head=4, n_positions=LENGTH)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**BLOCKS, intermediate_size=256))


def _mixtral() -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(**BLOCKS, num_key_value_heads=2, intermediate_size=128, num_local_experts=4)
    )


MODELS = {"opt": _opt, "gpt2": _gpt2, "llama": _llama, "mixtral": _mixtral}


def _model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]().train()


def _batch(index: int) -> dict[str, Tensor]:
    torch.manual_seed(index)
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH))
    return {"input_ids": ids, "labels": ids}


def _plain(kind: str, where: str) -> tuple[list[float], dict[str, Tensor]]:
    """fp32 training with clipping, on the accelerator itself where there is one."""
    device = torch.device("cuda" if where == "cuda" else "cpu")
    model = _model(kind).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for index in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = model(**{name: tensor.to(device) for name, tensor in _batch(index).items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def _config(where: str, dtype: str = "fp32", **tables: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "device": {"type": where, "memory": CAP[where]},
        "precision": {"dtype": dtype},
        "train": {"max_grad_norm": 1.0},
        "optimizer": {"kernel": "torch"},
    }
    for name, table in tables.items():
        config[name] = config.get(name, {}) | table
    return config


def _engine(kind: str, config: dict[str, Any]) -> Engine:
    model = _model(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return zero.initialize(model=model, optimizer=optimizer, config=config)[0]


def _train(kind: str, config: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    engine = _engine(kind, config)
    losses = []
    for index in range(NUM_STEPS):
        engine.zero_grad()
        loss = engine(**_batch(index)).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        engine.manager.check_integrity()
    engine.close()
    return losses, {name: tensor.cpu() for name, tensor in engine.module.state_dict().items()}


def _assert_same(one: tuple[list[float], dict[str, Tensor]], other: tuple[list[float], dict[str, Tensor]]) -> None:
    assert one[0] == other[0]
    for name, tensor in one[1].items():
        assert torch.equal(tensor, other[1][name]), name


POLICIES: dict[str, dict[str, Any]] = {
    "cuda": {"policy": "cuda"},
    "cpu": {"policy": "cpu"},
    "auto": {"policy": "auto"},
    "static": {"policy": "static", "resident_parameters": 0.4, "resident_optimizer": 0.25},
}


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("where", DEVICES)
def test_fp32_is_plain_pytorch(where: str, kind: str, policy: str) -> None:
    want = _plain(kind, where)
    got = _train(kind, _config(where, memory=POLICIES[policy] | {"chunk": "256KiB"}))
    if where == "simulated":
        _assert_same(got, want)
        return
    # Updates on the host round differently from those on the device.
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)
    for name, tensor in got[1].items():
        torch.testing.assert_close(tensor, want[1][name], rtol=1e-3, atol=1e-4)


OVERLAPS = [
    {"memory": {"prefetch": depth}, "optimizer": {"workers": workers}}
    for depth, workers in itertools.product((0, 1, 2, 4), (0, 1, 2))
]


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.full), "fp32"])
@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.usefixtures("_repeats_to_the_bit")
def test_overlap_changes_no_bit(where: str, dtype: str) -> None:
    base = _config(where, dtype, memory={"policy": "cpu", "chunk": "256KiB"}, optimizer={"kernel": "auto"})
    want = _train("llama", copy.deepcopy(base) | {"optimizer": {"kernel": "auto", "workers": 0}})
    for overlap in OVERLAPS if where == "cuda" else OVERLAPS[4:6]:
        config = copy.deepcopy(base)
        for name, table in overlap.items():
            config[name] |= table
        _assert_same(_train("llama", config), want)


@pytest.mark.parametrize(
    "tables",
    [
        {"memory": {"activations": "host"}},
        {"train": {"max_grad_norm": None}, "optimizer": {"early": True}},
    ],
)
@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.usefixtures("_repeats_to_the_bit")
def test_what_moves_memory_changes_no_bit(where: str, tables: dict[str, dict[str, Any]]) -> None:
    base: dict[str, dict[str, Any]] = {"memory": {"policy": "cpu"}, "train": {"max_grad_norm": 1.0}, "optimizer": {}}
    off = copy.deepcopy(base)
    off["optimizer"]["early"] = False
    off["train"] |= {"max_grad_norm": tables.get("train", {}).get("max_grad_norm", 1.0)}
    for name, table in tables.items():
        base[name] |= table
    _assert_same(_train("opt", _config(where, "bf16", **base)), _train("opt", _config(where, "bf16", **off)))


def _train_placed(where: str, placements: Callable[[ChunkFacts], Placement]) -> tuple[list[float], dict[str, Tensor]]:
    """Every chunk is placed so from the first step on."""
    engine = _engine("llama", _config(where, "bf16", memory={"policy": "cpu"}, optimizer={"kernel": "auto"}))
    losses = []
    for index in range(NUM_STEPS):
        engine.manager.apply(Plan("test", [placements(fact) for fact in engine.facts]))
        engine._planner.needs_plan = False
        engine.zero_grad()
        loss = engine(**_batch(index)).loss
        engine.backward(loss)
        engine._planner.needs_plan = False
        engine.step()
        losses.append(float(loss.detach()))
        engine.manager.check_integrity()
    engine.close()
    return losses, {name: tensor.cpu() for name, tensor in engine.module.state_dict().items()}


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.usefixtures("_repeats_to_the_bit")
def test_a_streamed_update_is_one_of_states_that_stay(where: str) -> None:
    resident = _train_placed(where, lambda fact: Placement(0, fact.numel))
    _assert_same(_train_placed(where, lambda fact: Placement(streams_update=True)), resident)
    _assert_same(_train_placed(where, lambda fact: Placement(fact.numel, 0, streams_update=True)), resident)


@pytest.mark.parametrize("policy", ["cpu", "auto"])
@pytest.mark.parametrize("where", DEVICES)
def test_the_predicted_peak_is_the_measured_one(where: str, policy: str) -> None:
    engine = _engine("llama", _config(where, "bf16", memory={"policy": policy}))
    for index in range(4):
        engine.zero_grad()
        engine.backward(engine(**_batch(index)).loss)
        engine.step()
    report = engine.memory_report()
    assert abs(report.device_peak_bytes - report.predicted_device_peak_bytes) <= 0.05 * report.device_peak_bytes
    if where == "cuda":
        assert report.pinned_bytes == report.host_bytes
    engine.close()


@pytest.mark.gpu
def test_liger_computes_the_same_up_to_rounding() -> None:
    pytest.importorskip("liger_kernel")
    want, _ = _train("llama", _config("cuda"))
    got, _ = _train("llama", _config("cuda", train={"liger": True}))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
