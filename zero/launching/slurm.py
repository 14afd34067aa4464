"""What SLURM says of a job step, in the words of ``torchrun``.

Formats: the manual page of ``srun``, "output environment variables". Special steps (the batch script, the shell of
``salloc``) have numbers from ``SLURM_INTERACTIVE_STEP`` on in ``slurm/slurm.h``: no other task runs beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from zero.errors import UserError

_SPECIAL_STEPS = 0xFFFFFFF0
_DYNAMIC_PORTS = (49152, 65536)
_STEP_STRIDE = 97
"""Steps of one job get ports of their own, and those of neighbouring jobs others."""


def in_step(environment: Mapping[str, str]) -> bool:
    """Whether ``srun`` started this process: only then do the other tasks run beside it."""
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
    return "SLURM_PROCID" in environment and step.isdigit() and int(step) < _SPECIAL_STEPS


def num_tasks(environment: Mapping[str, str]) -> str | None:
    """Number of tasks of this step, as SLURM wrote it."""
    return environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS"))


def num_local_tasks(environment: Mapping[str, str]) -> str | None:
    """Tasks of this step on this machine, as far as SLURM says."""
    node = environment.get("SLURM_NODEID", "")
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE")
    if per_node is not None and node.isdigit():
        counts = expand_counts(per_node)
        if int(node) < len(counts):
            return str(counts[int(node)])
    return environment.get("SLURM_NTASKS_PER_NODE")


def expand_counts(text: str) -> list[int]:
    """``2(x3),1`` is 2, 2, 2, 1.

    Raises:
        UserError: it is written in another way.
    """
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE = {text}: cannot be read; give RANK, WORLD_SIZE and LOCAL_RANK")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def expand_hosts(text: str) -> list[str]:
    """The hosts of a list in SLURM's compact form: ``node[01-03,07],gpu5`` or ``rack[1-2]n[1-2]``.

    Raises:
        UserError: brackets do not match, or nothing is named.
    """
    hosts = [host for part in _split_outside_brackets(text) for host in _expand(part, text)]
    if not hosts:
        raise UserError(f"SLURM_JOB_NODELIST = {text!r}: names no host; set MASTER_ADDR to the first one")
    return hosts


def _split_outside_brackets(text: str) -> list[str]:
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if ",".join(parts) != text.strip(","):
        raise UserError(f"SLURM_JOB_NODELIST = {text!r}: cannot be read; set MASTER_ADDR to the first host")
    return [part.strip() for part in parts if part.strip()]


def _expand(part: str, whole: str) -> list[str]:
    """All hosts of one part; the leftmost bracket turns slowest, as in SLURM."""
    found = re.fullmatch(r"([^\[]*)\[([^\]]+)\](.*)", part)
    if found is None:
        return [part]
    before, ranges, after = found.groups()
    hosts = []
    for one in ranges.split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", one.strip())
        if ends is None:
            raise UserError(f"SLURM_JOB_NODELIST = {whole!r}: [{ranges}] cannot be read; set MASTER_ADDR")
        first, last = ends[1], ends[2] or ends[1]
        numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        hosts += [before + number + rest for number in numbers for rest in _expand(after, whole)]
    return hosts


def meeting_point(environment: Mapping[str, str]) -> dict[str, str]:
    """``MASTER_ADDR`` and ``MASTER_PORT``: the same on every task, without a word between them.

    The port comes from job and step, within the range for private use; what the user has set stands.

    Raises:
        UserError: SLURM does not name the hosts, or in a form that is not known.
    """
    address = environment.get("MASTER_ADDR")
    if address is None:
        hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
        if hosts is None:
            raise UserError("SLURM_JOB_NODELIST is not set: set MASTER_ADDR to the host of task 0")
        address = expand_hosts(hosts)[0]
    port = environment.get("MASTER_PORT")
    if port is None:
        job = re.sub(r"\D", "", environment.get("SLURM_JOB_ID", "")) or "0"
        step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", "0"))
        lowest, end = _DYNAMIC_PORTS
        port = str(lowest + (int(job) + _STEP_STRIDE * int(step)) % (end - lowest))
    return {"MASTER_ADDR": address, "MASTER_PORT": port}
