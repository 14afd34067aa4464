"""A small training run that one rank of many does, or a process alone with the same global batch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

NUM_STEPS = 5
GLOBAL_ROWS = 4
"""Sequences of a micro-batch, over all ranks."""
VOCABULARY = 96


@dataclass(frozen=True)
class Job:
    """What is run.

    Attributes:
        family: of the model.
        config: for ``zero.initialize``.
        accumulation: micro-batches a step.
        optimizer: name of a class in ``torch.optim``.
        uneven: rows of rank 0's share are longer than the others'.
    """

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    accumulation: int = 1
    optimizer: str = "AdamW"
    options: dict[str, Any] = field(default_factory=dict)


class OneSided(nn.Module):
    """Experts by the first token of a sequence: some ranks leave some out altogether, and not the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.layers = nn.ModuleList([nn.Linear(24, 24) for _ in range(2)])
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24)) for _ in range(4)])
        self.head = nn.Linear(24, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        from types import SimpleNamespace

        hidden = self.embed(input_ids)
        hidden = self.layers[0](hidden).tanh()
        rows = []
        for row, ids in zip(hidden, input_ids, strict=True):
            rows.append(row + self.experts[int(ids[0]) % 4](row))
        hidden = self.layers[1](torch.stack(rows))
        logits = self.head(hidden)
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


def make_model(family: str) -> Any:
    """A tiny model, the same in every process."""
    import transformers

    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    common |= {"max_position_embeddings": 32}
    if family == "opt":
        shape = {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}
        return transformers.OPTForCausalLM(transformers.OPTConfig(**common, **shape))
    if family == "llama":
        shape = {"intermediate_size": 64, "num_key_value_heads": 2}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **shape))
    if family == "mixtral":
        shape = {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**common, **shape))
    return OneSided()


def make_optimizer(model: nn.Module, job: Job) -> torch.optim.Optimizer:
    """The job's, with an eps well above the rounding of a gradient that should be zero."""
    options = {"lr": 1e-3, **job.options}
    if job.optimizer in ("AdamW", "Adam"):
        options = {"eps": 1e-6, **options}
    return getattr(torch.optim, job.optimizer)(model.parameters(), **options)


def share(step: int, micro_step: int, rank: int, num_ranks: int) -> dict[str, torch.Tensor]:
    """A rank's rows of a global micro-batch."""
    generator = torch.Generator().manual_seed(1000 * step + micro_step)
    whole = torch.randint(0, VOCABULARY, (GLOBAL_ROWS, 12), generator=generator)
    rows = GLOBAL_ROWS // num_ranks
    ids = whole[rank * rows : (rank + 1) * rows]
    return {"input_ids": ids, "labels": ids}


def train(job: Job) -> dict[str, Any]:
    """One rank's run: losses, norms, whole weights, what it held."""
    import torch.distributed as dist

    import zero

    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = make_model(job.family)
    config = {**job.config, "train": {**job.config.get("train", {}), "gradient_accumulation_steps": job.accumulation}}
    engine, *_ = zero.initialize(model, make_optimizer(model, job), config=config)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        for micro_step in range(job.accumulation):
            engine.zero_grad()
            loss = engine(**share(step, micro_step, rank, num_ranks)).loss
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
        engine.check_integrity()
        norms.append(engine.grad_norm)
    report = engine.memory_report()
    apart = getattr(engine.exchange, "num_apart", 0)
    state = engine.optimizer.state_dict()
    weights = {name: value.clone() for name, value in engine.module.state_dict().items()}
    return {
        "losses": losses,
        "norms": norms,
        "weights": weights,
        "state": state["state"],
        "host_bytes": report.host_bytes,
        "model_data_peak_bytes": report.model_data_peak_bytes,
        "peak_bytes": report.device_peak_bytes,
        "capacity_bytes": report.device_capacity_bytes,
        "predicted_bytes": report.predicted_device_peak_bytes,
        "num_apart": apart,
        "hash": digest(weights),
    }


def digest(weights: dict[str, torch.Tensor]) -> str:
    """Hash of all values, bit for bit."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(weights[name].reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
