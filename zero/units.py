"""A module to units: what is fetched together."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn


@dataclass
class Unit:
    """One transformer block, or one module outside the blocks that owns parameters.

    ``parameters`` lists each parameter once, under its first name in the model; a tied parameter belongs to the unit
    that comes first.
    """

    label: str
    module: nn.Module
    parameters: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    is_block: bool = False
    """Whether it is one of a list of blocks."""


def find_units(root: nn.Module) -> list[Unit]:
    """Units in registration order.

    Blocks are the children of the outermost ``ModuleList`` or ``Sequential`` containers that hold parameters; every
    other module that directly owns parameters is a unit of its own, so that a large embedding and a large head are
    never on the device together.
    """
    seen: set[int] = set()
    units: list[Unit] = []
    _walk(root, "", units, seen)
    return [unit for unit in units if unit.parameters]


def _walk(module: nn.Module, label: str, units: list[Unit], seen: set[int]) -> None:
    own = Unit(label or "model", module)
    units.append(own)
    for name, parameter in module._parameters.items():
        _add(own, f"{label}.{name}" if label else name, parameter, seen)
    for name, child in module.named_children():
        child_label = f"{label}.{name}" if label else name
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            _walk_blocks(child, child_label, units, seen)
        else:
            _walk(child, child_label, units, seen)


def _walk_blocks(container: nn.Module, label: str, units: list[Unit], seen: set[int]) -> None:
    own = Unit(label, container)  # a list may be a subclass with parameters of its own (torch's parametrizations)
    for name, parameter in container._parameters.items():
        _add(own, f"{label}.{name}", parameter, seen)
    units.append(own)
    for name, block in container.named_children():
        unit = Unit(f"{label}.{name}", block, is_block=True)
        for parameter_name, parameter in block.named_parameters(prefix=unit.label):
            _add(unit, parameter_name, parameter, seen)
        units.append(unit)


def _add(unit: Unit, name: str, parameter: nn.Parameter | None, seen: set[int]) -> None:
    if parameter is not None and id(parameter) not in seen:
        seen.add(id(parameter))
        unit.parameters.append((name, parameter))
