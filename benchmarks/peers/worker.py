"""One rank of one system in a fresh process: a few steps on a fixed batch, then what was measured, as JSON.

Started by ``python benchmarks/peers``; takes a job as JSON: system, shape, batch, seq, lr, warmup, steps, out.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "opt-125m": {},  # transformers' defaults
    "opt-350m": {
        "hidden_size": 1024,
        "ffn_dim": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
}


def make_model(shape: str) -> Any:
    """The model with the same random weights everywhere, in fp32, without dropout."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(dropout=0.0, layerdrop=0.0, use_cache=False, **SHAPES[shape]))


def make_batch(vocab: int, job: dict[str, Any], rank: int, num_ranks: int) -> dict[str, torch.Tensor]:
    """This rank's part of a fixed random batch; the reference gets the whole."""
    ids = torch.randint(4, vocab, (num_ranks * job["batch"], job["seq"]), generator=torch.Generator().manual_seed(1))
    mine = ids if job["whole_batch"] else ids[rank * job["batch"] : (rank + 1) * job["batch"]]
    return {"input_ids": mine, "attention_mask": torch.ones_like(mine), "labels": mine}


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def _peak_bytes() -> int:
    """Highest resident bytes so far. Not ``ru_maxrss``: that begins with what the parent had when it started us."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no VmHWM: peaks are measured on Linux only")


def _import_system(name: str) -> None:
    """Whatever the system needs, so that the baseline holds it."""
    import transformers.models.opt.modeling_opt  # noqa: F401

    if name.startswith("ours"):
        import zero.initializer  # noqa: F401
    elif name.startswith("deepspeed"):
        import deepspeed  # noqa: F401


def _between(borders_s: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(borders_s)]


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Runs the job's steps.

    A step's seconds reach from its beginning to the next one's: work that a system leaves to the next step counts, and
    what the last one leaves is made up for by what the last warm-up step has left.
    """
    from systems import SYSTEMS

    rank, num_ranks = int(os.environ["RANK"]), int(job["num_ranks"])
    _import_system(job["system"])
    baseline_bytes = _resident_bytes()
    model = make_model(job["shape"])
    batch = make_batch(model.config.vocab_size, job, rank, num_ranks)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    system = SYSTEMS[job["system"]]
    session = system.start(model, job["lr"], system.options | {"batch": job["batch"]})
    losses, borders_s, borders_cpu_s = [], [time.perf_counter()], [time.process_time()]
    for _ in range(job["warmup"] + job["steps"]):
        losses.append(session.step(batch))
        borders_s.append(time.perf_counter())
        borders_cpu_s.append(time.process_time())
    return {
        "step_s": _between(borders_s)[job["warmup"] :],
        "cpu_s": _between(borders_cpu_s)[job["warmup"] :],
        "losses": losses,
        "baseline_bytes": baseline_bytes,
        "peak_bytes": _peak_bytes(),
        "num_parameters": num_parameters,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "settings": session.settings,
        "engaged": session.engaged,
    }


def main() -> None:
    """Measures, and writes the result to the job's file, rank's number appended."""
    warnings.filterwarnings("ignore")
    job = json.loads(sys.argv[1])
    result = measure(job)
    Path(f"{job['out']}.{os.environ['RANK']}").write_text(json.dumps(result, default=str), encoding="utf-8")
    if torch.distributed.is_initialized() and not job["system"].startswith("ours"):
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
