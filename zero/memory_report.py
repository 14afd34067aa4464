"""What a run used, in bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

from gemini.arena import HostArena
from gemini.manager import Counters, Manager
from gemini.plan import Plan
from gemini.store import Tier


@dataclass(frozen=True)
class MemoryReport:
    """Figures of an engine. Counters are of the last full step; peaks since the engine was made.

    Attributes:
        device_capacity_bytes: what the device may hold.
        device_peak_bytes: highest bytes on it, everything counted.
        predicted_device_peak_bytes: what the plan said; 0 while no plan from a trace exists.
        model_data_peak_bytes: highest bytes of parameters, gradients and optimizer states on it.
        non_model_peak_bytes: highest bytes of activations and temporaries on it.
        host_bytes: model data, and saved activations, on the host now.
        pinned_bytes: of these, pinned, as allocated.
        disk_bytes: model data on disk.
        num_chunks: chunks of the model.
        num_fetches: chunk copies to the device.
        num_evictions: chunks that had to leave for others.
        h2d_bytes: bytes to the device.
        d2h_bytes: bytes to the host.
        device_bytes_by_kind: model data on the device now.
        host_bytes_by_kind: model data on the host now.
    """

    device_capacity_bytes: int
    device_peak_bytes: int
    predicted_device_peak_bytes: int
    model_data_peak_bytes: int
    non_model_peak_bytes: int
    host_bytes: int
    pinned_bytes: int
    disk_bytes: int
    num_chunks: int
    num_fetches: int
    num_evictions: int
    h2d_bytes: int
    d2h_bytes: int
    device_bytes_by_kind: dict[str, int] = field(default_factory=dict)
    host_bytes_by_kind: dict[str, int] = field(default_factory=dict)


def report_of(
    manager: Manager, host: HostArena, plan: Plan, counters: Counters, h2d_bytes: int, d2h_bytes: int
) -> MemoryReport:
    """The report of a manager's device, host and store.

    Args:
        manager: owns the chunks.
        host: gives host memory.
        plan: that is carried out.
        counters: of the last full step.
        h2d_bytes: to the device in that step.
        d2h_bytes: to the host.
    """
    peaks, store = manager.device.lifetime_peaks(), manager.store
    return MemoryReport(
        device_capacity_bytes=manager.device.capacity_bytes,
        device_peak_bytes=peaks.device_bytes,
        predicted_device_peak_bytes=plan.predicted_device_peak_bytes,
        model_data_peak_bytes=peaks.model_data_bytes,
        non_model_peak_bytes=peaks.non_model_bytes,
        host_bytes=host.host_bytes,
        pinned_bytes=host.pinned_bytes,
        disk_bytes=store.disk.disk_bytes,
        num_chunks=len(manager.chunks),
        num_fetches=counters.num_fetches,
        num_evictions=counters.num_evictions,
        h2d_bytes=h2d_bytes,
        d2h_bytes=d2h_bytes,
        device_bytes_by_kind=store.kinds(Tier.DEVICE),
        host_bytes_by_kind=store.kinds(Tier.HOST),
    )
