"""CO2e of a kilowatt-hour, by country, and what the makers say that cards draw."""

from __future__ import annotations

from dataclasses import dataclass

_WORLD_KG = 0.480
_WORLD_SOURCE = "world average 2023, Ember, Global Electricity Review 2024; set cost.country"
_COUNTRY_SOURCE = "2023, Ember and Our World in Data"

_COUNTRY_KG = {
    "AUS": 0.549, "AUT": 0.111, "BRA": 0.098, "CAN": 0.170, "CHE": 0.035, "CHN": 0.582, "DEU": 0.381, "ESP": 0.174,
    "FIN": 0.079, "FRA": 0.056, "GBR": 0.238, "IND": 0.713, "IRL": 0.291, "ITA": 0.331, "JPN": 0.485, "KOR": 0.431,
    "NLD": 0.268, "NOR": 0.030, "POL": 0.662, "SGP": 0.471, "SWE": 0.041, "USA": 0.369, "ZAF": 0.708,
}  # fmt: skip
"""Kilograms of CO2e per kWh generated, over the life of the plants."""

_CARD_WATTS = {
    "H200": 700.0, "H100 PCIe": 350.0, "H100": 700.0, "A100-PCIE": 250.0, "A100 80GB PCIe": 300.0, "A100": 400.0,
    "V100": 300.0, "L40S": 350.0, "L4": 72.0, "T4": 70.0, "RTX 5090": 575.0, "RTX 4090": 450.0, "RTX 4060 Ti": 165.0,
    "RTX 3090": 350.0, "RTX 3060": 170.0, "RTX 2060": 160.0,
}  # fmt: skip
"""Board power by the makers' data sheets; of names that hold one another the longer stands first."""

UNKNOWN_CARD_WATTS = 300.0


@dataclass(frozen=True, slots=True)
class Grid:
    """What a kWh stands for.

    Attributes:
        kg_per_kwh: Kilograms of CO2e.
        source: Where the number is from.
    """

    kg_per_kwh: float
    source: str


def grid_of(country: str | None, given_kg: float | None) -> Grid:
    """The grid of a country by its three letters, or the factor given, or the world's average."""
    if given_kg is not None:
        return Grid(given_kg, "cost.grid_factor")
    if country in _COUNTRY_KG:
        return Grid(_COUNTRY_KG[country], f"{country} {_COUNTRY_SOURCE}")
    return Grid(_WORLD_KG, _WORLD_SOURCE)


def card_watts(name: str) -> float | None:
    """What a card of this name may draw; None for one that is not known."""
    words = name.replace("-", " ").split()
    return next((watts for card, watts in _CARD_WATTS.items() if _holds(words, card.replace("-", " ").split())), None)


def _holds(words: list[str], wanted: list[str]) -> bool:
    return all(word in words for word in wanted)
