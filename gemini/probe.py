"""Measures this machine, in below a second: the link both ways, host memory, update rates, matrix products.

The figures decide between placements, so the order of magnitude and the ratios count, not the last percent: each is the
best of a few short runs, and of more where they differ. What was measured is kept in a file per user, under the names
of the device, the processor and the versions that it holds for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from gemini.accelerator import AcceleratorDevice
from gemini.device import Device, Stream
from gemini.profile import UPDATE_BYTES_PER_NUMEL, HardwareProfile

Update = Callable[[int], Callable[[], None]]
"""Given a number of elements, makes their tensors and returns what updates them once, on the host."""

_FORMAT = 1
_LINK_BYTES = 32 << 20
_DRAM_BYTES = 64 << 20
_UPDATE_NUMEL = 4 << 20
_DISK_BYTES = 64 << 20
_REPEATS = 3
_PATIENCE_S = 0.2
_ABOUT = 1.25


def probe(
    device: Device,
    update: Update | None = None,
    meet: Callable[[], None] | None = None,
    disk: str | os.PathLike[str] | None = None,
) -> HardwareProfile:
    """Measures now.

    Args:
        device: to be measured; one that is host memory has the rate of a copy there for a link.
        update: of the optimizer on the host; without it, host memory sets the rate.
        meet: called before each measurement, so that processes that share a machine measure at the same time.
        disk: a folder whose disk is measured as well; None: what it does is assumed.
    """
    meet = meet or _alone
    dram_bytes_per_s = _dram(meet)
    host_numel_per_s = dram_bytes_per_s / UPDATE_BYTES_PER_NUMEL if update is None else _host_update(update, meet)
    assumed = HardwareProfile()
    measured = {
        "host_dram_bytes_per_s": dram_bytes_per_s,
        "host_update_numel_per_s": host_numel_per_s,
        **_link(device, meet),
        **_computation(device, meet),
        **({} if disk is None else _disk(Path(disk).expanduser(), meet)),
    }
    return dataclasses.replace(
        assumed,
        name=device_name(device),
        source="measured on this machine",
        measured=True,
        capacity_bytes=device.capacity_bytes,
        **measured,
    )


def _alone() -> None:
    """Nobody else measures."""


def device_name(device: Device) -> str:
    """The accelerator's model name, or the device's."""
    if isinstance(device, AcceleratorDevice) and device.torch_device.type == "cuda":
        return str(torch.cuda.get_device_name(device.torch_device))
    return device.name


def _best_s(run: Callable[[], None], meet: Callable[[], None], repeats: int = _REPEATS) -> float:
    """Seconds of the fastest run, after one that nobody measures.

    Where others work on the machine, most runs lose their processor for a while. So they go on until ``repeats`` of them
    are about as fast as the fastest, or have taken :data:`_PATIENCE_S`.
    """
    run()
    taken_s: list[float] = []
    meet()
    while len(taken_s) < repeats or (not _agree(taken_s, repeats) and sum(taken_s) < _PATIENCE_S):
        started_s = time.perf_counter()
        run()
        taken_s.append(max(time.perf_counter() - started_s, 1e-9))
    return min(taken_s)


def _agree(taken_s: list[float], num_runs: int) -> bool:
    """Whether so many runs are about as fast as the fastest."""
    return sum(seconds <= _ABOUT * min(taken_s) for seconds in taken_s) >= num_runs


# -- host ------------------------------------------------------------------------------------------------------------


def _dram(meet: Callable[[], None]) -> float:
    """Bytes read and written per second, by a sum of two arrays into a third."""
    left, right, total = (torch.ones(_DRAM_BYTES // 4 // 3, dtype=torch.float32) for _ in range(3))
    return 3 * left.nbytes / _best_s(lambda: _add(left, right, total), meet)


def _add(left: torch.Tensor, right: torch.Tensor, total: torch.Tensor) -> None:
    torch.add(left, right, out=total)


def _host_update(update: Update, meet: Callable[[], None]) -> float:
    return _UPDATE_NUMEL / _best_s(update(_UPDATE_NUMEL), meet)


def _disk(folder: Path, meet: Callable[[], None]) -> dict[str, float]:
    """Writing until it is on the disk, and reading what nobody holds in memory, of one file without a name.

    A folder that cannot be written to says so when a run wants it; until then its rates are assumed.
    """
    data = os.urandom(1 << 20) * (_DISK_BYTES >> 20)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:

            def write() -> None:
                file.seek(0)
                file.write(data)
                os.fsync(file.fileno())

            def read() -> None:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                file.seek(0)
                while file.read(1 << 22):
                    pass

            write_s = _best_s(write, meet, repeats=2)
            return {
                "disk_read_bytes_per_s": _DISK_BYTES / _best_s(read, meet, repeats=2),
                "disk_write_bytes_per_s": _DISK_BYTES / write_s,
            }
    except OSError:
        return {}


# -- link ------------------------------------------------------------------------------------------------------------


def _link(device: Device, meet: Callable[[], None]) -> dict[str, float]:
    """Each way alone and both together, between memory as a run uses it (pinned where the device can)."""
    numel = min(_LINK_BYTES, max(1 << 12, device.capacity_bytes // 16)) // 4
    with contextlib.ExitStack() as undo, device.bookkeeping():
        host = [_host_buffer(device, numel, undo) for _ in range(2)]
        on_device = []
        for _ in range(2):
            buffer = device.allocate(numel, torch.float32)
            undo.callback(device.give_back, buffer)
            on_device.append(buffer.zero_())
        streams = [device.stream("probe in"), device.stream("probe out")]
        device.synchronize()

        def copy_in() -> None:
            _carry(streams[:1], [(on_device[0], host[0])])

        def copy_out() -> None:
            _carry(streams[1:], [(host[1], on_device[1])])

        def both() -> None:
            _carry(streams, [(on_device[0], host[0]), (host[1], on_device[1])])

        h2d, d2h, together = (host[0].nbytes / _best_s(run, meet) for run in (copy_in, copy_out, both))
    together = min(together, h2d, d2h)
    return {"h2d_bytes_per_s": h2d, "d2h_bytes_per_s": d2h, "both_bytes_per_s": together}


def _host_buffer(device: Device, numel: int, undo: contextlib.ExitStack) -> torch.Tensor:
    buffer = torch.zeros(numel, dtype=torch.float32)
    if device.register_host_memory(buffer.data_ptr(), buffer.nbytes):
        undo.callback(device.unregister_host_memory, buffer.data_ptr())
    return buffer


def _carry(streams: list[Stream], copies: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for stream, (target, source) in zip(streams, copies, strict=True):
        stream.copy(target, source)
    for event in [stream.record() for stream in streams]:
        event.synchronize()


# -- computation -----------------------------------------------------------------------------------------------------


def _computation(device: Device, meet: Callable[[], None]) -> dict[str, float]:
    """Matrix products, memory and updates on the device, and what it takes to issue an operator."""
    is_real = isinstance(device, AcceleratorDevice)
    with device.bookkeeping(), torch.no_grad():
        side, fp32_side = (6144, 4096) if is_real else (256, 256)
        numel = min(_UPDATE_NUMEL * 8, device.capacity_bytes // 64) if is_real else _DRAM_BYTES // 16
        products = _matmul(device, side, torch.bfloat16, meet)
        fp32_products = _matmul(device, fp32_side, torch.float32, meet)
        memory_bytes_per_s = _device_memory(device, numel, meet)
        return {
            "device_flops_per_s": products,
            "device_fp32_flops_per_s": fp32_products,
            "device_bytes_per_s": memory_bytes_per_s,
            "device_update_numel_per_s": memory_bytes_per_s / UPDATE_BYTES_PER_NUMEL,
            "launch_s": _launch_s(device, meet),
        }


def _finished(device: Device, run: Callable[[], object], times: int = 1) -> Callable[[], None]:
    def run_and_wait() -> None:
        for _ in range(times):
            run()
        device.synchronize()

    return run_and_wait


def _matmul(device: Device, side: int, dtype: torch.dtype, meet: Callable[[], None]) -> float:
    left, right = (torch.ones(side, side, dtype=dtype, device=device.torch_device) for _ in range(2))
    product = torch.empty_like(left)
    times = 4
    seconds = _best_s(_finished(device, lambda: torch.mm(left, right, out=product), times), meet)
    return times * 2 * side**3 / seconds


def _device_memory(device: Device, numel: int, meet: Callable[[], None]) -> float:
    left, right, total = (torch.ones(numel, dtype=torch.float32, device=device.torch_device) for _ in range(3))
    times = 4
    return times * 3 * left.nbytes / _best_s(_finished(device, lambda: _add(left, right, total), times), meet)


def _launch_s(device: Device, meet: Callable[[], None]) -> float:
    one = torch.ones(16, dtype=torch.float32, device=device.torch_device)
    times = 200

    def issue() -> None:
        for _ in range(times):
            one.add_(1)

    seconds = _best_s(issue, meet) / times
    device.synchronize()
    return seconds


# -- what was measured before ----------------------------------------------------------------------------------------


def cache_path() -> Path:
    """The file that keeps what was measured, of this user."""
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "gemini-zero" / "probe.json"


def machine_key(device: Device, note: str = "") -> str:
    """What figures hold for: another device, processor, torch or number of threads is measured anew.

    Args:
        device: measured.
        note: whatever else matters, such as how many processes measure together and with which update.
    """
    words = [
        device_name(device),
        str(device.capacity_bytes // (64 << 20)),
        str(torch.__version__),
        _processor(),
        str(psutil.cpu_count()),
        str(torch.get_num_threads()),
        note,
    ]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _kept(path: Path) -> dict[str, Any]:
    """Figures by key as they are in a file; none where there is no file of this format."""
    try:
        kept = json.loads(path.read_text())
        return dict(kept["machines"]) if kept["format"] == _FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def cached_profile(key: str, path: Path | None = None) -> HardwareProfile | None:
    """What was measured before for a key; None where nothing was, or where the file is damaged."""
    try:
        profile = HardwareProfile(**_kept(path or cache_path())[key])
        figures = [getattr(profile, field.name) for field in dataclasses.fields(profile) if field.type == "float"]
        is_sound = profile.measured is True and all(math.isfinite(figure) and figure > 0 for figure in figures)
        return profile if is_sound else None
    except (KeyError, TypeError, OverflowError):
        return None


def keep_profile(key: str, profile: HardwareProfile, path: Path | None = None) -> None:
    """Keeps what was measured; a folder that cannot be written to only means that it is measured again."""
    path = path or cache_path()
    machines = {**_kept(path), key: dataclasses.asdict(profile)}
    written = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(json.dumps({"format": _FORMAT, "machines": machines}, indent=1))
        os.replace(written, path)
    except OSError:
        with contextlib.suppress(OSError):
            written.unlink(missing_ok=True)
