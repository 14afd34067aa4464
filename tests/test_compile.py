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
        pytest.param(_gpt2, "cpu", False, "aot_eager", marks=pytest.mark.full),
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


class _Ten(nn.Module):
    """Layers whose number counts, each a kind of its own."""

    def __init__(self, num_layers: int = 10) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.layers = nn.ModuleList([_Numbered(number) for number in range(num_layers)])

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.square().mean()


class _Numbered(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_idx = number
        self.inner = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.drop(self.inner(hidden)) / (self.layer_idx + 1)


class _Counting:
    """A backend that computes as it is, and counts what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch._dynamo.reset()
        self.num_compiled = 0
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=self._take))

    def _take(self, graph: Any, inputs: Any) -> Any:
        del inputs
        self.num_compiled += 1
        return graph.forward


def _engine(model: nn.Module) -> Any:
    config = {"device": {"type": "cpu"}, "train": {"compile": True}}
    return zero.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config)[0]


def _numbers(engine: Any, seed: int = 0) -> tuple[float, Tensor]:
    """Loss and the gradient of the embedding."""
    torch.manual_seed(seed)
    engine.zero_grad()
    loss = engine(torch.arange(16).view(2, 8))
    engine.backward(loss)
    return float(loss.detach()), engine.module.embed.weight.grad.clone()


def _plain(model: nn.Module, seed: int = 0) -> tuple[float, Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(torch.arange(16).view(2, 8))
    loss.backward()
    return float(loss.detach()), model.embed.weight.grad.clone()  # type: ignore[union-attr]


def _pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = _Ten()
    other = _Ten()
    other.load_state_dict(model.state_dict())
    return model, other


def test_blocks_whose_number_counts_and_more_kinds_than_torch_compiles_of_one_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counting = _Counting(monkeypatch)
    model, other = _pair()
    engine = _engine(model.eval())
    torch.testing.assert_close(_numbers(engine), _plain(other.eval()))
    assert counting.num_compiled == 10
    engine.close()


def test_dropout_goes_by_the_mode_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model from from_pretrained(), which comes in evaluation."""
    _Counting(monkeypatch)
    model, other = _pair()
    engine = _engine(model.eval())
    engine.train()
    torch.testing.assert_close(_numbers(engine), _plain(other.train()))
    engine.eval()
    torch.testing.assert_close(_numbers(engine), _plain(other.eval()))
    model.layers[3].drop.train()  # type: ignore[index, union-attr]
    other.layers[3].drop.train()  # type: ignore[index, union-attr]
    torch.testing.assert_close(_numbers(engine), _plain(other))
    engine.close()


@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.full), "after"])
def test_hooks_inside_of_a_block_run(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = _Counting(monkeypatch)
    model, other = _pair()
    for one in (model, other):
        one.eval()

    def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * 2

    if when == "before":
        model.layers[4].inner.register_forward_hook(doubled)  # type: ignore[index, union-attr]
    engine = _engine(model)
    if when == "after":
        model.layers[4].inner.register_forward_hook(doubled)  # type: ignore[index, union-attr]
    other.layers[4].inner.register_forward_hook(doubled)  # type: ignore[index, union-attr]
    torch.testing.assert_close(_numbers(engine), _plain(other))
    assert counting.num_compiled == 9
    engine.close()


def test_blocks_with_adapters_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their wrapper takes whatever it is given; without a word from us the model would fill a cache."""
    peft = pytest.importorskip("peft")
    counting = _Counting(monkeypatch)
    model = peft.get_peft_model(_llama(), peft.LoraConfig(target_modules=["q_proj"])).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = {"device": {"type": "cpu"}, "train": {"compile": True}}
    engine = zero.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.1), config=config)[0]
    ids = torch.arange(16).view(2, 8)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    assert counting.num_compiled > 0
    engine.close()


def test_a_block_is_recomputed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpointing stands around a block, not inside of what is compiled as well."""
    names: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model: Any = _llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    engine = _engine(model)
    ids = torch.arange(16).view(2, 8)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    assert names
    assert not any("checkpoint" in name for name in names)
    engine.close()
