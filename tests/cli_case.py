"""What the tests of the command line share: a run small enough for seconds, and how to start it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zero.cli.main import main
from zero.config.overrides import parse_overrides
from zero.report.metrics import read_metrics

# Time, and what depends on it, differs between two runs that are otherwise the same.
TIMES = ("tokens_per_s", "step_s")

TINY: dict[str, Any] = {
    "device": {"type": "simulated", "memory": "2MiB"},
    "model": {
        "config": {
            "model_type": "opt",
            "vocab_size": 512,
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "dropout": 0.1,
        }
    },
    "data": {"train": "builtin", "max_samples": 6, "seq_length": 32},
    "optimizer": {"kernel": "torch"},
    "train": {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 6, "save_steps": 3},
}


def write_config(folder: Path, **tables: dict[str, Any]) -> str:
    """The tiny config, with tables laid over it, as a file; returns its path."""
    config = json.loads(json.dumps(TINY))
    for name, table in tables.items():
        config.setdefault(name, {}).update(table)
    path = folder / "tiny.json"
    path.write_text(json.dumps(config))
    return str(path)


def train(folder: Path, output_dir: Path, *arguments: str) -> int:
    """``zero train`` of the tiny config, in this process; returns the exit code."""
    parse_overrides(arguments)  # a slip in a test is an error, not a refusal that the test mistakes for another
    return main(["train", write_config(folder), "--train.output_dir", str(output_dir), *arguments])


def comparable_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run without what is never the same twice."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read_metrics(run)]


def weights(run: Path) -> bytes:
    """The trained weights of a run."""
    return (run / "model" / "model.safetensors").read_bytes()


def listing(folder: Path) -> list[tuple[str, int]]:
    """Everything below a folder with its time of change: equal before and after means nothing was written."""
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))
