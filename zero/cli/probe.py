"""``zero probe``: what this machine can do."""

from __future__ import annotations

import dataclasses
import json
import time

from gemini.probe import cache_path
from gemini.profile import HardwareProfile
from gemini.units import format_bytes
from zero.config.schema import Config
from zero.probing import measured_profile
from zero.report.tables import values_text
from zero.setup import make_device
from zero.world import current


def probe_text(config: Config, again: bool, as_json: bool) -> str | None:
    """The table, or JSON; None on all ranks but the first.

    Args:
        config: names the device.
        again: measure even what is known.
        as_json: all figures in plain numbers, by the names of :class:`gemini.profile.HardwareProfile`.

    Raises:
        UserError: there is no such device.
    """
    device, world = make_device(config), current()
    started_s = time.perf_counter()
    try:
        profile = measured_profile(device, world, again, config.memory.disk)
    finally:
        device.close()
    if world is not None and world.rank:
        return None
    if as_json:
        return json.dumps(dataclasses.asdict(profile), indent=2)
    num_ranks = 1 if world is None else world.size
    title = profile.name + (f", {num_ranks} ranks at the same time: the slowest of each" if num_ranks > 1 else "")
    took = f"{time.perf_counter() - started_s:.1f} s; kept in {cache_path()}, --again measures anew"
    return values_text([*_rows(profile), *_disk_rows(config, profile), ("took", took)], title=title)


def _disk_rows(config: Config, profile: HardwareProfile) -> list[tuple[str, str]]:
    """Only where it was measured."""
    if config.memory.disk is None:
        return []
    return [
        ("disk, reading", _rate(profile.disk_read_bytes_per_s)),
        ("disk, writing", _rate(profile.disk_write_bytes_per_s)),
    ]


def _rows(profile: HardwareProfile) -> list[tuple[str, str]]:
    return [
        ("host to device", _rate(profile.h2d_bytes_per_s)),
        ("device to host", _rate(profile.d2h_bytes_per_s)),
        ("both at once, each way", _rate(profile.both_bytes_per_s)),
        ("host memory", _rate(profile.host_dram_bytes_per_s)),
        ("AdamW on the host", f"{profile.host_update_numel_per_s / 1e9:.3g} G parameters/s"),
        ("AdamW on the device", f"{profile.device_update_numel_per_s / 1e9:.3g} G parameters/s"),
        ("matrix products, bf16", f"{profile.device_flops_per_s / 1e12:.3g} TFLOP/s"),
        ("matrix products, fp32", f"{profile.device_fp32_flops_per_s / 1e12:.3g} TFLOP/s"),
        ("device memory", _rate(profile.device_bytes_per_s)),
        ("to issue an operator", f"{1e6 * profile.launch_s:.1f} us"),
        ("device capacity", format_bytes(profile.capacity_bytes)),
    ]


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s"
