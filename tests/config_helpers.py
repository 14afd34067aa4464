"""What the tests of the config share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zero.config import Config, load_config
from zero.config.schema import FIELDS, table_of
from zero.errors import ConfigError

LEAVES = [dotted for dotted in FIELDS if table_of(dotted) is None]
ROOT = Path(__file__).resolve().parent.parent


def problems_of(source: Any, overrides: Any = None, **kwargs: Any) -> list[str]:
    """The problem lines of a config that must be refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides, **kwargs)
    return caught.value.problems


def has_line(problems: list[str], fragments: list[str]) -> bool:
    """Whether one and the same line holds all fragments."""
    return any(all(fragment in line for fragment in fragments) for line in problems)


def values(config: Config) -> dict[str, Any]:
    return config.model_dump()


def nested(dotted: str, value: Any) -> dict[str, Any]:
    for name in reversed(dotted.split(".")):
        value = {name: value}
    return value


GOOD: dict[str, Any] = {
    "device": {"type": "simulated", "memory": "6GiB", "streams": "random", "stream_seed": 3},
    "memory": {"policy": "static", "resident_parameters": 0.25, "resident_optimizer": 1, "chunk": 1_000_000},
    "precision": {"dtype": "fp16", "initial_scale": 1024, "hysteresis": 1},
    "optimizer": {"name": "sgd", "lr": "1e-5", "momentum": 0.9, "weight_decay": 1},
    "scheduler": {"name": "cosine"},
    "train": {
        "max_steps": 10,
        "max_grad_norm": 1,
        "warmup_ratio": 0.1,
        "gradient_checkpointing": "reentrant",
        "report_to": ["wandb", "mlflow"],
        "resume_from_checkpoint": True,
    },
    "model": {"name_or_path": 'a"b\\c\n\x7f', "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}},
    "data": {"train_files": ["a.txt", "b.jsonl"], "validation_file": "c.csv", "packing": False, "streaming": True},
    "parallel": {"data": 2, "pipeline": 2, "tensor": {"mode": "2.5d", "depth": 1, "size": 4}},
}
