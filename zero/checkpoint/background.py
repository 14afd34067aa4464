"""A save that goes on beside the training, and the gate that keeps its snapshot as it was.

Nothing is copied: the thread that writes takes the bytes of one chunk after another, in the order in which updates run.
Whoever wants to change a chunk before its turn has come waits for that chunk. Since a forward and a backward pass lie
between a save and the next update, hardly anybody has to.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable

from gemini.chunk import Chunk
from gemini.holdings import nothing
from gemini.tensor import ChunkTensor
from zero.checkpoint.problems import CheckpointError


class Gate:
    """Keeps chunks from being changed until their bytes have been taken.

    Args:
        readings: the chunk of each run of elements that will be read; once for each run.

    Attributes:
        waited_s: how long the training had to wait.
    """

    def __init__(self, readings: Iterable[Chunk]) -> None:
        self._changed = threading.Condition()
        self._chunks: dict[int, Chunk] = {}
        self._num_left: Counter[int] = Counter()
        for chunk in readings:
            self._chunks[chunk.index] = chunk
            self._num_left[chunk.index] += 1
        # What is written into resident values by the model's own code in a pass goes through no method of the chunk.
        resident = [chunk for chunk in self._chunks.values() if chunk.resident]
        self._versions: dict[ChunkTensor, int] = {t: t.version for chunk in resident for t in chunk.tensors}
        self._given_up = False
        self.waited_s = 0.0
        for index, chunk in self._chunks.items():
            chunk.before_change = functools.partial(self._wait, index)

    def _wait(self, index: int) -> None:
        """Returns once the chunk may change."""
        started_s = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: not self._num_left[index])
        self.waited_s += time.monotonic() - started_s

    def require_open(self) -> None:
        """Raises CheckpointError if the save has been given up: chunks are changing, so it must not go on."""
        if self._given_up:
            raise CheckpointError("the save was given up")

    def taken(self, chunk: Chunk) -> None:
        """One run of the chunk's elements is in its file.

        Raises:
            CheckpointError: the model has written to one of its parameters since the save began.
        """
        if chunk.resident:
            for tensor in chunk.tensors:
                if tensor.version != self._versions.get(tensor, tensor.version):
                    raise CheckpointError(
                        f"parameter {tensor.name} was written in place by the model while a checkpoint was being "
                        "written in the background; save such a model with asynchronous=False"
                    )
        with self._changed:
            self._num_left[chunk.index] -= 1
            if not self._num_left[chunk.index]:
                chunk.before_change = nothing
                self._changed.notify_all()

    def give_up(self) -> None:
        """Everything may change, whether it has been read or not. Does nothing once all has been taken."""
        with self._changed:
            self._given_up = any(self._num_left.values())
            self._num_left.clear()
            for chunk in self._chunks.values():
                chunk.before_change = nothing
            self._changed.notify_all()


class BackgroundSaves:
    """The saves of one engine that go on in the background: one at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Runs a save in a thread of its own. The process does not end before it has."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name="zero-save")
        self._thread.start()

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error

    @property
    def is_running(self) -> bool:
        """Whether a save has begun and not ended."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Waits for a save that still runs.

        Raises:
            CheckpointError: it failed; said once.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error = None, self._error
        self._error = None
        if error is not None:
            raise error
