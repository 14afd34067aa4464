"""Starts the processes of one system, waits for them, and gives back what they measured as one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from installing import peers_environment

HERE = Path(__file__).resolve().parent


class RunFailedError(RuntimeError):
    """A process of a system failed or did not end; the message holds the end of what it said."""


@dataclass
class Runner:
    """Runs systems.

    Attributes:
        venv_python: interpreter of the peers' environment; None if none is needed.
        num_threads: of each process; None for its share of the cores.
        timeout_s: of one run.
        source: the tree that holds the package ``zero``.
    """

    venv_python: Path | None
    num_threads: int | None
    timeout_s: float
    source: Path

    def run(self, job: dict[str, Any], num_ranks: int, in_venv: bool) -> dict[str, Any]:
        """All ranks' results as one: seconds of the slowest rank, mean losses, summed bytes.

        Raises:
            RunFailedError: a process failed, or took too long.
        """
        with tempfile.TemporaryDirectory() as folder:
            job = job | {"out": str(Path(folder) / "result")}
            port = _free_port()
            started = [self._start(job, rank, num_ranks, in_venv, port, Path(folder)) for rank in range(num_ranks)]
            _wait(started, time.monotonic() + self.timeout_s, Path(folder))
            results = [json.loads(Path(f"{job['out']}.{rank}").read_text("utf-8")) for rank in range(num_ranks)]
        return merge(results)

    def _start(
        self, job: dict[str, Any], rank: int, num_ranks: int, in_venv: bool, port: int, folder: Path
    ) -> subprocess.Popen[bytes]:
        python = self.venv_python if in_venv else Path(sys.executable)
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(self.num_threads or max(1, len(os.sched_getaffinity(0)) // num_ranks)),
            "PYTHONPATH": str(self.source),
            "HF_HUB_OFFLINE": "1",
        }
        if in_venv and self.venv_python is not None:
            environment |= peers_environment(self.venv_python)
        with (folder / f"said.{rank}").open("wb") as said:
            command = [str(python), str(HERE / "worker.py"), json.dumps(job)]
            return subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)


def _wait(started: list[subprocess.Popen[bytes]], deadline_s: float, folder: Path) -> None:
    try:
        while any(process.poll() is None for process in started):
            if any(process.poll() for process in started):
                break
            if time.monotonic() > deadline_s:
                raise RunFailedError(f"not done in time\n{_said(folder)}")
            time.sleep(0.1)
        if any(process.returncode for process in started):
            raise RunFailedError(f"exit codes {[p.returncode for p in started]}\n{_said(folder)}")
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()


def _said(folder: Path) -> str:
    return "\n".join(path.read_text("utf-8", errors="replace")[-3000:] for path in sorted(folder.glob("said.*")))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Several ranks' results as one."""
    merged = dict(results[0])
    merged["step_s"] = [max(values) for values in zip(*(r["step_s"] for r in results), strict=True)]
    merged["cpu_s"] = [sum(values) for values in zip(*(r["cpu_s"] for r in results), strict=True)]
    merged["losses"] = [sum(values) / len(results) for values in zip(*(r["losses"] for r in results), strict=True)]
    for key in ("baseline_bytes", "peak_bytes"):
        merged[key] = sum(result[key] for result in results)
    return merged
