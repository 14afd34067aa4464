"""Blocks compiled one by one: plain PyTorch's results up to rounding, on any device, with everything offloaded."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import zero
from zero.compiling import _kind

VOCAB = 64


def _llama() -> nn.Module:
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2))


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=2))


def _train(make: Any, compiled: bool, device: dict[str, Any], checkpointing: bool) -> tuple[list[float], list[Tensor]]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make().train(False)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = {"device": device, "train": {"compile": compiled, "max_grad_norm": 1.0}, "memory": {"policy": "cpu"}}
    engine, *_ = zero.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for index in range(3):
        torch.manual_seed(index)
        ids = torch.randint(0, VOCAB, (2, 16))
        engine.zero_grad()
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        engine.manager.check_integrity()
    with torch.no_grad():
        losses.append(float(engine(input_ids=ids, labels=ids).loss))
    engine.close()
    assert not any("forward" in module.__dict__ for module in model.modules())
    return losses, [tensor.clone() for tensor in model.state_dict().values()]


@pytest.mark.parametrize(
    ("make", "device", "checkpointing", "backend"),
    [
        (_llama, "cpu", False, "aot_eager"),
        (_llama, "cpu", True, "aot_eager"),
        (_gpt2, "cpu", False, "aot_eager"),
        (_llama, "simulated", False, "aot_eager"),
        pytest.param(_llama, "cpu", False, "inductor", marks=pytest.mark.full),
    ],
)
def test_losses_and_weights_are_plain_pytorchs_up_to_rounding(
    make: Any, device: str, checkpointing: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Everything but the generated code is the same, and there in a second.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    section = {"type": device} | ({"memory": "500KiB"} if device == "simulated" else {})
    want, want_weights = _train(make, False, section, checkpointing)
    got, weights = _train(make, True, section, checkpointing)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for one, other in zip(weights, want_weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_blocks_that_differ_in_their_number_only_are_compiled_once() -> None:
    blocks = list(_llama().model.layers)
    assert len({_kind(block) for block in blocks}) == 1
    blocks[1].self_attn.scaling = 0.5
    assert len({_kind(block) for block in blocks}) == 2
