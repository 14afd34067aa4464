"""Models and loops for the tests of windows that go through a model layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.engine_models import MODELS, VOCAB, batches
from tests.reference import LARGE_BYTES, Recipe, Run, adamw, finish, make_engine

WINDOW = 4
"""Micro-batches."""


def without_dropout(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same model: random numbers are drawn in another order, layer by layer."""

    def built() -> nn.Module:
        model = build()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0  # type: ignore[assignment]
        return model

    return built


def _untied(config: Any, kind: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return kind(config).train()

    return build


_OPT = transformers.OPTConfig(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, ffn_dim=64, num_attention_heads=4, dropout=0.0,
    max_position_embeddings=64, word_embed_proj_dim=32, tie_word_embeddings=False,
)  # fmt: skip
_GPT2 = transformers.GPT2Config(
    vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=3, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    tie_word_embeddings=False,
)  # fmt: skip


class Block(nn.Module):
    """A layer that also gets the embedded tokens, and leaves something behind for the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(24, 24)
        self.gate = nn.Linear(24, 24, bias=False)
        self.left: list[Tensor] = []

    def forward(self, hidden: Tensor, first: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.gate(hidden).tanh()
        left = (gate * gate).mean()
        return hidden + self.inner(hidden * scale) * gate + 0.5 * first, left


class Tangled(nn.Module):
    """Everything that makes a graph hard to cut.

    Glue between blocks with a parameter of its own, a tensor that all blocks and the end use, tuples, results of blocks
    that only the loss uses, a frozen block, a parameter that the model itself owns, a block that some batches skip.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 24)
        self.layers = nn.ModuleList([Block() for _ in range(4)])
        self.scale = nn.Parameter(torch.full((24,), 0.7))
        self.norms = nn.ModuleDict({str(n): nn.LayerNorm(24) for n in range(4)})
        self.head = nn.Linear(24, VOCAB)
        self.layers[1].requires_grad_(False)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Any:
        first = self.embed(input_ids)
        scale = self.scale * 2
        hidden, kept, left = first * 1.5, [], []
        for number, layer in enumerate(self.layers):
            if number == 2 and int(input_ids[0, 0]) % 2:
                continue
            hidden, aside = layer(self.norms[str(number)](hidden), first=first, scale=scale)
            hidden = hidden * 0.9 + 0.1 * scale
            kept.append(hidden)
            left.append(aside)
        hidden += kept[0]
        logits = self.head(hidden + first)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss + 0.1 * torch.stack(left).sum())


class Reaching(nn.Module):
    """A model that uses its blocks' results in other ways than most do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 24)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(24, 24), nn.GELU()) for _ in range(3)])
        self.head = nn.Linear(24, VOCAB)
        self.how = how

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Any:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
            if self.how == "in place":
                hidden.mul_(2.0)
            elif self.how == "in place by a word":
                before, hidden = hidden, nn.functional.relu(hidden, inplace=True)
                hidden = hidden + before
        if self.how == "unseen":  # torch functions are watched, these are not
            hidden = _Unseen.apply(hidden)
        elif self.how == "unseen and seen":
            hidden = _Unseen.apply(hidden) + hidden
        logits = self.head(hidden)
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


class _Unseen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * 2


def _seeded(kind: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return kind().train()

    return build


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "opt": _untied(_OPT, transformers.OPTForCausalLM),
    "gpt2": _untied(_GPT2, transformers.GPT2LMHeadModel),
    "llama": MODELS["llama"],
    "mixtral": MODELS["mixtral"],
    "tied-opt": without_dropout(MODELS["opt-pre-norm"]),
    "tied-gpt2": without_dropout(MODELS["gpt2"]),
    "dropout-opt": MODELS["opt-pre-norm"],
    "tangled": _seeded(Tangled),
    "in place": _seeded(lambda: Reaching("in place")),
    "in place by a word": _seeded(lambda: Reaching("in place by a word")),
    "unseen": _seeded(lambda: Reaching("unseen")),
    "unseen and seen": _seeded(lambda: Reaching("unseen and seen")),
}


def recipe(name: str, checkpointing: str | None = None, window: int = WINDOW, **changes: Any) -> Recipe:
    """Three windows of one of :data:`BUILDERS`."""

    def build() -> nn.Module:
        model: Any = BUILDERS[name]()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
            model.config.use_cache = False
        return model  # type: ignore[no-any-return]

    return Recipe(build, batches(3 * window), adamw, accumulation=window, max_grad_norm=0.05).but(**changes)


def windows(whole: Recipe) -> list[list[dict[str, Tensor]]]:
    """The recipe's micro-batches, step by step."""
    return [whole.batches[i : i + whole.accumulation] for i in range(0, len(whole.batches), whole.accumulation)]


def one_step(engine: Any, window: list[dict[str, Tensor]], order: str, run: Run) -> None:
    """A window and its update, the books checked."""
    engine.zero_grad()
    if order == "layer":
        run.losses += [float(loss) for loss in engine.run_window(window)]
        engine.check_integrity()
        assert engine.is_boundary
    else:
        for position, batch in enumerate(window):
            loss = engine(**batch).loss
            engine.backward(loss)
            run.losses.append(float(loss.detach()))
            if position < len(window) - 1:
                engine.step()
        engine.end_of_loader()
    engine.step()
    engine.check_integrity()
    run.norms.append(engine.grad_norm)
    run.scales.append(engine.loss_scale)


def train(whole: Recipe, order: str, capacity_bytes: int | None = None, policy: str = "auto", **changes: Any) -> Run:
    """The recipe in one order of its micro-batches; ``run.extra["reports"]`` has a memory report for each step."""
    engine, run = make_engine(whole, capacity_bytes, policy, **changes), Run()
    torch.manual_seed(whole.seed)
    reports = []
    for window in windows(whole):
        one_step(engine, window, order, run)
        reports.append((engine.memory_report(), engine.last_step_peak_bytes))
    run.extra["reports"] = reports
    run.extra["facts"] = engine.facts
    return finish(engine, run)


def least_window_capacity(whole: Recipe, **changes: Any) -> int:
    """The smallest device on which the recipe's windows run layer by layer, everything offloaded."""
    from gemini.policy import least_capacity_bytes

    engine = make_engine(whole, LARGE_BYTES, "cpu", **changes)
    engine.run_window(windows(whole)[0])
    least_bytes = least_capacity_bytes(engine.facts, engine.manager.trace)
    engine.close()
    return least_bytes
