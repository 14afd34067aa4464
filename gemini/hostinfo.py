"""How much memory and how many cores this process may really use.

A container's ``/proc/meminfo`` shows the whole machine; what the kernel enforces is the cgroup. A run that trusts the
former is killed without a message ("exit -9"), so every figure here is the smaller of the two, on every level of the
cgroup tree.

Formats: Linux ``Documentation/admin-guide/cgroup-v2.rst`` and ``cgroup-v1/memory.rst``.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_CGROUP = Path("/proc/self/cgroup")
PROC_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class HostMemory:
    """Host memory this process may use, in bytes.

    Attributes:
        total_bytes: The smaller of physical memory and every cgroup limit above this process.
        available_bytes: What can still be taken before the kernel refuses or kills: free memory and file cache that can
            be dropped, the smallest over the machine and the cgroup levels. Swap is not counted.
        limit_source: What ``total_bytes`` comes from: ``"physical memory"``, ``"cgroup v1"`` or ``"cgroup v2"``.
    """

    total_bytes: int
    available_bytes: int
    limit_source: str


def host_memory(*, cgroup_root: Path = CGROUP_ROOT, proc_cgroup: Path = PROC_CGROUP) -> HostMemory:
    """Return the memory this process may use.

    Args:
        cgroup_root: Where the cgroup file systems are mounted.
        proc_cgroup: The file that says which cgroups this process is in.

    Returns:
        Figures after physical memory and cgroup limits of both versions; missing or odd files count as no limit.
    """
    machine = psutil.virtual_memory()
    total_bytes, available_bytes, source = int(machine.total), int(machine.available), "physical memory"
    for version, folder in _cgroup_folders("memory", cgroup_root, proc_cgroup):
        limit_bytes = _memory_limit_bytes(version, folder)
        if limit_bytes is None:
            continue
        if limit_bytes < total_bytes:
            total_bytes, source = limit_bytes, f"cgroup v{version}"
        available_bytes = min(available_bytes, limit_bytes - _memory_held_bytes(version, folder))
    return HostMemory(total_bytes, max(0, min(available_bytes, total_bytes)), source)


def cpu_count(*, cgroup_root: Path = CGROUP_ROOT, proc_cgroup: Path = PROC_CGROUP) -> int:
    """Return how many threads can run at once in this process: cores after affinity and cgroup quota, at least 1.

    A quota of one and a half cores gives 2: one thread would leave half a core unused.
    """
    count = float(_affinity_count())
    for version, folder in _cgroup_folders("cpu", cgroup_root, proc_cgroup):
        quota = _cpu_quota(version, folder)
        if quota is not None:
            count = min(count, quota)
    return max(1, math.ceil(count))


def cgroup_cpu_quota(*, cgroup_root: Path = CGROUP_ROOT, proc_cgroup: Path = PROC_CGROUP) -> float | None:
    """Return the smallest CPU quota above this process in cores, or None where there is none."""
    quotas = [_cpu_quota(version, folder) for version, folder in _cgroup_folders("cpu", cgroup_root, proc_cgroup)]
    return min((quota for quota in quotas if quota is not None), default=None)


def process_rss_bytes() -> int:
    """Return the resident memory of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes(*, proc_status: Path = PROC_STATUS) -> int:
    """Return the highest resident memory of this process since it started, in bytes.

    Linux's ``VmHWM`` is preferred over ``getrusage``: the latter carries the parent's peak through ``exec``, so that a
    child of a large process would look large itself.

    Args:
        proc_status: The file to read ``VmHWM`` from.
    """
    for line in _read_text(proc_status).splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    windows_peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if windows_peak is not None:
        return int(windows_peak)
    import resource  # Not on Windows, which has returned above.

    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return max(peak if sys.platform == "darwin" else peak * 1024, process_rss_bytes())


def _affinity_count() -> int:
    """Return the number of logical cores the scheduler may put this process on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 1


def _cgroup_folders(controller: str, cgroup_root: Path, proc_cgroup: Path) -> Iterator[tuple[int, Path]]:
    """Yield (version, folder) of each cgroup that limits this process for ``controller``, innermost first.

    Every ancestor limits too. In a container the path in ``proc_cgroup`` is often the host's and does not exist below
    the mount; the mount itself is then the container's own group, and it is the last one yielded in any case.
    """
    for line in _read_text(proc_cgroup).splitlines():
        fields = line.split(":", 2)
        if len(fields) != 3:
            continue
        _, controllers, path = fields
        if controllers == "":
            # Version 2 is mounted at the root, or beside version 1 in the hybrid layout.
            mounts = [cgroup_root, cgroup_root / "unified"]
            yield from ((2, folder) for mount in mounts for folder in _with_ancestors(mount, path))
        elif controller in controllers.split(","):
            mounts = [cgroup_root / controller, cgroup_root / controllers]
            mount = next((mount for mount in mounts if mount.is_dir()), mounts[0])
            yield from ((1, folder) for folder in _with_ancestors(mount, path))


def _with_ancestors(mount: Path, path: str) -> list[Path]:
    """Return the folder of ``path`` below ``mount`` and all its parents up to the mount."""
    # A path outside this namespace is shown with leading ".."; nothing below the mount belongs to it.
    parts = [] if ".." in path.split("/") else [part for part in path.split("/") if part]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _memory_limit_bytes(version: int, folder: Path) -> int | None:
    """Return the memory limit of one cgroup, or None for no limit.

    ``memory.high`` counts as a limit: beyond it the kernel does not kill but stalls the process in reclaim.
    """
    names = ["memory.max", "memory.high"] if version == 2 else ["memory.limit_in_bytes"]
    limits = [_read_number(folder / name) for name in names]
    return min((limit for limit in limits if limit is not None), default=None)


def _memory_held_bytes(version: int, folder: Path) -> int:
    """Return the bytes of one cgroup that cannot be had back: its usage less the file cache the kernel can drop."""
    used_bytes = _read_number(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes")) or 0
    stat = dict(line.split()[:2] for line in _read_text(folder / "memory.stat").splitlines() if len(line.split()) >= 2)
    # Version 1 counts the children of a group only in the "total_" figures.
    prefix = "" if version == 2 else "total_"
    cache_bytes = sum(_to_number(stat.get(f"{prefix}{name}", "0")) or 0 for name in ("inactive_file", "active_file"))
    return max(0, used_bytes - cache_bytes)


def _cpu_quota(version: int, folder: Path) -> float | None:
    """Return the CPU quota of one cgroup in cores, or None for no quota."""
    if version == 2:
        fields = _read_text(folder / "cpu.max").split()
        quota, period = (_to_number(fields[0]), _to_number(fields[1])) if len(fields) == 2 else (None, None)
    else:
        quota, period = _read_number(folder / "cpu.cfs_quota_us"), _read_number(folder / "cpu.cfs_period_us")
    if quota is None or period is None or quota <= 0 or period <= 0:
        return None
    return quota / period


def _read_text(path: Path) -> str:
    """Return a file's text, or nothing where it cannot be read: kernels and containers differ in what they show."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _read_number(path: Path) -> int | None:
    """Return the number a file holds; None where it is missing or says ``max``."""
    return _to_number(_read_text(path).strip())


def _to_number(text: str) -> int | None:
    """Return ``text`` as an int, or None (``max`` and anything else that is not a number)."""
    try:
        return int(text)
    except ValueError:
        return None
