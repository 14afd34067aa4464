"""Plain PyTorch beside the engine, three AdamW steps, bit for bit: used by the exactness suite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import zero
from gemini.policy import least_capacity_bytes
from tests import zoo

NUM_STEPS = 3
LARGE = 1 << 40


@dataclass
class Run:
    """What a training run left behind."""

    losses: list[float]
    weights: dict[str, torch.Tensor]


def plain(model_type: str) -> Run:
    """Three AdamW steps of plain PyTorch."""
    model = zoo.build(model_type)
    batch = zoo.batch(model_type, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    seed_all()
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Run(losses, model.state_dict())


def seed_all() -> None:
    """Both generators that models of the zoo draw from."""
    import random

    torch.manual_seed(7)
    random.seed(7)


def make_engine(model_type: str, capacity_bytes: int, policy: str = "auto", **memory: Any) -> Any:
    """An engine on the simulated device, and a batch for it."""
    model = zoo.build(model_type)
    batch = zoo.batch(model_type, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = {
        "device": {"type": "simulated", "memory": capacity_bytes},
        "memory": {"policy": policy, **memory},
        "optimizer": {"kernel": "torch"},
    }
    engine, *_ = zero.initialize(model, optimizer, config=config)
    return engine, batch


def least_capacity(model_type: str) -> int:
    """The smallest device on which one pass of this model runs, everything offloaded."""
    engine, batch = make_engine(model_type, LARGE, "cpu")
    seed_all()
    engine.backward(engine(**batch).loss)
    least_bytes = least_capacity_bytes(engine.facts, engine.manager.trace)
    engine.close()
    return least_bytes


def managed(model_type: str, capacity_bytes: int) -> tuple[Run, Any]:
    """Three steps of the engine, its books checked after each."""
    engine, batch = make_engine(model_type, capacity_bytes)
    losses = []
    seed_all()
    for _ in range(NUM_STEPS):
        engine.zero_grad()
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.check_integrity()
        engine.step()
        engine.check_integrity()
        losses.append(loss.item())
    report = engine.memory_report()
    weights = engine.module.state_dict()
    engine.close()
    return Run(losses, weights), report
