"""What of the machine a rank uses: its threads, its cores, its accelerator.

Layout of ``/sys``: Linux ``Documentation/ABI/stable/sysfs-devices-node``, ``Documentation/ABI/testing/sysfs-bus-pci``.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gemini.hostinfo import cpu_count
from zero.errors import UserError
from zero.launching.place import Place, is_ours

logger = logging.getLogger("zero")

SYS = Path("/sys")
PROC = Path("/proc")
_THREADS = "OMP_NUM_THREADS"

_settled: Place | None = None


def settle(place: Place, device_type: str | None = None) -> None:
    """Gives this rank its threads, cores and accelerator; the second call for a place changes nothing.

    Args:
        place: of this process.
        device_type: ``device.type`` of the config; None where it is not known yet: accelerators are left alone.

    Raises:
        UserError: there are fewer accelerators than ranks on this machine.
    """
    global _settled
    device_nodes = use_accelerator(place, device_type)
    if _settled == place:
        return
    _settled = place
    use_threads(place, os.environ)  # first: binding takes cores away that the others count on
    allowed = _allowed_cores()
    if len(allowed) > threads_per_rank(place.local_size, os.environ):  # else somebody has bound this rank already
        cores = cores_of_rank(place, allowed, numa_nodes(), device_nodes)
        if cores is not None:
            bind(cores)
            logger.info("rank %d is bound to %d cores of its memory node", place.rank, len(cores))


# -- threads ---------------------------------------------------------------------------------------------------------


def threads_per_rank(local_size: int, environment: Mapping[str, str], usable_cores: int | None = None) -> int:
    """Usable cores / ranks of this machine, at least 1.

    Under SLURM a task may have been bound to its own cores already; then these are what it has.

    Args:
        local_size: ranks on this machine.
        environment: for what SLURM gave this machine's tasks together.
        usable_cores: of this process; by default as the machine says.
    """
    usable = cpu_count() if usable_cores is None else usable_cores
    given = environment.get("SLURM_CPUS_ON_NODE", "") if "SLURM_PROCID" in environment else ""
    together = int(given) if given.isdigit() and int(given) else usable
    return max(1, min(usable, together // max(1, local_size)))


def use_threads(place: Place, environment: Mapping[str, str]) -> None:
    """Sets torch's threads where nobody has: SLURM sets nothing, and ``torchrun`` sets 1 for fear of many ranks."""
    if is_ours(environment) or place.size == 1:
        return
    if _THREADS in environment and not _is_of_torchrun(environment):
        return
    import torch

    if _THREADS in environment and torch.get_num_threads() != 1:  # the user's code has said so meanwhile
        return
    torch.set_num_threads(threads_per_rank(place.local_size, environment))


def _is_of_torchrun(environment: Mapping[str, str], proc: Path = PROC) -> bool:
    """Whether ``OMP_NUM_THREADS=1`` is torchrun's default and not the user's wish, which its own start would show."""
    if environment[_THREADS] != "1" or "TORCHELASTIC_RUN_ID" not in environment:
        return False
    try:
        started_with = (proc / str(os.getppid()) / "environ").read_bytes()
    except OSError:
        return True
    return not any(entry.startswith(f"{_THREADS}=".encode()) for entry in started_with.split(b"\0"))


# -- cores -----------------------------------------------------------------------------------------------------------


def parse_cpu_list(text: str) -> set[int]:
    """``0-3,8`` is 0, 1, 2, 3, 8; what cannot be read is left out."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, dash, last = part.partition("-")
        if first.isdigit() and (not dash or last.isdigit()):
            cores.update(range(int(first), int(last or first) + 1))
    return cores


def numa_nodes(sys_root: Path = SYS) -> dict[int, set[int]]:
    """Memory nodes of this machine and the cores of each; nodes of memory alone are left out."""
    nodes = {}
    for folder in sys_root.glob("devices/system/node/node[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            cores = parse_cpu_list((folder / "cpulist").read_text())
            if cores:
                nodes[int(folder.name.removeprefix("node"))] = cores
    return dict(sorted(nodes.items()))


def node_of_device(pci_bus_id: str, sys_root: Path = SYS) -> int | None:
    """Memory node that a device is attached to; None where the machine does not say.

    Args:
        pci_bus_id: such as ``0000:3b:00.0``.
    """
    try:
        node = int((sys_root / "bus/pci/devices" / pci_bus_id.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def cores_of_rank(
    place: Place, allowed: Iterable[int], nodes: Mapping[int, set[int]], device_nodes: Sequence[int | None] = ()
) -> set[int] | None:
    """Cores that a rank stays on: those of its accelerator's node, else those of its share of the nodes.

    Ranks of one node share all its cores: the scheduler spreads them better than numbers would, in which the two
    halves of a core are far apart. Where most accelerators hang on one node, following them would leave the cores and
    the memory links of the others idle, which the optimizer needs: the nodes are shared out instead.

    Args:
        place: of the rank.
        allowed: cores that the process may use now.
        nodes: cores of each memory node.
        device_nodes: memory node of the accelerator of each rank of this machine, as far as known.

    Returns:
        None where there is nothing to choose: one node, or one process.
    """
    allowed, ranks = set(allowed), place.local_size
    usable = {node: cores & allowed for node, cores in nodes.items() if cores & allowed}
    if len(usable) < 2 or ranks < 2:
        return None
    own = device_nodes[place.local_rank] if place.local_rank < len(device_nodes) else None
    if own in usable:
        num_cores = sum(len(cores) for cores in usable.values())
        if list(device_nodes).count(own) * num_cores <= ranks * len(usable[own]):
            return usable[own]
    count = len(usable)
    first = place.local_rank * count // ranks
    end = max(first + 1, (place.local_rank + 1) * count // ranks)
    return set().union(*list(usable.values())[first:end])


def bind(cores: set[int]) -> None:
    """Keeps every thread of this process on these cores; threads to come inherit it."""
    if not hasattr(os, "sched_setaffinity"):
        return
    try:
        threads = [int(name) for name in os.listdir(PROC / "self/task")]
    except OSError:
        threads = [0]
    for thread in threads:
        with contextlib.suppress(OSError):  # it has ended, or the container forbids it: binding is no must
            os.sched_setaffinity(thread, cores)


def _allowed_cores() -> set[int]:
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set()


# -- accelerators ----------------------------------------------------------------------------------------------------


def check_accelerators(device_type: str, local_size: int, num_accelerators: int) -> None:
    """Refuses two ranks on one accelerator.

    Args:
        device_type: ``device.type`` of the config.
        local_size: ranks on this machine.
        num_accelerators: of this machine.

    Raises:
        UserError: there are too few.
    """
    if device_type not in ("auto", "cuda") or num_accelerators == 0 or local_size <= num_accelerators:
        return
    raise UserError(
        f"{local_size} processes on a machine with {num_accelerators} accelerator{'s' if num_accelerators > 1 else ''}: "
        f"each needs its own; use --nprocs {num_accelerators}, or device.type = cpu or simulated"
    )


def num_accelerators() -> int:
    """Accelerators that this process sees."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def use_accelerator(place: Place, device_type: str | None) -> list[int | None]:
    """Makes the accelerator of this rank the current one.

    Returns:
        Memory node of the accelerator of each rank of this machine, as far as known.

    Raises:
        UserError: there are fewer than ranks on this machine.
    """
    count = num_accelerators() if device_type in ("auto", "cuda") else 0
    if device_type is None or count == 0:
        return []
    import torch

    if _sees_only_its_own(os.environ):
        torch.accelerator.set_device_index(0)
        return []
    check_accelerators(device_type, place.local_size, count)
    torch.accelerator.set_device_index(place.local_rank)
    bus_ids = [_pci_bus_id(index) for index in range(place.local_size)]
    return [None if bus_id is None else node_of_device(bus_id) for bus_id in bus_ids]


def _sees_only_its_own(environment: Mapping[str, str]) -> bool:
    """Whether SLURM hands each task its own accelerators, which are numbered from 0 in every one."""
    return "SLURM_PROCID" in environment and "SLURM_GPUS_PER_TASK" in environment


def _pci_bus_id(index: int) -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(index)
    numbers = [getattr(found, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if any(number is None for number in numbers):
        return None
    domain, bus, device = numbers
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"
