"""The processes of a run: who they are, the groups they talk in, and what is said when one of them falls silent."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from zero import binding
from zero.errors import UserError
from zero.launching.place import Place, complete_environment, find_place, tasks_left_out
from zero.launching.rank import watch_exit

logger = logging.getLogger("zero")

_BEATS = 10
"""Signs of life within the timeout, at least."""
_BEAT_S = 2.0
"""Longest time between two of them."""
_GRACE_S = 3.0
"""How long the others may take to say why they went, once one of them is gone."""


class PeerLostError(RuntimeError):
    """Another rank died, stopped or failed while this one waited for it."""


class World:
    """The ranks of a run.

    Args:
        place: this process's.
        timeout_s: longest wait for another rank.

    Attributes:
        rank: of this process.
        size: number of ranks.
        bulk: group in which parameters and gradients travel, on the devices' own links where there are some.
        control: group of host memory, for small messages and for what ranks do apart.
        step: for messages: the optimizer step that this rank works on.
    """

    def __init__(self, place: Place, timeout_s: float) -> None:
        self.place = place
        self.rank, self.size = place.rank, place.size
        self.step = 0
        self.timeout_s = timeout_s
        timeout = timedelta(seconds=timeout_s)
        self._owns_group = not dist.is_initialized()
        if self._owns_group:
            # The rendezvous is given longer: ranks import and read for a while before they come to it.
            dist.init_process_group(_backend(), timeout=timeout)
        self._operation = "starting"
        self._store = PrefixStore("zero", _get_default_store())
        self._closing = threading.Event()
        self._failed = False
        self.at_end: Callable[[], None] = lambda: None
        """Called before this rank leaves in good order: others may still need what it owns."""
        self._beating = threading.Thread(target=self._beat, name="zero-alive", daemon=True)
        self._beating.start()
        with self.operation("meeting the other ranks"):
            self.bulk: Any = dist.group.WORLD
            self.control: Any = dist.new_group(backend="gloo", timeout=timeout)
            # Its own, so that a checkpoint written in the background meets the others while training goes on.
            self.background: Any = dist.new_group(backend="gloo", timeout=timeout)

    # -- signs of life -----------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        while True:
            with contextlib.suppress(Exception):  # the store may be gone: then so is the run
                self._store.set(f"alive/{self.rank}", self._said(""))
            if self._closing.wait(min(_BEAT_S, self.timeout_s / _BEATS)):
                return

    def _said(self, problem: str) -> str:
        where = {"step": self.step, "operation": self._operation, "problem": problem}
        return json.dumps({**where, "time_s": time.time(), "pid": os.getpid(), "host": socket.gethostname()})

    @contextlib.contextmanager
    def operation(self, what: str) -> Iterator[None]:
        """Around whatever waits for other ranks: failures in it are said in terms of ranks.

        Raises:
            PeerLostError: another rank did not take part.
        """
        before, self._operation = self._operation, what
        try:
            yield
        except PeerLostError:
            raise
        except (dist.DistError, RuntimeError) as error:
            if isinstance(error, UserError | torch.OutOfMemoryError) or not _is_of_peers(error):
                raise
            raise self._lost(what, error) from error
        finally:
            self._operation = before

    def doing(self, what: str) -> None:
        """What this rank does from now on, for the others to tell if it falls silent."""
        self._operation = what

    def fail(self, error: BaseException) -> None:
        """This rank cannot go on: leaves word, so that the others name the cause."""
        if self._closing.is_set():
            return
        self._failed = True
        problem = str(error) if isinstance(error, PeerLostError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(Exception):
            self._store.set(f"failed/{self.rank}", self._said(problem))

    def _lost(self, what: str, error: BaseException) -> PeerLostError:
        culprits = self._culprits()
        said = f"rank {self.rank}, step {self.step}, {what}: "
        if culprits:
            lost = PeerLostError(said + "; ".join(culprits))
        else:
            first = str(error).strip().partition("\n")[0]
            lost = PeerLostError(f"{said}another rank did not take part within {self.timeout_s:g} s ({first})")
        self.fail(lost)
        return lost

    def _culprits(self) -> list[str]:
        """A line for each rank that failed, died or does not answer."""
        deadline_s = time.monotonic() + _GRACE_S
        while True:
            lines = [line for rank in range(self.size) if rank != self.rank and (line := self._judge(rank))]
            if lines or time.monotonic() > deadline_s:
                return lines
            time.sleep(0.1)

    def _judge(self, rank: int) -> str | None:
        failed, alive = self._word_of("failed", rank), self._word_of("alive", rank)
        if failed is not None:
            if failed["problem"].startswith("rank "):  # it lost a peer itself, and says which
                return f"rank {rank} stopped because: {failed['problem']}"
            return f"rank {rank} failed at step {failed['step']}, {failed['operation']}: {failed['problem']}"
        if alive is None:
            return f"rank {rank} never came up"
        where = f"step {alive['step']}, {alive['operation']}"
        state = _process_state(alive["pid"]) if alive["host"] == socket.gethostname() else "unknown"
        if state == "gone":
            return f"rank {rank} died (process {alive['pid']}), last seen at {where}"
        if state == "stopped":
            return f"rank {rank} is stopped (process {alive['pid']}), last seen at {where}"
        silent_s = time.time() - alive["time_s"]
        if silent_s > 2 * self.timeout_s / _BEATS:
            return f"rank {rank} has been silent for {silent_s:.0f} s, last seen at {where}"
        return None

    def _word_of(self, kind: str, rank: int) -> dict[str, Any] | None:
        key = f"{kind}/{rank}"
        try:
            if not self._store.check([key]):
                return None
            word: dict[str, Any] = json.loads(self._store.get(key))
        except Exception:  # the store went with the rank that kept it
            return None
        return word

    # -- small messages ----------------------------------------------------------------------------------------------

    def all_gather_object(self, value: Any, group: Any = None) -> list[Any]:
        """What every rank has given, in the order of ranks; JSON in between, no pickle.

        Args:
            value: of numbers, texts, lists and dictionaries.
            group: ``control`` by default.
        """
        group = group or self.control
        own = torch.frombuffer(bytearray(json.dumps(value).encode() or b" "), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([own.numel()]), group=group)
        longest = int(torch.stack(lengths).max())
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: own.numel()] = own
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=group)
        return [json.loads(bytes(part[: int(length)].numpy())) for part, length in zip(parts, lengths, strict=True)]

    def close(self) -> None:
        """Waits for the others, serving them, unless something has failed; leaves the groups that were made here."""
        if self._closing.is_set():
            return
        if not self._failed:
            try:
                self.at_end()
            except (PeerLostError, UserError) as error:  # whoever it concerns says so, and louder
                logger.info("%s", error)
        self._closing.set()
        self._beating.join()
        if self._owns_group:
            dist.destroy_process_group()


def _is_of_peers(error: BaseException) -> bool:
    """Whether an error came out of a collective, and not out of this rank's own work."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "connection", "timed out", "timeout", "nccl", "peer", "socket", "store")
    )


def _process_state(pid: int) -> str:
    """gone, stopped or running."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    return {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}.get(state, "running")


def _backend() -> str:
    """Gloo for host memory, and beside it what connects the accelerators there are."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "gloo"
    of_device = dist.get_default_backend_for_device(accelerator)
    if of_device == "gloo" or not dist.is_backend_available(of_device):
        return "gloo"
    return f"cpu:gloo,{accelerator.type}:{of_device}"


_current: World | None = None


def join(timeout_s: float, device_type: str | None = None) -> World | None:
    """The run's ranks, joined on the first call; None for a process that runs by itself.

    A group that the user's own code has made is taken as it is.

    Args:
        timeout_s: longest wait for another rank.
        device_type: what the ranks compute on, as ``[device]`` has it: each takes its own.
    """
    global _current
    if _current is None:
        if dist.is_available() and dist.is_initialized():
            place: Place | None = _place_of_group()
        else:
            complete_environment()  # SLURM's words in torch's, for env://
            place = find_place(os.environ)
            if place is not None:
                binding.settle(place, device_type)
        if place is None or place.size == 1:
            _tell_of_tasks_left_out()
            return None
        _current = World(place, timeout_s)
        watch_exit()
    return _current


@functools.cache  # once is enough
def _tell_of_tasks_left_out() -> None:
    num_tasks = tasks_left_out(os.environ)
    if num_tasks:
        logger.info("SLURM gave this job %d tasks, but this process was not started by srun: it runs alone", num_tasks)


def _place_of_group() -> Place:
    rank, size = dist.get_rank(), dist.get_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return Place(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def current() -> World | None:
    """The run's ranks if they have been joined."""
    return _current


def leave() -> None:
    """Ends what :func:`join` began."""
    global _current
    if _current is not None:
        _current.close()
    _current = None
