"""Which rank a process is, by what its environment says. Needs no torch: the command line asks before it loads it."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from zero.errors import UserError
from zero.launching import slurm

RESTART_VARIABLE = "ZERO_RESTART_COUNT"
"""Set by our own launcher: how often it has started all ranks again."""

_ELASTIC_RESTARTS = "TORCHELASTIC_RESTART_COUNT"


@dataclass(frozen=True)
class Place:
    """Where a process stands among those of its run.

    Attributes:
        rank: number of this process.
        size: number of processes.
        local_rank: number on its machine.
        local_size: processes on its machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int


def find_place(environment: Mapping[str, str]) -> Place | None:
    """What ``torchrun`` or SLURM say of this process; None for one that runs by itself.

    Raises:
        UserError: they contradict themselves.
    """
    place = given_place(environment) or _slurm_place(environment)
    return place if place is not None and place.size > 1 else None


def given_place(environment: Mapping[str, str]) -> Place | None:
    """What ``torchrun``, our own launcher or the user say of this process, be it the only one.

    Raises:
        UserError: they contradict themselves.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    size = environment["WORLD_SIZE"]
    local_size = environment.get("LOCAL_WORLD_SIZE", size if "MASTER_ADDR" in environment else "1")
    return _place("RANK", "WORLD_SIZE", environment["RANK"], size, environment.get("LOCAL_RANK", "0"), local_size)


def _slurm_place(environment: Mapping[str, str]) -> Place | None:
    size = slurm.num_tasks(environment)
    if size is None or not slurm.in_step(environment):
        return None
    local_size = slurm.num_local_tasks(environment) or "1"
    local_rank = environment.get("SLURM_LOCALID", "0")
    return _place("SLURM_PROCID", "SLURM_NTASKS", environment["SLURM_PROCID"], size, local_rank, local_size)


def _place(rank_name: str, size_name: str, rank: str, size: str, local_rank: str, local_size: str) -> Place:
    try:
        place = Place(int(rank), int(size), int(local_rank), int(local_size))
    except ValueError as error:
        raise UserError(f"{rank_name}, {size_name}: {error}; they must be whole numbers") from error
    if not 0 <= place.rank < place.size:
        raise UserError(
            f"{rank_name} = {place.rank}, {size_name} = {place.size}: the rank must be below the number of ranks"
        )
    # A step need not say how many tasks share a machine; there are at least as many as this one's number tells.
    local_size_least = max(1, place.local_rank + 1, place.local_size)
    return Place(place.rank, place.size, place.local_rank, local_size_least)


def tasks_left_out(environment: Mapping[str, str]) -> int:
    """Number of tasks of a SLURM job in whose shell this process runs by itself; 0 where nothing is left out."""
    size = slurm.num_tasks(environment) or "1"
    outside = "SLURM_JOB_ID" in environment and not slurm.in_step(environment)
    return int(size) if outside and size.isdigit() and int(size) > 1 else 0


def is_ours(environment: Mapping[str, str]) -> bool:
    """Whether our own launcher started this process, and prints how it failed."""
    return RESTART_VARIABLE in environment and "RANK" in environment


def complete_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Says in ``torchrun``'s words what SLURM or our launcher said in theirs, for torch and the user's own code.

    Raises:
        UserError: SLURM's list of hosts cannot be read.
    """
    if is_ours(environment):
        # Our launcher begins anew with the agent on every restart, which therefore counts from 0.
        environment[_ELASTIC_RESTARTS] = environment[RESTART_VARIABLE]
    if given_place(environment) is not None:
        return
    place = find_place(environment)
    if place is None:
        return
    environment.update(slurm.meeting_point(environment))
    said = {
        "RANK": place.rank,
        "WORLD_SIZE": place.size,
        "LOCAL_RANK": place.local_rank,
        "LOCAL_WORLD_SIZE": place.local_size,
    }
    for name, number in said.items():
        environment[name] = str(number)
