"""Runs one case of ``test_host_memory`` in a process of its own, whose peak resident memory then says something.

    python -m tests.host_memory_case train LAYERS MIB [FOLDER]   two steps with random weights; saves the model
    python -m tests.host_memory_case load FOLDER                 streams it into an engine

Each prints one line of JSON; as one of several ranks, it writes it to ``rank-R.json`` in FOLDER. ``MIB`` is what the
simulated device may hold, which is host memory too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import OPTConfig, OPTForCausalLM

import zero
import zero.initializer  # everything is imported before memory is measured
from gemini.hostinfo import peak_rss_bytes, process_rss_bytes
from zero.optim.native import load_native


def opt_350m(num_layers: int) -> OPTConfig:
    """The shapes of facebook/opt-350m, which has 24 layers: post-norm, embeddings of 512 projected to 1024, tied."""
    return OPTConfig(
        vocab_size=50272,
        hidden_size=1024,
        ffn_dim=4096,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        max_position_embeddings=2048,
        word_embed_proj_dim=512,
        do_layer_norm_before=False,
        dtype="bfloat16",
    )


def engine_config(device_mib: int) -> dict[str, Any]:
    return {
        "device": {"type": "simulated", "memory": device_mib << 20},
        "memory": {"policy": "cpu"},
        "precision": {"dtype": "bf16"},
        "train": {"max_grad_norm": 1.0},
    }


def warm_up() -> int:
    """Resident bytes of the process with everything imported and every library started."""
    torch.set_num_threads(2)
    load_native()
    torch.ones(64, 64) @ torch.ones(64, 64)
    return process_rss_bytes()


def num_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def train(num_layers: int, device_mib: int, folder: Path | None = None) -> dict[str, Any]:
    baseline_bytes = warm_up()
    torch.manual_seed(0)
    model = OPTForCausalLM(opt_350m(num_layers))
    total = num_parameters(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine, *_ = zero.initialize(model, optimizer, config=engine_config(device_mib))
    ids = torch.randint(4, 50000, (1, 16))
    losses = []
    for _ in range(2):
        engine.zero_grad()
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.check_integrity()
    figures = {
        "num_parameters": total,
        "baseline_bytes": baseline_bytes,
        "resident_bytes": process_rss_bytes(),
        "peak_bytes": peak_rss_bytes(),
        "host_bytes": engine.memory_report().host_bytes,
        "device_peak_bytes": engine.memory_report().device_peak_bytes,
        "losses": losses,
    }
    if folder is not None:
        engine.save_pretrained(folder)
    return figures


def load(folder: Path) -> dict[str, Any]:
    baseline_bytes = warm_up()
    started_s = time.perf_counter()
    with zero.ZeroInitContext():
        model = OPTForCausalLM.from_pretrained(folder)
    built_s = time.perf_counter()
    engine, *_ = zero.initialize(model, config=engine_config(512))
    ended_s = time.perf_counter()
    figures = {
        "num_parameters": num_parameters(model),
        "largest_bytes": 2 * max(p.numel() for p in model.parameters()),
        "baseline_bytes": baseline_bytes,
        "peak_bytes": peak_rss_bytes(),
        "host_bytes": engine.memory_report().host_bytes,
        "from_pretrained_s": built_s - started_s,
        "initialize_s": ended_s - built_s,
    }
    engine.close()
    return {**figures, "plain_read_s": min(plain_read_s(folder / "model.safetensors") for _ in range(3))}


def plain_read_s(path: Path) -> float:
    """Seconds to read a file into fresh memory."""
    started_s = time.perf_counter()
    target = torch.empty(path.stat().st_size, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        file.readinto(target.numpy().data)
    return time.perf_counter() - started_s


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    case = {"train": train, "load": load}[sys.argv[1]]
    arguments = [int(text) if text.isdigit() else Path(text) for text in sys.argv[2:]]
    figures = json.dumps(case(*arguments))
    if "RANK" in os.environ:
        (Path(sys.argv[-1]) / f"rank-{os.environ['RANK']}.json").write_text(figures, encoding="utf-8")
    sys.stdout.write(figures + "\n")
