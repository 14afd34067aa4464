"""Losses computed piece by piece are those of plain PyTorch, on every kind of model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

import zero
from zero.chunked_loss import Head
from zero.lazy_logits import LazyHead, LazyLogits

VOCAB, HIDDEN = 97, 12


@pytest.fixture
def no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for all logits fails."""

    def real(logits: LazyLogits) -> Tensor:
        raise AssertionError(f"all logits {tuple(logits.shape)} were asked for")

    monkeypatch.setattr(LazyLogits, "real", real)


def _linear(bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(HIDDEN, VOCAB, bias=bias).to(dtype)


def _lazy(module: nn.Linear, hidden: Tensor, most_logits: int = 300) -> LazyLogits:
    return LazyLogits(Head(module, most_logits, lambda: None), hidden)


def _loss(logits: Any, labels: Tensor, reduction: str = "mean") -> Tensor:
    """As transformers computes it."""
    logits = logits.float()
    shifted = functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return functional.cross_entropy(logits.view(-1, VOCAB), shifted.view(-1), ignore_index=-100, reduction=reduction)


def _older_loss(logits: Any, labels: Tensor) -> Tensor:
    shifted = logits[..., :-1, :].contiguous()
    return nn.CrossEntropyLoss()(shifted.view(-1, shifted.size(-1)), labels[..., 1:].contiguous().view(-1))


def _capped(logits: Any, labels: Tensor) -> Tensor:
    return _loss(torch.tanh(logits / 3.0) * 3.0, labels)


def _batch(dtype: torch.dtype = torch.float32, masked: bool = True) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(3, 7, HIDDEN, dtype=dtype)
    labels = torch.randint(0, VOCAB, (3, 7))
    if masked:
        labels[0, :4] = -100
    return hidden.requires_grad_(), labels


def _run(make_logits: Any, loss: Any, module: nn.Linear, hidden: Tensor, labels: Tensor) -> list[Tensor]:
    value = loss(make_logits(module, hidden), labels)
    inputs = [hidden, *module.parameters()]
    return [value.detach(), *torch.autograd.grad(value * 3.0, inputs)]


@pytest.mark.usefixtures("no_logits")
@pytest.mark.parametrize("most_logits", [1, 97, 300, 1500])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("loss", [_loss, _older_loss, _capped, lambda x, y: _loss(x, y, "sum")])
def test_loss_and_gradients_are_those_of_all_logits_at_once(most_logits: int, bias: bool, loss: Any) -> None:
    module, (hidden, labels) = _linear(bias), _batch()
    want = _run(lambda m, h: m(h), loss, module, hidden, labels)
    got = _run(lambda m, h: _lazy(m, h, most_logits), loss, module, hidden, labels)
    for one, other in zip(got, want, strict=True):
        # Sums in another order round otherwise, and by how much is the processor's.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("no_logits")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits_it_is_about_as_near_the_truth(dtype: torch.dtype) -> None:
    module, (hidden, labels) = _linear(dtype=dtype), _batch(dtype)
    truth_module = _linear()
    truth_module.load_state_dict(module.state_dict())
    truth_hidden = hidden.detach().float().requires_grad_()
    truth = _run(lambda m, h: m(h), _loss, truth_module, truth_hidden, labels)
    plain = _run(lambda m, h: m(h), _loss, module, hidden, labels)
    ours = _run(lambda m, h: _lazy(m, h), _loss, module, hidden, labels)
    for one, other, true in zip(ours, plain, truth, strict=True):
        assert one.dtype == other.dtype
        assert (one.float() - true).norm() <= 1.5 * (other.float() - true).norm() + 1e-6


def test_few_logits_give_the_same_bits() -> None:
    module, (hidden, labels) = _linear(), _batch()
    want = _run(lambda m, h: m(h), _loss, module, hidden, labels)
    got = _run(lambda m, h: _lazy(m, h, 1 << 20), _loss, module, hidden, labels)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_no_label_that_counts_gives_nan_as_in_torch() -> None:
    module, (hidden, labels) = _linear(), _batch()
    assert _loss(_lazy(module, hidden), torch.full_like(labels, -100)).isnan()


def test_whatever_cannot_be_put_off_gets_the_logits() -> None:
    module, (hidden, _) = _linear(), _batch()
    want = module(hidden)
    lazy = lambda: _lazy(module, hidden)  # noqa: E731
    assert torch.equal(lazy().argmax(-1), want.argmax(-1))
    assert torch.equal(lazy() + 1, want + 1)
    assert torch.equal(torch.softmax(lazy(), -1), want.softmax(-1))
    assert torch.equal(lazy()[..., :5], want[..., :5])
    assert torch.equal(lazy()[1], want[1]) if isinstance(lazy()[1], Tensor) else torch.equal(lazy()[1].real(), want[1])
    assert torch.equal(lazy().view(-1), want.view(-1))
    assert torch.equal(lazy() * want, want * want)
    assert (lazy().shape, lazy().size(-1), lazy().dtype) == (want.shape, VOCAB, want.dtype)
    written = lazy()
    written[..., 0] = -1e9
    assert torch.equal(written.argmax(-1), torch.cat([want[..., :1] - 1e9, want[..., 1:]], -1).argmax(-1))
    first = torch.zeros(21, dtype=torch.int64)
    smooth = functional.cross_entropy(lazy().view(-1, VOCAB), first, label_smoothing=0.1)
    assert torch.equal(smooth, functional.cross_entropy(want.view(-1, VOCAB), first, label_smoothing=0.1))


# -- in an engine --------------------------------------------------------------------------------------------------------

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "llama": {"intermediate_size": 32},
    "gemma2": {"intermediate_size": 32, "head_dim": 8, "num_key_value_heads": 1, "final_logit_softcapping": 2.0},
    "cohere": {"intermediate_size": 32, "logit_scale": 0.3},
}


def _model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    tokens = {"vocab_size": 512, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **tokens, **CONFIGS[kind])).train(False)


def _losses(model: nn.Module, config: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = zero.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for index in range(3):
        torch.manual_seed(index)
        ids = torch.randint(3, 512, (2, 24))
        engine.zero_grad()
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        engine.manager.check_integrity()
    engine.close()
    return losses, {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.usefixtures("no_logits")
@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_model_trains_as_it_does_with_all_logits(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    section: dict[str, Any] = {"type": device} | ({"memory": "700KiB"} if device == "simulated" else {})
    config = {"device": section, "train": {"max_grad_norm": 1.0}}
    want, want_weights = _losses(_model(kind), config)
    monkeypatch.setattr("zero.engine.most_logits", lambda config: 5000)
    chunked = copy.deepcopy(config)
    chunked["train"]["chunked_loss"] = True
    got, weights = _losses(_model(kind), chunked)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, want_weights[name], rtol=1e-3, atol=2e-4)


def test_the_device_needs_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zero.engine.most_logits", lambda config: 16_384 if config.train.chunked_loss is True else None)
    peaks = {}
    for chunked in (False, True):
        model = _model("opt")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        config = {"device": {"type": "simulated", "memory": "4MiB"}, "train": {"chunked_loss": chunked}}
        engine, *_ = zero.initialize(model=model, optimizer=optimizer, config=config)
        ids = torch.randint(3, 512, (8, 60))
        for _ in range(2):
            engine.zero_grad()
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        peaks[chunked] = engine.memory_report().non_model_peak_bytes
        engine.close()
    logits_bytes = 8 * 60 * 512 * 4
    assert peaks[True] < peaks[False] - logits_bytes


def test_evaluation_generation_and_the_logits_themselves_still_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zero.engine.most_logits", lambda config: 5000)
    model = _model("llama")
    plain = copy.deepcopy(model)
    config = {"device": {"type": "simulated", "memory": "700KiB"}, "train": {"chunked_loss": True}}
    engine, *_ = zero.initialize(model=model, config=config)
    ids = torch.randint(3, 512, (2, 24))
    with torch.no_grad():
        want = plain(input_ids=ids, labels=ids)
        got = engine(input_ids=ids, labels=ids)
        torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(got.logits.argmax(-1), want.logits.argmax(-1))
        assert torch.equal(engine(input_ids=ids).logits, want.logits)
        assert torch.equal(model.generate(ids, max_new_tokens=3), plain.generate(ids, max_new_tokens=3))
    engine.close()
    assert "forward" not in model.get_output_embeddings().__dict__


def test_other_models_are_left_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    LazyHead(model, 1, lambda: None).remove()
    assert "forward" not in model[0].__dict__
