"""A machine for predictions by hand: nothing takes any time, but for what a test gives it."""

from __future__ import annotations

import math
from dataclasses import fields, replace

from gemini.profile import HardwareProfile

INSTANT = replace(
    HardwareProfile(name="instant", source="nothing takes any time", launch_s=0.0),
    **{field.name: math.inf for field in fields(HardwareProfile) if field.name.endswith("_per_s")},  # type: ignore[arg-type]
)
