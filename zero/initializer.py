"""``zero.initialize``: the user's model, optimizer and loaders in, an engine around them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemini.device import Device, HostDevice
from zero.config.loading import load_config
from zero.config.schema import Config
from zero.dryrun import Blueprint
from zero.engine import Engine
from zero.errors import UserError
from zero.launcher import current_config
from zero.liger import use_liger
from zero.loader import LoaderView, shard_loader
from zero.models.loading import take_back
from zero.optim.native import NativeKernel, load_native, native_status
from zero.optim.native_choice import BY_ITSELF, why_not_native
from zero.ranks import join_ranks, make_exchange
from zero.setup import make_device
from zero.updating import share_cores


def initialize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    criterion: Callable[..., Any] | None = None,
    train_dataloader: Any = None,
    test_dataloader: Any = None,
    lr_scheduler: Any = None,
    config: Config | Mapping[str, Any] | str | Path | None = None,
    device: Device | None = None,
) -> tuple[Engine, Any, Any, Any]:
    """Takes a model over.

    Args:
        model: any ``torch.nn.Module``, one from ``zero.models.load()`` among them; it stays the object you call, and its
            parameters stay the same objects.
        optimizer: any elementwise ``torch.optim`` optimizer over the model's parameters.
        criterion: kept as ``engine.criterion``.
        train_dataloader: returned ready to iterate; the engine learns from it when an epoch ends.
        test_dataloader: returned as it is.
        lr_scheduler: built on ``optimizer``; returned as it is, and drives the engine.
        device: one made already; by default the one that ``[device]`` names.
        config: path, dict or Config; by default what ``launch()`` read, else all defaults.

    Returns:
        ``(engine, train_dataloader, test_dataloader, lr_scheduler)``, None where none was given.

    Raises:
        UserError: something given cannot work; the message says what to do.
        gemini.plan.DoesNotFitError: model data alone is more than the device may hold under the chosen policy.
    """
    resolved = load_config(config) if config is not None else current_config()
    if not isinstance(model, nn.Module):
        raise UserError(f"model: a torch.nn.Module is needed, {type(model).__name__} was given")
    kernel = choose_kernel(resolved, optimizer)
    take_back(model)
    world = join_ranks(resolved)
    device = device or make_device(resolved)
    # A copy without memory, from which a refusal can tell how large a device would be large enough.
    blueprint = None if isinstance(device, HostDevice) else Blueprint(model)
    if resolved.train.liger:  # the copy is walked through without a device, where no such kernel runs
        use_liger(model, device)
    exchange = make_exchange(resolved, world)
    engine = Engine(model, optimizer, criterion, resolved, device, kernel, blueprint=blueprint, exchange=exchange)
    if world is not None:  # all ranks come here with the same loaders, or without the same
        train_dataloader = None if train_dataloader is None else shard_loader(train_dataloader, world)
        test_dataloader = None if test_dataloader is None else shard_loader(test_dataloader, world)
    share_cores(engine.optimizer, train_dataloader)
    train = None
    if train_dataloader is not None:
        train = LoaderView(train_dataloader, engine.end_of_loader, resolved.train.gradient_accumulation_steps > 1)
    return engine, train, test_dataloader, lr_scheduler


def choose_kernel(config: Config, optimizer: torch.optim.Optimizer | None) -> NativeKernel | None:
    """The native kernel where it was asked for or is of use, else None: torch's own arithmetic.

    Raises:
        UserError: ``optimizer.kernel = "native"`` cannot be had.
    """
    wish = config.optimizer.kernel
    if wish == "torch" or optimizer is None or (wish == "auto" and type(optimizer) not in BY_ITSELF):
        return None
    reason = why_not_native(optimizer)
    kernel = load_native() if reason is None else None
    if wish == "native" and kernel is None:
        raise UserError(f'optimizer.kernel = "native": {reason or native_status()}; use "auto" or "torch"')
    return kernel
