"""The table about what a run costs in energy."""

from __future__ import annotations

from typing import Literal

from zero.config.types import NonNegativeNumber, Overhead, PositiveNumber, Section

Country = Literal[
    "AUS", "AUT", "BRA", "CAN", "CHE", "CHN", "DEU", "ESP", "FIN", "FRA", "GBR", "IND", "IRL", "ITA", "JPN", "KOR", "NLD",
    "NOR", "POL", "SGP", "SWE", "USA", "ZAF",
]  # fmt: skip


class CostSection(Section):
    """What is said of energy and CO2e at the end of a run."""

    energy: Literal["auto", "estimated", "codecarbon", "off"] = "auto"
    """Where energy comes from. `auto` measures what can be read (NVML for NVIDIA cards, RAPL for processors) and estimates
    the rest; `estimated` reads nothing; `codecarbon` leaves it to that package, without a network (extra `energy`:
    pip install -c constraints.txt -e ".[energy]"); `off` says nothing."""

    country: Country | None = None
    """Whose grid supplies the machine, for the CO2e of a kWh. Unset: the world's average."""

    grid_factor: NonNegativeNumber | None = None
    """Kilograms of CO2e per kWh, where it is known better; goes before country."""

    pue: Overhead = 1.0
    """Energy of the whole building for each kWh of its machines (power usage effectiveness): 1.1 for the best data centres,
    about 1.56 for the average one, 1.0 for a machine on a desk."""

    cpu_core_watts: PositiveNumber = 10.0
    """Power of one busy core, for processors that cannot be measured."""

    gpu_watts: PositiveNumber | None = None
    """Power of the accelerator, where it cannot be measured. Unset: its data sheet's, or 300 for cards not known."""
