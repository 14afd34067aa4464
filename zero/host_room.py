"""What the host must hold when it holds most, and what a user is told where it, or its disk, cannot."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from gemini.plan import ChunkFacts, DoesNotFitError, Plan, disk_bytes, first_host_bytes, host_bytes, widening_bytes
from gemini.policy import Policy
from gemini.segment import Placement
from gemini.units import format_bytes
from zero.config.schema import Config
from zero.config.words import show
from zero.optim.coded import SPEEDS, device_cost
from zero.optim.formats import FORMATS, FP32

Rows = list[tuple[str, str, int, str]]
"""As in :class:`gemini.plan.DoesNotFitError`."""


def host_rows(policy: Policy, facts: list[ChunkFacts], placements: list[Placement], plan: Plan | None) -> Rows:
    """What the host holds when it holds most.

    Args:
        policy: that decided.
        facts: of all chunks.
        placements: of them, by the plan if there is one.
        plan: of the steps; None if they do not fit.
    """
    rows = _taken_over_rows(policy, facts, placements)
    if plan is None or not policy.spares_memory:
        return rows
    return max(rows, _rows_of_one_memory(policy, plan, host_bytes(facts, placements)), key=sum_of)


def sum_of(rows: Rows) -> int:
    """Bytes of all rows."""
    return sum(num_bytes for _, _, num_bytes, _ in rows)


def host_refusal(
    config: Config, policy: Policy, facts: list[ChunkFacts], rows: Rows, limit_bytes: int
) -> DoesNotFitError:
    """Of a host without room for all rows.

    Args:
        config: of the run.
        policy: that decided.
        facts: of all chunks.
        rows: what the host would have to hold.
        limit_bytes: what it can.
    """
    peak_bytes = sum_of(rows)
    formats = _formats_that_fit(config, policy, facts, peak_bytes, limit_bytes)
    states = f"or precision.optimizer_state = {' or '.join(map(show, formats))}, " if formats else ""
    fixed = 'or memory.policy = "cuda" or "static" on a device with room, ' if policy.name == "auto" else ""
    aside = 'memory.policy = "cpu" with ' if policy.spares_memory and policy.name != "cpu" else ""
    return DoesNotFitError(
        f"it does not fit: the host must hold {format_bytes(peak_bytes)} at the highest, {format_bytes(limit_bytes)} "
        "are available",
        [
            *(row for row in rows if row[2]),
            ("needed on the host", "host", peak_bytes, f"{format_bytes(limit_bytes)} available"),
        ],
        "smallest change that would fit: free host memory or raise memory.host, or "
        f"{aside}memory.disk = a folder for what the host cannot hold, {states}{fixed}or a smaller model, or model.lora",
    )


def require_room_for_values(config: Config, facts: list[ChunkFacts], limit_bytes: int, num_local_ranks: int) -> None:
    """Before the values of a model that only infers are read, which all come to the host first, or to its disk.

    Args:
        config: of the run.
        facts: of all chunks.
        limit_bytes: of the host, for this rank.
        num_local_ranks: that share the disk.

    Raises:
        DoesNotFitError: there is no room.
    """
    needed_bytes = first_host_bytes(facts)
    if needed_bytes > limit_bytes:
        raise DoesNotFitError(
            f"it does not fit: the host must hold {format_bytes(needed_bytes)} of the model, {format_bytes(limit_bytes)} "
            "are available",
            [("parameters", "host", needed_bytes, f"{format_bytes(limit_bytes)} available")],
            "smallest change that would fit: free host memory or raise memory.host, or memory.disk = a folder for what "
            "the host cannot hold, or a smaller model",
        )
    if config.memory.disk is not None:
        nowhere = [Placement() for _ in facts]
        refusal = disk_refusal(config.memory.disk, disk_bytes(facts, nowhere) * num_local_ranks)
        if refusal is not None:
            raise refusal


def disk_refusal(folder: str, needed_bytes: int) -> DoesNotFitError | None:
    """Of a disk without room for what would go there, as far as that can be known."""
    there = next(
        (path for path in (Path(folder).expanduser(), *Path(folder).expanduser().parents) if path.is_dir()), None
    )
    if there is None or needed_bytes <= (free_bytes := shutil.disk_usage(there).free):
        return None
    return DoesNotFitError(
        f"it does not fit: {format_bytes(needed_bytes)} must go to disk, {format_bytes(free_bytes)} are free there",
        [("needed on disk", "disk", needed_bytes, f"{format_bytes(free_bytes)} free in {folder}")],
        "smallest change that would fit: free disk space, name another folder in memory.disk, or raise memory.host",
    )


def other_formats(config: Config) -> list[str]:
    """Formats of the optimizer's states that this run could take instead of ``fp32``."""
    now = (config.precision.dtype, config.precision.optimizer_state)
    if now != ("bf16", FP32.name) or config.optimizer.name not in ("adamw", "adam"):
        return []
    return [name for name in FORMATS if name != FP32.name]


def in_format(fact: ChunkFacts, name: str) -> ChunkFacts:
    """The same chunk with master and states in another format."""
    if not fact.companion_bytes_per_numel or fact.value_itemsize != 2:
        return fact
    buffers = FORMATS[name].buffers
    coded_bytes = sum(buffer.dtype.itemsize / buffer.block_numel for buffer in buffers)
    return replace(
        fact,
        companion_bytes_per_numel=coded_bytes + fact.gradient_itemsize,
        coded_bytes_per_numel=coded_bytes,
        block_numel=max(buffer.block_numel for buffer in buffers),
        update_speed=SPEEDS[name],
        device_update_cost=device_cost(FORMATS[name]),
    )


def _taken_over_rows(policy: Policy, facts: list[ChunkFacts], placements: list[Placement]) -> Rows:
    """Of a host that is not the device.

    Every policy takes a model over through the host. The fixed ones place before the first step; ``auto`` knows enough
    only after it, so that everything is made on the host, and comes back there when a batch needs the whole device.
    """
    if policy.name == "auto":
        placements = [Placement() for _ in facts]
    staying_bytes = host_bytes(facts, placements)
    values = sum(fact.value_bytes for fact in facts if not fact.values_on_disk)
    if staying_bytes < first_host_bytes(facts):
        note = "while the model is taken over"
        return [("parameters", "host", values, note), ("masters", "host", first_host_bytes(facts) - values, note)]
    note = "during the first step" if policy.name == "auto" else f"policy {policy.name}"
    values = sum(
        f.value_itemsize * (f.numel - p.resident_numel)
        for f, p in zip(facts, placements, strict=True)
        if not f.values_on_disk
    )
    return [
        ("parameters", "host", values, note),
        ("master, optimizer states, gradients", "host", staying_bytes - values, note),
        ("a gradient that is being added to", "host", widening_bytes(facts), "one chunk's"),
    ]


def _rows_of_one_memory(policy: Policy, plan: Plan, staying_bytes: int) -> Rows:
    """What the steps need where the host is the device: both lie in the same memory."""
    note = f"policy {policy.name}, on the CPU"
    return [
        ("parameters, states and activations in use", "host", plan.predicted_device_peak_bytes, note),
        ("what waits meanwhile", "host", staying_bytes, note),
    ]


def _formats_that_fit(
    config: Config, policy: Policy, facts: list[ChunkFacts], peak_bytes: int, limit_bytes: int
) -> list[str]:
    """Formats with which the host could hold everything, where all states are on the host at its highest."""
    if policy.name not in ("auto", "cpu") and not policy.spares_memory:
        return []
    nowhere = [Placement() for _ in facts]
    rest_bytes = peak_bytes - host_bytes(facts, nowhere)
    coded = {name: [in_format(fact, name) for fact in facts] for name in other_formats(config)}
    return [name for name, others in coded.items() if rest_bytes + host_bytes(others, nowhere) <= limit_bytes]
