"""What the tests of zero.report share."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from zero.report.record import StepRecord

MIB = 1024**2
GIB = 1024**3


def make_record(step: int = 12, **changes: Any) -> StepRecord:
    """A step's figures, those of the documented example unless changed."""
    values: dict[str, Any] = {
        "step": step,
        "num_steps": 200,
        "epoch": 0.25,
        "loss": 3.21446,
        "lr": 5e-5,
        "grad_norm": 1.2345,
        "loss_scale": None,
        "tokens": 4096,
        "tokens_per_s": 1234.4,
        "step_s": 2.0,
        "device_bytes": int(3.1 * MIB),
        "device_peak_bytes": int(3.9 * MIB),
        "device_capacity_bytes": 4 * MIB,
        "host_bytes": int(12.3 * MIB),
        "pinned_bytes": 2 * MIB,
        "num_fetches": 24,
        "num_evictions": 3,
        "h2d_bytes": 5 * MIB,
        "d2h_bytes": MIB,
    }
    return StepRecord(**{**values, **changes})


def render(renderable: Any, width: int = 100) -> str:
    """What a terminal of that width would show, without colours."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]
