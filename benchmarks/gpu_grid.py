"""A training step on one accelerator under capped memory: this project and its peers, predicted beside measured.

    python benchmarks/gpu_grid.py --out FOLDER [--systems ours fsdp2 deepspeed resident] [--seconds 500]

Each point runs in a fresh process, capped through the allocator: cards of 6 to 78 GiB are emulated in capacity, not in
speed. Of each cap a GiB is left for CUDA's context and libraries, which the allocator does not see. Points are taken in
order of importance until the time is over; what was left out is said. Same for all: bf16, fp32 master and moments, AdamW,
clipping at 1.0, activation checkpointing per block, logits and loss in pieces, the same random batch and weights.
``resident`` keeps everything on the device: the ceiling.

DeepSpeed is looked for on ``PEERS_PATH`` as well.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

GIB = 1 << 30
CONTEXT_BYTES = GIB
"""Of a card's memory, what is not the allocator's to give."""
LOSS_ROWS = 512
"""Tokens whose logits are there at a time, of the peers: 100 MB in fp32."""
SHAPES: dict[str, dict[str, Any]] = {
    "opt-1.3b": {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32},
    "opt-6.7b": {"hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 512},
}
GRID = [  # shape, cap in GiB, rows, tokens a row
    ("opt-1.3b", 6, 4, 2048),
    ("opt-1.3b", 24, 4, 2048),
    ("opt-6.7b", 24, 4, 2048),
    ("opt-1.3b", 6, 1, 2048),
    ("opt-1.3b", 78, 4, 2048),
    ("opt-6.7b", 78, 4, 2048),
    ("opt-6.7b", 10, 4, 2048),
    ("opt-6.7b", 24, 16, 2048),
    ("opt-1.3b", 24, 16, 2048),
]
SYSTEMS = ("ours", "fsdp2", "deepspeed", "resident")
RESULT = "result: "
"""Before the line that a process was started for: systems print others."""
ADAMW: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


# -- one point, in a process of its own ----------------------------------------------------------------------------------


def make_model(shape: dict[str, Any]) -> Any:
    """Random weights from one small block of numbers: drawing billions would take minutes."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(dropout=0.0, layerdrop=0.0, use_cache=False, word_embed_proj_dim=shape["hidden_size"], **shape)
    with torch.device("meta"):
        model = OPTForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    block = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        if name.endswith("norm.weight"):
            flat.fill_(1.0)
        else:
            flat.copy_(block.repeat(-(-flat.numel() // block.numel()))[: flat.numel()])
    model.tie_weights()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def allocator_bytes(job: dict[str, Any]) -> int:
    """What torch's allocator may take of the emulated card; the simulated device has no context."""
    return job["cap_bytes"] - (CONTEXT_BYTES if job["device"] == "cuda" else 0)


def use_chunked_loss(model: Any) -> None:
    """The peers' counterpart of ``train.chunked_loss``: without it the logits alone would fill a small card."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    def some_loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), targets, reduction="sum")

    def forward(_: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Any:
        hidden = model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        rows, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        pieces = zip(rows.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True)
        total = sum(checkpoint(some_loss, *piece, use_reentrant=False) for piece in pieces)
        return CausalLMOutputWithPast(loss=total / targets.numel())

    model.forward = MethodType(forward, model)


def start_ours(model: Any, job: dict[str, Any]) -> Any:
    """This project, with nothing set by hand."""
    import zero

    config = {
        "device": {"type": job["device"], "memory": f"{allocator_bytes(job)}B"},
        "precision": {"dtype": "bf16"},
        "train": {"max_grad_norm": 1.0, "chunked_loss": True},
    }
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    engine, *_ = zero.initialize(model=model, optimizer=optimizer, config=config)

    def step(batch: dict[str, torch.Tensor]) -> float:
        engine.zero_grad()
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    def told() -> dict[str, Any]:
        report = engine.memory_report()
        return {
            "predicted_step_s": engine.plan.predicted_step_s,
            "predicted_peak_bytes": report.predicted_device_peak_bytes,
            "measured_peak_bytes": report.device_peak_bytes,
            "pinned_bytes": report.pinned_bytes,
            "h2d_bytes": report.h2d_bytes,
            "d2h_bytes": report.d2h_bytes,
        }

    return step, told


def start_fsdp2(model: Any, job: dict[str, Any]) -> Any:
    """FSDP2 with pinned CPU offload and prefetch lists of depth 2, fused AdamW on the host."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    dist.init_process_group("cpu:gloo,cuda:nccl", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    options = {
        "mesh": init_device_mesh("cuda", (1,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=True),
    }
    model.float()
    layers = list(model.model.decoder.layers)
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for position, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[position + 1 : position + 3])
        layer.set_modules_to_backward_prefetch(layers[max(0, position - 2) : position][::-1])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    return plain_step(model, optimizer, contextlib.nullcontext()), dict


def start_deepspeed(model: Any, job: dict[str, Any]) -> Any:
    """ZeRO-3 with pinned offload of parameters and optimizer; windows sized to the cap."""
    import deepspeed as peer

    live = allocator_bytes(job) // 8
    config = {
        "train_micro_batch_size_per_gpu": job["rows"],
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": ADAMW},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 200_000_000,
            "stage3_prefetch_bucket_size": 100_000_000,
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live,
            "stage3_param_persistence_threshold": 100_000,
            "reduce_bucket_size": 100_000_000,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
        },
        "steps_per_print": 1 << 30,
    }
    engine, *_ = peer.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step(batch: dict[str, torch.Tensor]) -> float:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step, dict


def start_resident(model: Any, job: dict[str, Any]) -> Any:
    """Everything on the device: autocast over fp32 weights, fused AdamW."""
    model.float().to("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    return plain_step(model, optimizer, torch.autocast("cuda", torch.bfloat16)), dict


def plain_step(model: Any, optimizer: torch.optim.Optimizer, precision: contextlib.AbstractContextManager[Any]) -> Any:
    """The loop as everybody writes it.

    Args:
        model: called with a batch.
        optimizer: over its parameters.
        precision: what forward runs in; may be entered again and again.
    """

    def step(batch: dict[str, torch.Tensor]) -> float:
        optimizer.zero_grad()
        with precision:
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds, bytes and losses of a point."""
    import resource

    on_device = job["device"] == "cuda"
    if on_device and job["system"] != "ours":  # ours caps itself, and is told so
        share = allocator_bytes(job) / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    model = make_model(SHAPES[job["shape"]])
    if job["system"] != "ours":
        use_chunked_loss(model)
    vocab, num_parameters = model.config.vocab_size, sum(p.numel() for p in model.parameters())
    starts = {"ours": start_ours, "fsdp2": start_fsdp2, "deepspeed": start_deepspeed, "resident": start_resident}
    began_s = time.perf_counter()
    step, told = starts[job["system"]](model, job)
    setup_s = time.perf_counter() - began_s
    ids = torch.randint(4, vocab, (job["rows"], job["tokens"]), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if on_device:
        batch = {name: tensor.cuda() for name, tensor in batch.items()}
    losses, reserved_bytes, borders_s = [], [0], [time.perf_counter()]
    for _ in range(job["warmup"] + job["steps"]):
        losses.append(step(batch))
        borders_s.append(time.perf_counter())
        if on_device:  # ours sets the allocator's peaks back, so the last one is not the highest
            reserved_bytes.append(torch.cuda.max_memory_reserved())
    steps_s = [after - before for before, after in zip(borders_s, borders_s[1:], strict=False)][job["warmup"] :]
    return {
        "step_s": statistics.median(steps_s),
        "slowest_step_s": max(steps_s),
        "tokens_per_s": job["rows"] * job["tokens"] / statistics.median(steps_s),
        "tflops": 6 * num_parameters * job["rows"] * job["tokens"] / statistics.median(steps_s) / 1e12,
        "setup_s": setup_s,
        "device_peak_bytes": max(reserved_bytes),
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        **told(),
    }


# -- all points ----------------------------------------------------------------------------------------------------------


def environment_of(system: str) -> dict[str, str]:
    """What a point's process finds in its environment."""
    environment = dict(os.environ)
    if system == "deepspeed":
        paths = [os.environ.get(name, "") for name in ("PEERS_PATH", "PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        with socket.socket() as probe:  # a rank of one: without these it asks MPI who it is
            probe.bind(("127.0.0.1", 0))
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return environment


def run_point(job: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """A point in a fresh process; what went wrong is in ``error``."""
    command, environment = [sys.executable, __file__, "--job", json.dumps(job)], environment_of(job["system"])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return job | {"error": f"not done after {limit_s:.0f} s"}
    results = [line.removeprefix(RESULT) for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if results:  # whatever became of the process after it
        return job | json.loads(results[-1])
    said = [line for line in done.stderr.splitlines() if line.strip()]
    telling = [line for line in said if "Error" in line] or said or ["nothing was said"]
    return job | {"error": f"exit {done.returncode}: {telling[-1][:300]}"}


def main() -> None:
    """Runs the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-grid"))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=["ours"])
    parser.add_argument("--seconds", type=float, default=500.0, help="for all points together")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--device", choices=("cuda", "simulated"), default="cuda")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(RESULT + json.dumps(measure(json.loads(options.job))), flush=True)
        return
    grid = GRID if options.device == "cuda" else [("tiny", 1 / 512, 2, 32)]
    until_s = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for shape, cap_gib, num_rows, num_tokens in grid:
        for system in options.systems:
            job = {"system": system, "shape": shape, "cap_bytes": int(cap_gib * GIB), "rows": num_rows}
            job |= {"tokens": num_tokens, "device": options.device, "steps": options.steps, "warmup": options.warmup}
            left_s = until_s - time.monotonic()
            row = run_point(job, left_s) if left_s > 20 else job | {"error": "left out: the time was over"}
            rows.append(row)
            print(json.dumps(row), flush=True)
    name = options.out / f"grid-{'-'.join(options.systems)}.csv"
    with name.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {name}")


if __name__ == "__main__":
    main()
