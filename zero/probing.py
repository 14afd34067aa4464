"""What the machine of a run can do: measured once, by all ranks at the same time, and kept."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import torch
import torch.distributed as dist

from gemini.accelerator import AcceleratorDevice
from gemini.device import Device, HostDevice
from gemini.exchange import ALONE, Exchange
from gemini.probe import cached_profile, keep_profile, machine_key, probe
from gemini.profile import HardwareProfile, named_profile
from gemini.simulated import SimulatedDevice
from zero.config.schema import Config
from zero.sharding import RankExchange
from zero.world import World

logger = logging.getLogger("zero")

_NOT_MEASURED = "this machine could not be measured, plans are made with assumed rates"


def profile_of(config: Config, device: Device, exchange: Exchange = ALONE) -> HardwareProfile:
    """Rates that plans for a device are made with: of the card that the config names, else of an accelerator what is
    measured, else fixed ones.

    Args:
        config: of the run.
        device: it uses.
        exchange: with the other ranks, who all come here.
    """
    if isinstance(device, SimulatedDevice) and device.clock is not None:
        return device.clock.profile
    if config.device.profile != "auto":
        return named_profile(config.device.profile)
    if not isinstance(device, AcceleratorDevice):
        return HardwareProfile()
    return _measured(config, device, exchange)


def inference_profile(config: Config, device: Device, exchange: Exchange = ALONE) -> HardwareProfile:
    """The same for passes without gradients, of which people ask how fast they will be on a processor, too.

    There the plan does not depend on it, and training is not worth the second that measuring takes.
    """
    if isinstance(device, HostDevice) and config.device.profile == "auto":
        return _measured(config, device, exchange)
    return profile_of(config, device, exchange)


def has_rates(config: Config, device: Device) -> bool:
    """Whether :func:`inference_profile` says something about this device, and not only what is assumed of any."""
    if isinstance(device, SimulatedDevice):
        return device.clock is not None or config.device.profile != "auto"
    return True


def _measured(config: Config, device: Device, exchange: Exchange) -> HardwareProfile:
    world = exchange.world if isinstance(exchange, RankExchange) else None
    return measured_profile(device, world, disk=config.memory.disk)


def measured_profile(
    device: Device, world: World | None = None, again: bool = False, disk: str | None = None
) -> HardwareProfile:
    """What this machine can do: known from before, or measured now.

    Args:
        device: to be measured.
        world: the ranks, who all come here and measure at the same time, since they share links and host memory.
        again: measure now, whatever is known.
        disk: folder whose disk is measured as well.
    """
    num_local = 1 if world is None else world.place.local_size
    key = machine_key(device, f"{num_local} together" + (f", disk {disk}" if disk is not None else ""))
    found = None if again else cached_profile(key)
    if world is not None and world.size > 1:
        return _together(device, world, key, found, disk)
    if found is not None:
        return found
    try:
        found = probe(device, host_update, disk=disk)
    except RuntimeError as error:  # a device that others have filled: a guess is better than no run
        logger.warning("%s: %s", _NOT_MEASURED, error)
        return HardwareProfile()
    keep_profile(key, found)
    return found


def _together(
    device: Device, world: World, key: str, found: HardwareProfile | None, disk: str | None
) -> HardwareProfile:
    """The slowest rank's figures: all ranks must make the same plan."""
    with world.operation("measuring the machine"):
        if not all(world.all_gather_object(found is not None)):
            found = _measured_in_step(device, world, disk)
            if found is not None and world.place.local_rank == 0:
                keep_profile(key, found)
        said = world.all_gather_object(None if found is None else dataclasses.asdict(found))
    if None in said:  # where one could only guess, all do
        return HardwareProfile()
    return slowest([HardwareProfile(**figures) for figures in said])


def _measured_in_step(device: Device, world: World, disk: str | None) -> HardwareProfile | None:
    """Measures beside the others; None where this rank cannot, as on a device that is full."""
    meeting, found = _Meeting(world), None
    try:
        found = probe(device, host_update, meeting.meet, disk)
    except RuntimeError as error:
        if meeting.is_broken:
            raise
        logger.warning("%s: %s", _NOT_MEASURED, error)
    meeting.wait_for_others()
    return found


class _Meeting:
    """Ranks that meet before each measurement, though one may have fewer of them than another.

    Args:
        world: the ranks.

    Attributes:
        is_broken: another rank did not come.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.is_broken = False

    def meet(self) -> None:
        """All are about to measure, or are done."""
        self._anyone_measures(True)

    def wait_for_others(self) -> None:
        """This one is done: it goes on meeting the others until all are."""
        while self._anyone_measures(False):
            pass

    def _anyone_measures(self, measures: bool) -> bool:
        anyone = torch.tensor([int(measures)])
        try:
            dist.all_reduce(anyone, dist.ReduceOp.MAX, group=self._world.control)
        except RuntimeError:
            self.is_broken = True
            raise
        return bool(anyone)


def slowest(profiles: list[HardwareProfile]) -> HardwareProfile:
    """The lowest of each rate, and the longest of each time."""
    rates = [field.name for field in dataclasses.fields(HardwareProfile) if "_per_s" in field.name]
    lowest = {name: min(getattr(profile, name) for profile in profiles) for name in rates}
    return dataclasses.replace(
        profiles[0],
        launch_s=max(profile.launch_s for profile in profiles),
        capacity_bytes=min(profile.capacity_bytes for profile in profiles),
        **lowest,
    )


def host_update(numel: int) -> Callable[[], None]:
    """AdamW with a bf16 gradient in and bf16 weights out, as a run would carry it out on the host."""
    from zero.optim.native import load_native

    master, mean, square = (torch.zeros(numel, dtype=torch.float32) for _ in range(3))
    gradient, out = (torch.zeros(numel, dtype=torch.bfloat16) for _ in range(2))
    kernel = load_native()
    if kernel is not None:
        return lambda: kernel.adamw(
            master, mean, square, gradient, out, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, step=1
        )
    parameter = torch.nn.Parameter(master)
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)

    def update() -> None:
        parameter.grad = gradient.float()
        optimizer.step()
        out.copy_(parameter.detach())

    return update
