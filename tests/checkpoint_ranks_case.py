"""For the checkpoint tests with several ranks: a small model that has everything, and its state put together again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import zero
from zero.checkpoint import contents

REPLICATE_BYTES = 600
"""Some chunks of the model below stay whole on all ranks, most are divided."""


class Small(nn.Module):
    """Layers of odd widths, a frozen one, one that no batch uses, a tied one, buffers, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 13)
        self.layers = nn.ModuleList([nn.Linear(13, 13) for _ in range(3)])
        self.norm = nn.BatchNorm1d(13)
        self.frozen = nn.Linear(13, 11)
        self.frozen.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(5))
        self.dropout = nn.Dropout(0.1)
        self.last = nn.Linear(11, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 7] to a scalar loss."""
        x = self.first(x.to(self.norm.running_mean.dtype))
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return self.last(self.frozen(self.dropout(self.norm(x)))).square().mean()


def place() -> tuple[int, int]:
    """Rank and number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def make(dtype: str = "fp32", accumulation: int = 1, seed: int = 0, **config: Any) -> Any:
    """An engine; the same on all ranks."""
    contents.MAX_FILE_BYTES = 1500  # several files of each rank
    torch.manual_seed(seed)
    model = Small()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    settings = {
        "device": {"type": "cpu"},
        "optimizer": {"kernel": "torch"},
        "precision": {"dtype": dtype, **({"growth_interval": 2} if dtype == "fp16" else {})},
        "train": {"gradient_accumulation_steps": accumulation, "max_grad_norm": 1.0},
        "parallel": {"replicate": REPLICATE_BYTES, "timeout": 20.0},
        "memory": {"chunk": 1000},
        **config,
    }
    engine = zero.initialize(model, optimizer, config=settings)[0]
    torch.manual_seed(100 * seed + place()[0])
    return engine


def train(engine: Any, num_micro_steps: int) -> list[float]:
    """Trains on this rank's own random batches."""
    losses = []
    for _ in range(num_micro_steps):
        engine.zero_grad()
        loss = engine(torch.randn(4, 7))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def whole_state(engine: Any) -> dict[str, Any]:
    """All that a resume must bring back, put together from all ranks' parts. All ranks must call it."""
    found: dict[str, Any] = {}
    updater = engine.optimizer.updater
    for tensor in engine._tensors.values():
        found[f"values {tensor.name}"] = tensor.chunk.values_of(tensor)
        if tensor.chunk.layout.trainable:
            found[f"master {tensor.name}"] = tensor.chunk.companion_of(tensor, "master").float()
        found[f"scalars {tensor.name}"] = updater.scalars.get(tensor)
        if tensor in updater.scalars:
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{key} {tensor.name}"] = tensor.chunk.companion_of(tensor, key)
    found["counters"] = (engine.num_steps, engine.num_skipped_steps, engine.grad_norm, engine._micro_step)
    found["scaler"] = engine.scaler.state_dict()
    return found


def own_state(engine: Any) -> dict[str, Any]:
    """What each rank has of its own."""
    return {"buffers": {n: b.clone() for n, b in engine.module.named_buffers()}, "rng": torch.get_rng_state()}


def files_of(checkpoint: Path) -> list[str]:
    """All files of a checkpoint, by path inside it."""
    return [str(path.relative_to(checkpoint)) for path in sorted(checkpoint.rglob("*")) if path.is_file()]
