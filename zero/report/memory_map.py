"""The memory map: a picture of where every byte is, moment by moment, in one step.

Upper panel: the device, as areas stacked by what they hold and in which state, under the capacity line. Lower panel:
the host (and the disk). Forward, backward and step are shaded differently.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gemini.units import format_bytes
from zero.errors import UserError
from zero.report import map_parts
from zero.report.map_parts import Kind
from zero.report.scale import byte_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class MemorySample:
    """What lies where at one moment of a step.

    Attributes:
        moment: Number of the moment in the step, increasing.
        label: Unit that starts or ends at this moment, such as "block 3".
        phase: "forward", "backward" or "step".
        device_bytes: Bytes of model data on the device by kind: "parameters" are those that stay, gathered ones go by
            the name of their state, in upper or lower case (or "gathered" where it is not known); see ``DEVICE_KINDS``.
            Other kinds are drawn too.
        non_model_bytes: Bytes on the device that are not model data: activations and temporaries.
        host_bytes: Bytes on the host by kind; see ``HOST_KINDS``. A kind "disk" is a line: it is not host memory.
    """

    moment: int
    label: str
    phase: str
    device_bytes: Mapping[str, int]
    non_model_bytes: int
    host_bytes: Mapping[str, int] = field(default_factory=dict)


PASSED_KIND = "passed"
"""Device bytes that a moment held at its highest and had released at its end."""

# From the bottom of the stack up. The colours are Okabe and Ito's and shades of them; under simulated protan, deutan
# and tritan vision (Machado 2009) every two are 15 or more apart in CIE Lab, but for HOLD and the hatched activations.
DEVICE_KINDS: dict[str, Kind] = {
    "optimizer": Kind("optimizer states", "#CC79A7"),
    "master": Kind("master parameters", "#661100"),
    "parameters": Kind("parameters, resident", "#0B3C5D"),
    "gathered": Kind("parameters, gathered", "#56B4E9"),
    "COMPUTE": Kind("parameters, COMPUTE", "#0072B2"),
    "HOLD": Kind("parameters, HOLD", "#BFE0F2"),
    "HOLD_AFTER_FORWARD": Kind("parameters, HOLD_AFTER_FORWARD", "#56B4E9"),
    "HOLD_AFTER_BACKWARD": Kind("parameters, HOLD_AFTER_BACKWARD", "#009E73"),
    "READY_FOR_REDUCE": Kind("gradients, READY_FOR_REDUCE", "#D55E00"),
    "gradients": Kind("gradients", "#F0B93A"),
    PASSED_KIND: Kind("released within the moment", "#C9CDD1"),
}
HOST_KINDS: dict[str, Kind] = {
    "parameters": Kind("parameters", "#0072B2"),
    "master": Kind("master parameters", "#8CC9EC"),
    "optimizer": Kind("optimizer states", "#CC79A7"),
    "gradients": Kind("gradients", "#F0B93A"),
}
NON_MODEL_KIND = "non_model"
DISK_KIND = "disk"

_NON_MODEL = Kind("activations and temporaries", "#EEEEEE", hatch="////")
_DPI = 140
# A capacity further above the peak than this would press the picture flat; it is then named, not drawn to scale.
_MAX_CAPACITY_PER_PEAK = 2.5


def draw_memory_map(
    samples: Sequence[MemorySample],
    path: str | os.PathLike[str],
    *,
    capacity_bytes: int | None = None,
    predicted_peak_bytes: int | None = None,
    title: str = "Memory map of one step",
) -> Path:
    """Draw the memory map and write it as PNG.

    Args:
        samples: The moments of one step, in order; at least one.
        path: Where to write; the folder is made if it is missing.
        capacity_bytes: What the device offers; None draws no line.
        predicted_peak_bytes: What the plan said the peak would be, drawn as a second line.
        title: Shown above the picture.

    Returns:
        ``path``.

    Raises:
        ValueError: If there are no samples.
        UserError: If matplotlib is missing.
        OSError: If the file cannot be written.
    """
    if not samples:
        raise ValueError("no samples: a memory map needs at least one moment")
    figure = _new_figure(len(samples), with_host=any(any(sample.host_bytes.values()) for sample in samples))
    figure.suptitle(title, x=0.008, ha="left", fontsize=14, fontweight="bold", color=map_parts.INK, parse_math=False)
    device_axes, *host_axes = figure.axes
    _draw_device(device_axes, samples, capacity_bytes, predicted_peak_bytes)
    for axes in host_axes:
        _draw_host(axes, samples)
    phases = [sample.phase for sample in samples]
    for axes in figure.axes:
        map_parts.shade_phases(axes, phases, with_names=axes is device_axes)
        map_parts.finish(axes, len(samples))
    map_parts.name_units(figure.axes[-1], [sample.label for sample in samples], phases)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png", dpi=_DPI)
    return target


def _new_figure(num_moments: int, *, with_host: bool) -> Figure:
    """Return an empty figure with one panel, or two that share their moments; long steps get a wider one.

    Raises:
        UserError: If matplotlib is missing.
    """
    # Imported here: it takes a second and only the picture needs it. No pyplot: it would pick a window system and keep
    # every figure alive.
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the memory map needs matplotlib: pip install matplotlib") from error
    width = min(18.0, max(12.0, 7.5 + 0.05 * num_moments))
    figure = Figure(figsize=(width, 7.8 if with_host else 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    if with_host:
        figure.subplots(2, 1, sharex=True, height_ratios=(5, 2.6))
    else:
        figure.subplots(1, 1)
    return figure


def _draw_device(
    axes: Axes, samples: Sequence[MemorySample], capacity_bytes: int | None, predicted_peak_bytes: int | None
) -> None:
    """Draw what the device holds, its peak and its limits."""
    rows = [{**_canonical(sample.device_bytes), NON_MODEL_KIND: sample.non_model_bytes} for sample in samples]
    totals = [sum(row.values()) for row in rows]
    peak_bytes = max(totals)
    is_in_view = capacity_bytes is not None and capacity_bytes <= _MAX_CAPACITY_PER_PEAK * peak_bytes
    top_bytes = max(peak_bytes, predicted_peak_bytes or 0, capacity_bytes or 0 if is_in_view else 0, 1)
    per_unit, unit = byte_unit(top_bytes)
    map_parts.draw_stack(axes, rows, {**DEVICE_KINDS, NON_MODEL_KIND: _NON_MODEL}, per_unit)
    axes.set_ylim(0, 1.17 * top_bytes / per_unit)
    axes.set_ylabel(f"device ({unit})")
    where = totals.index(peak_bytes)
    map_parts.mark_peak(axes, where, peak_bytes / per_unit)
    if capacity_bytes is not None:
        name = f"capacity {format_bytes(capacity_bytes)}"
        if is_in_view:
            map_parts.draw_capacity(axes, capacity_bytes / per_unit, name)
        else:
            map_parts.name_far_capacity(axes, name)
    if predicted_peak_bytes is not None:
        label = f"predicted peak  {format_bytes(predicted_peak_bytes)}"
        map_parts.draw_prediction(axes, predicted_peak_bytes / per_unit, label)
    at = f"{samples[where].label}, {samples[where].phase}"
    map_parts.subtitle(axes, _peak_text(peak_bytes, capacity_bytes, at))
    map_parts.add_legend(axes, "on the device (peak of each)")


def _draw_host(axes: Axes, samples: Sequence[MemorySample]) -> None:
    """Draw what the host holds, and the disk as a line."""
    rows = [{kind: count for kind, count in sample.host_bytes.items() if kind != DISK_KIND} for sample in samples]
    disk = [sample.host_bytes.get(DISK_KIND, 0) for sample in samples]
    peak_bytes = max(sum(row.values()) for row in rows)
    top_bytes = max(1, peak_bytes, *disk)
    per_unit, unit = byte_unit(top_bytes)
    map_parts.draw_stack(axes, rows, HOST_KINDS, per_unit)
    if any(disk):
        map_parts.draw_steps(axes, [count / per_unit for count in disk], f"disk  {format_bytes(max(disk))}")
    axes.set_ylim(0, 1.12 * top_bytes / per_unit)
    axes.set_ylabel(f"host ({unit})")
    map_parts.subtitle(axes, f"host: peak {format_bytes(peak_bytes)}")
    map_parts.add_legend(axes, "on the host (peak of each)")


def _canonical(counts: Mapping[str, int]) -> dict[str, int]:
    """Return bytes by kind with the names that ``DEVICE_KINDS`` uses, whichever case they came in."""
    names = {name.lower(): name for name in DEVICE_KINDS}
    return {names.get(kind.lower(), kind): num_bytes for kind, num_bytes in counts.items()}


def _peak_text(peak_bytes: int, capacity_bytes: int | None, at: str) -> str:
    """Return the sentence above the device's panel."""
    share = ""
    if capacity_bytes:
        percent = 100 * peak_bytes / capacity_bytes
        share = f" of {format_bytes(capacity_bytes)} ({percent:.0f}%)" if percent >= 1 else " (below 1% of capacity)"
    return f"device: peak {format_bytes(peak_bytes)}{share} at {at}"
