"""From config, model and optimizer to what carries out the updates."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from gemini.accelerator import AcceleratorDevice
from gemini.device import Device
from gemini.jobs import HostQueue
from gemini.plan import ChunkFacts
from gemini.streamed import streamed_piece_numel
from zero.config.schema import Config
from zero.optim.chunked import ZeroOptimizer
from zero.optim.coded import coding_bytes_per_numel, format_of
from zero.optim.elementwise import temporary_bytes_per_numel
from zero.optim.fused import all_fused
from zero.optim.native import NativeKernel
from zero.optim.straddle import BLOCK_NUMEL
from zero.optim.update import ChunkUpdater, device_piece_numel, step_bytes
from zero.setup import Managed


def make_updater(
    optimizer: torch.optim.Optimizer,
    managed: Managed,
    config: Config,
    queue: HostQueue,
    kernel: NativeKernel | None,
    spare_bytes: int,
) -> ChunkUpdater:
    """What updates a model's chunks.

    Args:
        optimizer: the user's.
        managed: the model.
        config: of the run.
        queue: takes updates that run beside the program.
        kernel: the native one, or None for torch's arithmetic.
        spare_bytes: of the host, for what updates inside backward overwrite.
    """
    manager = managed.manager
    updater = ChunkUpdater(
        optimizer,
        manager.store,
        manager.transfer,
        queue,
        kernel,
        device_piece_numel=device_piece_numel(manager.device.capacity_bytes, managed.facts),
        early_bytes=spare_bytes,
        fuses=fuses_by_default(config),
        streamed=manager.streamed,
    )
    manager.streamed.piece_numel = update_piece_numel(
        managed.facts, all_fused(optimizer, fuses_by_default(config)), manager.device.capacity_bytes
    )
    manager.gradients_are_there = updater.early.gradients_are_there
    return updater


def share_cores(optimizer: ZeroOptimizer | None, loader: Any) -> None:
    """Updates that run beside the program leave a core to each worker process of its data loader."""
    if optimizer is not None:
        optimizer.updater.num_loader_workers = int(getattr(loader, "num_workers", 0) or 0)


def update_piece_numel(facts: list[ChunkFacts], is_fused: bool, capacity_bytes: int) -> int:
    """Elements of a piece of an update that is streamed; 0 where none can be.

    Args:
        facts: of all chunks.
        is_fused: the optimizer's update on the device is torch's fused kernel.
        capacity_bytes: of the device.
    """
    return streamed_piece_numel(facts, capacity_bytes, BLOCK_NUMEL) if is_fused else 0


def fuses_by_default(config: Config) -> bool:
    """Whether updates on the device take torch's fused kernel: not where torch's own choice was asked for."""
    return config.optimizer.kernel != "torch"


def update_bytes_per_numel(optimizer: torch.optim.Optimizer, config: Config) -> int:
    """Temporaries of an update on the device beside the gradient in fp32, per element."""
    coding_bytes = coding_bytes_per_numel(format_of(config, optimizer))
    # The fused kernel has none.
    return coding_bytes + (
        0 if all_fused(optimizer, fuses_by_default(config)) else temporary_bytes_per_numel(optimizer)
    )


def update_bytes(optimizer: torch.optim.Optimizer, config: Config, facts: list[ChunkFacts], device: Device) -> int:
    """Temporaries of an update on the device, where companions lie on it."""
    return step_bytes(facts, update_bytes_per_numel(optimizer, config), device.capacity_bytes)


def updates_allowed(optimizer: ZeroOptimizer | None, factor: float | None) -> contextlib.AbstractContextManager[None]:
    """A context in which updates begin as gradients come, which will be multiplied by ``factor`` (None: not known)."""
    return contextlib.nullcontext() if optimizer is None else optimizer.updater.early.allowed(factor)


def early_bytes(config: Config, queue: HostQueue, managed: Managed) -> int:
    """Host memory for what updates inside backward overwrite: none where they cannot run beside it."""
    if not begins_updates_early(config, type(managed.manager.device)) or not queue.runs_beside:
        return 0
    return max(0, min(managed.spare_host_bytes // 2, sum(fact.companion_bytes for fact in managed.facts)))


def begins_updates_early(config: Config, device: type[Device]) -> bool:
    """Whether updates begin inside backward on a kind of device, as far as the config says."""
    workers, early = config.optimizer.num_workers, config.optimizer.early
    runs_beside = not device.is_host if workers is None else workers > 0
    wish = issubclass(device, AcceleratorDevice) if early == "auto" else early
    return wish and runs_beside and config.train.max_grad_norm is None
