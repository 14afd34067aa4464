"""Models that are no transformers, and parameters of every kind."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import zero
from tests.engine_models import llama
from tests.reference import (
    LARGE_BYTES,
    Batch,
    Recipe,
    Run,
    assert_same,
    config_of,
    least_capacity,
    make_engine,
    run_engine,
    run_plain,
    trainable,
)

PLACED: dict[str, dict[str, Any]] = {
    "cpu": {"policy": "cpu"},
    "cuda": {"policy": "cuda"},
    "cut": {"policy": "static", "resident_parameters": 0.5, "resident_optimizer": 0.3},
    "auto": {"policy": "auto"},
}


def _mean_square(model: nn.Module, batch: Batch) -> Tensor:
    output = model(**batch)
    return (output[0] if isinstance(output, tuple) else output).float().square().mean()


def _seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def seeded() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build()

    return seeded


def _inputs(*shape: int, num: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [{"input": torch.randn(*shape, generator=generator)} for _ in range(num)]


class Mlp(nn.Module):
    """Layers as attributes, no list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, input: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(input)))))


class Functional(nn.Module):
    """Parameters of its own, used by hand, one of them a scalar and one in a ParameterList."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.more = nn.ParameterList([torch.randn(8), torch.randn(1, 8)])
        self.named = nn.ParameterDict({"shift": torch.randn(8)})

    def forward(self, input: Tensor) -> Tensor:
        hidden = torch.einsum("bi,ij->bj", input, self.weight.t()) * self.scale
        return hidden * self.more[0] + self.more[1] - self.named["shift"] ** 2


class Recurrent(nn.Module):
    """Hands its weights to the kernel as a list."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.rnn(input)[0])


class Strided(nn.Module):
    """Transposed and permuted parameters, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.Parameter(torch.randn(8, 6).t())
        self.channels_last = nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
        self.flipped = nn.Parameter(torch.randn(2, 6, 5).permute(1, 2, 0))

    def forward(self, input: Tensor) -> Tensor:
        hidden = input @ self.transposed.t()
        hidden = torch.einsum("bi,ijk->bjk", hidden, self.flipped)
        image = input.new_ones(1, 3, 5, 5) * hidden.mean()
        return hidden.sum() + nn.functional.conv2d(image, self.channels_last).square().mean()


class Odd(nn.Module):
    """Parameters without elements, of one element, of integers and booleans; a frozen one; one nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.empty = nn.Parameter(torch.empty(0, 8))
        self.one = nn.Parameter(torch.ones(1, 1))
        self.table = nn.Parameter(torch.arange(8), requires_grad=False)
        self.mask = nn.Parameter(torch.arange(8) % 2 == 0, requires_grad=False)
        self.long_float = nn.Parameter(torch.randn(8, dtype=torch.float64), requires_grad=False)
        self.unread = nn.Parameter(torch.randn(5))

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.linear(input)[:, self.table] * self.mask * self.one
        return torch.cat([hidden, self.empty.to(hidden.dtype)]) + self.long_float.to(hidden.dtype)


class Normalised(nn.Module):
    """Buffers that forward writes, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(4, 4, 3, groups=2),
            nn.GroupNorm(2, 4), nn.Flatten(), nn.LazyLinear(5),
        )  # fmt: skip
        self.net(torch.zeros(1, 3, 8, 8))

    def forward(self, input: Tensor) -> Tensor:
        return self.net(input)


class Parametrised(nn.Module):
    """Weights computed from others before every use."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.orthogonal = parametrizations.orthogonal(nn.Linear(8, 8))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.old = nn.utils.weight_norm(nn.Linear(8, 8))

    def forward(self, input: Tensor) -> Tensor:
        return self.old(self.orthogonal(self.normed(input)))


class Attention(nn.Module):
    """torch's own encoder: fused paths that read weights without calling their modules."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, input: Tensor) -> Tensor:
        return self.encoder(input)


class Tied(nn.Module):
    """One weight under three names, once transposed, and a block used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.also = self.embed.weight

    def forward(self, input: Tensor) -> Tensor:
        ids = (input[:, :3].abs() * 7).long() % 11
        hidden = self.block(self.block(self.embed(ids)))
        return self.head(hidden) + hidden @ self.also.t()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (Mlp, (5, 8)),
    "one layer": (lambda: nn.Linear(8, 3), (5, 8)),
    "sequential": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 8), nn.PReLU())),
        (5, 8),
    ),
    "functional": (Functional, (5, 8)),
    "lstm": (lambda: Recurrent(nn.LSTM), (2, 4, 8)),
    "gru": (lambda: Recurrent(nn.GRU), (2, 4, 8)),
    "strided": (Strided, (5, 8)),
    "odd": (Odd, (5, 8)),
    "normalised": (Normalised, (2, 3, 8, 8)),
    "parametrised": (Parametrised, (5, 8)),
    "attention": (Attention, (2, 4, 8)),
    "tied": (Tied, (5, 8)),
}


@pytest.mark.parametrize("placed", PLACED.values(), ids=PLACED)
@pytest.mark.parametrize("name", MODELS)
def test_module_trains_exactly(name: str, placed: dict[str, Any]) -> None:
    build, shape = MODELS[name]
    whole = Recipe(_seeded(build), _inputs(*shape), loss=_mean_square, max_grad_norm=0.1)
    capacity_bytes = max(int(least_capacity(whole) * 1.2), 4096) if placed["policy"] == "auto" else LARGE_BYTES
    assert_same(run_engine(whole, capacity_bytes, **placed), _without_empty(run_plain(whole)))


def _without_empty(run: Run) -> Run:
    """Parameters without elements have no states here."""
    run.states = {name: state for name, state in run.states.items() if run.weights[name].numel()}
    return run


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["mlp", "functional", "lstm", "strided", "odd", "tied"])
def test_module_trains_exactly_in_low_precision(name: str, dtype: str) -> None:
    from tests.reference import DTYPES

    build, shape = MODELS[name]
    micro = [{"input": batch["input"].to(DTYPES[dtype])} for batch in _inputs(*shape)]
    whole = Recipe(_seeded(build), micro, loss=_mean_square, dtype=dtype, scale=64.0)
    assert_same(run_engine(whole, LARGE_BYTES, **PLACED["cut"]), _without_empty(run_plain(whole)))


def test_parameter_with_gaps_in_its_memory() -> None:
    """A slice becomes dense: the same numbers, but kernels may add them in another order."""

    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 10)[:, ::2])

        def forward(self, input: Tensor) -> Tensor:
            return input @ self.weight

    whole = Recipe(_seeded(Sliced), _inputs(5, 8), loss=_mean_square)
    run, want = run_engine(whole, LARGE_BYTES, **PLACED["cut"]), run_plain(whole)
    torch.testing.assert_close(run.weights["weight"], want.weights["weight"])
    assert run.losses == pytest.approx(want.losses, rel=1e-6)


def test_buffers_are_not_written_twice_when_a_batch_is_run_again() -> None:
    """BatchNorm counts batches: a forward that is started over starts from the same statistics."""
    build = _seeded(Normalised)
    small, large = _inputs(1, 3, 8, 8, num=2), _inputs(2, 3, 8, 8, num=2)
    whole = Recipe(build, [*small, *large, *small], loss=_mean_square)
    engine = make_engine(whole, int(least_capacity(whole) * 1.3))
    plain = run_plain(whole)
    torch.manual_seed(whole.seed)
    for index, batch in enumerate(whole.batches):
        engine.zero_grad()
        if index == 3:  # a hog in the way: the forward fails half-way and is run again with everything offloaded
            _hog_once(engine)
        engine.backward(engine(**batch).float().square().mean())
        engine.step()
    state = engine.module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.weights.items())
    engine.close()


def _hog_once(engine: Any) -> None:
    """The next forward runs out of memory in its last layer, once."""

    def fail(*_: Any) -> None:
        handle.remove()
        raise torch.OutOfMemoryError("a neighbour took it")

    handle = engine.module.net[7].register_forward_pre_hook(fail)


def test_parameters_of_mixed_dtype() -> None:
    """A master is fp32: a parameter that has more is refused, not rounded silently."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.single, self.more = nn.Linear(8, 8), nn.Linear(8, 2).double()

        def forward(self, input: Tensor) -> Tensor:
            return self.more(self.single(input).double())

    whole = Recipe(_seeded(Mixed), _inputs(5, 8), loss=_mean_square)
    model = whole.build()
    with pytest.raises(zero.UserError, match="float64"):
        zero.initialize(model, whole.optimizer(trainable(model)), config=config_of(whole, LARGE_BYTES))
    assert model.more.weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_model_given_in_bf16(dtype: str) -> None:
    """What is loaded in bf16 and trained in fp32 becomes fp32, as ``model.float()`` would."""

    def low() -> nn.Module:
        return _seeded(Mlp)().bfloat16()

    def as_master() -> nn.Module:
        return low().float()

    from tests.reference import DTYPES

    micro = [{"input": batch["input"].to(DTYPES[dtype])} for batch in _inputs(5, 8)]
    whole = Recipe(as_master, micro, loss=_mean_square, dtype=dtype, scale=64.0)
    assert_same(run_engine(whole.but(build=low), LARGE_BYTES, "cpu"), run_plain(whole))


def test_kinds_of_parameters_that_are_refused() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, dtype=torch.complex64))

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(3).to_sparse())

    for build, reason in ((Complex, "complex"), (Sparse, "sparse")):
        model = build()
        with pytest.raises(zero.UserError, match=f"weight .*{reason}"):
            zero.initialize(model, config=config_of(Recipe(build, []), LARGE_BYTES))
        assert type(model.weight) is nn.Parameter


def test_model_without_parameters() -> None:
    engine = zero.initialize(nn.Tanh(), config=config_of(Recipe(nn.Tanh, []), LARGE_BYTES))[0]
    assert torch.equal(engine(torch.ones(2)), torch.ones(2).tanh())
    engine.check_integrity()
    engine.close()


def test_parameter_that_begins_to_require_gradients_later_is_refused() -> None:
    def frozen() -> nn.Module:
        model = llama()
        model.lm_head.weight.requires_grad_(False)
        return model

    from tests.engine_models import batches

    whole = Recipe(frozen, batches())
    engine = make_engine(whole, LARGE_BYTES, "cpu")
    engine.backward(engine(**whole.batches[0]).loss)
    engine.step()
    next(p for n, p in engine.module.named_parameters() if n == "lm_head.weight").requires_grad_(True)
    engine.zero_grad()
    engine.backward(engine(**whole.batches[1]).loss)
    with pytest.raises(zero.UserError, match=r"lm_head\.weight.*require"):
        engine.step()
    engine.close()


def test_parameter_frozen_later_is_passed_over() -> None:
    from tests.engine_models import batches
    from tests.reference import Reference, Run, differences, finish

    whole = Recipe(llama, batches())
    reference, engine = Reference(whole), make_engine(whole, LARGE_BYTES, "auto")
    for model, optimizer in ((reference.model, reference.optimizer), (engine.module, engine.optimizer)):
        for index, batch in enumerate(whole.batches):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(index == 0 or "layers.1" not in name)
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    run = finish(engine, Run())
    want = Run(weights=dict(reference.model.state_dict()), states=reference.states())
    run.states = {name: run.states[name] for name in want.states if name in run.states}
    assert differences(run, want, states=False) == []


def test_several_inputs_positional_nested_and_none() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

        def forward(self, pair: tuple[Tensor, dict[str, Tensor]], nothing: None = None, *, flag: bool = True) -> Any:
            hidden = pair[0]
            for layer in self.layers:
                hidden = layer(hidden) + pair[1]["bias"]
            return {"out": [hidden, None], "flag": flag}

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model((batch["input"], {"bias": batch["input"].mean()}), None, flag=False)["out"][0].square().mean()

    whole = Recipe(_seeded(Nested), _inputs(5, 8), loss=loss)  # type: ignore[arg-type]
    for policy in ("cpu", "cuda", "auto"):
        assert_same(run_engine(whole, 8192 if policy == "auto" else LARGE_BYTES, policy), run_plain(whole))


def test_input_that_requires_gradients() -> None:
    whole = Recipe(_seeded(Mlp), _inputs(5, 8), loss=_mean_square)
    engine, plain = make_engine(whole, LARGE_BYTES, "cpu"), whole.build()
    grads = []
    for model in (engine.module, plain):
        input_ = whole.batches[0]["input"].clone().requires_grad_()
        model(input_).square().mean().backward()
        grads.append(input_.grad)
    assert torch.equal(*grads)
    engine.close()
