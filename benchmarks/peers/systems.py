"""How each system trains: one function each, from a model to a step. A worker calls one of them in a fresh process.

All train the same fp32 initial weights with AdamW (betas 0.9 and 0.999, weight decay 0.01) and clip the global norm to 1,
compute in bf16 and keep an fp32 master and fp32 moments. Known differences that cannot be set away:

- ``plain`` computes under autocast: fp32 weights, cast to bf16 where an operator wants it, fp32 gradients.
- ``plain_master`` is the same bookkeeping as ours written out by hand: bf16 weights and gradients, fp32 master.
- FSDP2 shards fp32 weights and gathers them in bf16; gradients are cast to fp32 as they are sharded. They cross in bf16
  and are added in it, its fastest and smallest setting; ours are added in fp32, and kept so but in ``ours_lean``.
- DeepSpeed makes its master of the weights rounded to bf16.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

MAX_NORM = 1.0
ADAMW: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


@dataclass
class Session:
    """A system that is ready to train.

    Attributes:
        step: trains on one batch, returns the loss of this rank.
        settings: what was set, for the table's reader.
        engaged: proof that the system itself runs, not plain PyTorch in its name.
    """

    step: Callable[[dict[str, torch.Tensor]], float]
    settings: dict[str, Any]
    engaged: dict[str, Any] = field(default_factory=dict)


def _num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _join_gloo() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def _loop(model: Any, optimizer: torch.optim.Optimizer, context: Callable[[], Any]) -> Callable[..., float]:
    """The step as everybody writes it for plain PyTorch."""

    def step(batch: dict[str, torch.Tensor]) -> float:
        optimizer.zero_grad()
        with context():
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        return float(loss.detach())

    return step


def _autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


# -- the floor -----------------------------------------------------------------------------------------------------------


def reference(model: nn.Module, lr: float, options: dict[str, Any]) -> Session:
    """Plain PyTorch with everything in fp32: what losses are compared with."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True, **ADAMW)
    return Session(_loop(model, optimizer, contextlib.nullcontext), {"dtype": "fp32"})


def plain(model: nn.Module, lr: float, options: dict[str, Any]) -> Session:
    """Plain PyTorch under bf16 autocast; several processes: DistributedDataParallel."""
    settings: dict[str, Any] = {"dtype": "bf16 autocast, fp32 weights", "adamw": "fused"}
    trained: nn.Module = model
    if _num_ranks() > 1:
        _join_gloo()
        trained = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
        settings["ddp"] = "gradient_as_bucket_view, static_graph"
    optimizer = torch.optim.AdamW(trained.parameters(), lr=lr, fused=True, **ADAMW)
    return Session(_loop(trained, optimizer, _autocast), settings, {"class": type(trained).__name__})


def plain_master(model: nn.Module, lr: float, options: dict[str, Any]) -> Session:
    """Plain PyTorch with bf16 weights and an fp32 master, by hand: what ours does, without moving anything.

    One process only: a floor, not something that users have.
    """
    master = [nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()]
    weights = list(model.bfloat16().parameters())
    optimizer = torch.optim.AdamW(master, lr=lr, fused=True, **ADAMW)

    def step(batch: dict[str, torch.Tensor]) -> float:
        loss = model(**batch).loss
        loss.backward()
        for target, weight in zip(master, weights, strict=True):
            target.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(master, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(weights, master)
        return float(loss.detach())

    return Session(step, {"dtype": "bf16 weights, fp32 master", "adamw": "fused"})


# -- ours ----------------------------------------------------------------------------------------------------------------


def ours(model: nn.Module, lr: float, options: dict[str, Any]) -> Session:
    """This project's engine on the host; ``options``: memory.policy and whatever else a config takes."""
    import zero

    config = {
        "device": {"type": "cpu"},
        "memory": {"policy": options.get("policy", "auto")},
        "precision": {"dtype": "bf16"},
        "train": {"max_grad_norm": MAX_NORM},
    }
    for section, values in options.get("config", {}).items():
        config.setdefault(section, {}).update(values)
    zero.launch(config=config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **ADAMW)
    engine, *_ = zero.initialize(model=model, optimizer=optimizer)

    def step(batch: dict[str, torch.Tensor]) -> float:
        engine.zero_grad()
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    engaged = {"parameters": type(next(model.parameters())).__name__, "host_bytes": engine.memory_report().host_bytes}
    return Session(step, config, engaged)


# -- peers ---------------------------------------------------------------------------------------------------------------


def fsdp2(model: nn.Module, lr: float, options: dict[str, Any]) -> Session:
    """``fully_shard`` on each block and on the model; ``options``: offload, reshard, reduce_dtype."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    _join_gloo()
    reduce_dtype = torch.float32 if options.get("reduce_dtype") == "fp32" else torch.bfloat16
    keywords: dict[str, Any] = {
        "mesh": init_device_mesh("cpu", (_num_ranks(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype),
        # With pinned memory, the default, it asks for an accelerator.
        "offload_policy": CPUOffloadPolicy(pin_memory=False) if options.get("offload") else OffloadPolicy(),
        "reshard_after_forward": options.get("reshard", True),
    }
    for block in model.model.decoder.layers:  # type: ignore[union-attr]
        fully_shard(block, **keywords)
    fully_shard(model, **keywords)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True, **ADAMW)
    engaged = {"model": type(model).__name__, "parameters": type(next(model.parameters())).__name__}
    return Session(_loop(model, optimizer, contextlib.nullcontext), dict(options) | {"adamw": "fused"}, engaged)


def deepspeed(model: nn.Module, lr: float, options: dict[str, Any]) -> Session:
    """ZeRO-3 through ``deepspeed.initialize``: accelerate and Trainer drop it silently on CPUs."""
    import deepspeed as peer

    peer.init_distributed("gloo")
    offload: dict[str, Any] = {"stage3_param_persistence_threshold": 0}
    for name in ("offload_optimizer", "offload_param"):
        if options.get(name):
            offload[name] = {"device": "cpu", "pin_memory": False}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options["batch"],
        "gradient_clipping": MAX_NORM,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": lr} | ADAMW},
        "zero_optimization": {"stage": 3} | offload | options.get("zero", {}),
        "steps_per_print": 1 << 30,
    }
    engine, optimizer, *_ = peer.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step(batch: dict[str, torch.Tensor]) -> float:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    inner = getattr(optimizer, "optimizer", optimizer)
    engaged = {
        "engine": type(engine).__name__,
        "stage": engine.zero_optimization_stage(),
        "ranks": dist.get_world_size(),
    }
    return Session(step, config["zero_optimization"], engaged | {"adam": type(inner).__name__})


@dataclass(frozen=True)
class System:
    """A row of the tables.

    Attributes:
        label: for people.
        start: makes a session.
        options: for it.
        in_venv: runs in the peers' own environment.
        max_ranks: more processes than this it cannot use; 0 for any number.
    """

    label: str
    start: Callable[[nn.Module, float, dict[str, Any]], Session]
    options: dict[str, Any] = field(default_factory=dict)
    in_venv: bool = False
    max_ranks: int = 0


_Z3 = {"offload_optimizer": True, "offload_param": True}
_LEAN = {"precision": {"optimizer_state": "split", "reduce": "bf16"}}
SYSTEMS = {
    "reference": System("fp32 reference", reference, max_ranks=1),
    "plain": System("plain PyTorch / DDP", plain),
    "plain_master": System("plain, bf16 + fp32 master", plain_master, max_ranks=1),
    "ours": System("ours, auto", ours),
    "ours_lean": System("ours, split states, bf16 sums", ours, {"config": _LEAN}),
    "ours_cpu": System("ours, policy cpu", ours, {"policy": "cpu"}),
    "fsdp2": System("FSDP2", fsdp2),
    "fsdp2_offload": System("FSDP2 + offload", fsdp2, {"offload": True}),
    "fsdp2_offload_fp32": System("FSDP2 + offload, fp32 sums", fsdp2, {"offload": True, "reduce_dtype": "fp32"}),
    "fsdp2_offload_keep": System("FSDP2 + offload, no reshard", fsdp2, {"offload": True, "reshard": False}),
    "deepspeed": System("DeepSpeed ZeRO-3 + offload", deepspeed, _Z3, in_venv=True),
    "deepspeed_persist": System(
        "DeepSpeed ZeRO-3 + offload, small values kept",
        deepspeed,
        _Z3 | {"zero": {"stage3_param_persistence_threshold": 100_000}},
        in_venv=True,
    ),
    "deepspeed_optimizer": System("DeepSpeed ZeRO-3 + offload_optimizer", deepspeed, {"offload_optimizer": True}, True),
}
