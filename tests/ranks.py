"""Several ranks on this machine: forked from one process that has imported everything, so a test pays no start-up.

Rendezvous goes through a file: no ports. Every rank's traceback is in the failure, and a rank that hangs is killed.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

_PRELOAD = ["torch.distributed", "transformers.models.opt.modeling_opt", "transformers.models.llama.modeling_llama",
            "pytest", "tests.reference", "zero.initializer", "zero.trainer", "zero.checkpoint"]  # fmt: skip


_GRACE_S = 8.0
"""How long ranks may live on after another has failed; their own timeouts are shorter."""


@dataclass
class Ended:
    """How a rank ended: what it returned, or its traceback, or nothing if it was killed."""

    result: Any = None
    problem: str | None = None
    exit_code: int | None = None

    @property
    def well(self) -> bool:
        """Whether it returned."""
        return self.problem is None and self.exit_code == 0


def run_ranks(
    function: Callable[..., Any], size: int, *args: Any, timeout_s: float = 120.0, own_group: bool = True
) -> list[Any]:
    """Runs a function of a test module once on each rank; returns what they returned, in the order of ranks."""
    ended = try_ranks(function, size, *args, timeout_s=timeout_s, own_group=own_group)
    if not all(rank.well for rank in ended):
        texts = [f"-- rank {rank}: exit {end.exit_code}\n{end.problem}" for rank, end in enumerate(ended)]
        raise AssertionError("\n".join(texts))
    return [rank.result for rank in ended]


def try_ranks(
    function: Callable[..., Any],
    size: int,
    *args: Any,
    timeout_s: float = 120.0,
    group_timeout_s: float = 60.0,
    own_group: bool = True,
) -> list[Ended]:
    """The same where ranks may fail, or be killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        meeting = os.path.join(folder, "meeting")
        started = []
        for rank in range(size):
            mine, theirs = context.Pipe(duplex=False)
            group = (meeting, group_timeout_s) if own_group else None
            process = context.Process(target=_rank, args=(theirs, function, rank, size, group, args))
            process.start()
            theirs.close()
            started.append((process, mine))
        return _collect(started, time.monotonic() + timeout_s)


def _collect(started: list[tuple[Any, Connection]], deadline_s: float) -> list[Ended]:
    ended = [Ended() for _ in started]
    open_ends = {connection: rank for rank, (_, connection) in enumerate(started)}
    while open_ends and time.monotonic() < deadline_s:
        for ready in wait(list(open_ends), timeout=max(0.0, deadline_s - time.monotonic())):
            rank = open_ends.pop(ready)  # type: ignore[call-overload]
            try:
                result, ended[rank].problem = ready.recv()  # type: ignore[union-attr]
                if result is not None:
                    ended[rank].result = torch.load(io.BytesIO(result), weights_only=False)
            except EOFError:
                ended[rank].problem = "it died without a word"
            if ended[rank].problem is not None:  # the others must notice by themselves, and soon
                deadline_s = min(deadline_s, time.monotonic() + _GRACE_S)
    for rank, (process, connection) in enumerate(started):
        process.join(max(1.0, min(20.0, deadline_s - time.monotonic())))
        if process.is_alive():
            ended[rank].problem = (ended[rank].problem or "") + "; it hung and was killed"
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        ended[rank].exit_code = process.exitcode
        connection.close()
    return ended


def _rank(
    connection: Connection,
    function: Callable[..., Any],
    rank: int,
    size: int,
    group: tuple[str, float] | None,
    args: tuple[Any, ...],
) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for loader workers, as in a process that torchrun started
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    try:
        if group is not None and size > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{group[0]}", rank=rank, world_size=size,
                timeout=timedelta(seconds=group[1]),
            )  # fmt: skip
        result = function(*args)
    except BaseException as error:
        from zero import world

        if (present := world.current()) is not None:
            present.fail(error)
        connection.send((None, traceback.format_exc()))
        connection.close()
        sys.stderr.flush()
        os._exit(1)
    # As bytes: tensors on their own would travel as shared memory, which goes with this process.
    written = io.BytesIO()
    torch.save(result, written)
    connection.send((written.getvalue(), None))
    connection.close()
    from zero import world

    world.leave()
