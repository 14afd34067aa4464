"""Which chunks live on disk when they are not on the device: as few as the host has no room for."""

from __future__ import annotations

from dataclasses import replace

from gemini.plan import ChunkFacts, host_bytes, widening_bytes
from gemini.segment import Placement


def spill(facts: list[ChunkFacts], limit_bytes: int) -> list[ChunkFacts]:
    """The facts, with what has to go to disk marked so that the host holds at most ``limit_bytes``, if that is possible.

    Optimizer states go first: they are touched once a step. Then values. Late layers before early ones: their update
    has the longest time before the next pass asks for it. Gradients stay.

    Args:
        facts: of all chunks, nothing being on the device.
        limit_bytes: for model data on the host.
    """
    facts = list(facts)
    excess_bytes = host_bytes(facts, [Placement() for _ in facts]) + widening_bytes(facts) - limit_bytes
    for index in reversed(range(len(facts))):
        fact = facts[index]
        saved_bytes = int((fact.companion_bytes_per_numel - fact.gradient_itemsize) * fact.numel)
        if excess_bytes > 0 and saved_bytes > 0:
            facts[index] = replace(fact, companions_on_disk=True)
            excess_bytes -= saved_bytes
    for index in reversed(range(len(facts))):
        if excess_bytes > 0:
            facts[index] = replace(facts[index], values_on_disk=True)
            excess_bytes -= facts[index].value_bytes
    return facts
