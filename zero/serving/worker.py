"""The one thread that loads the model and runs passes through it, as long as there is something to run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from zero.errors import UserError
from zero.serving.call import Call

if TYPE_CHECKING:
    from zero.generation import Generator

logger = logging.getLogger("zero")

_MOST_FAILED_PASSES = 3
_MEMORY_EVERY_S = 1.0


@dataclass(frozen=True)
class Memory:
    """Where the bytes are: of the device, of the host, and of the keys and values of running rows."""

    device_capacity_bytes: int = 0
    device_peak_bytes: int = 0
    model_device_bytes: int = 0
    model_host_bytes: int = 0
    model_disk_bytes: int = 0


@dataclass(frozen=True)
class Loaded:
    """A model that can be asked.

    Attributes:
        generator: runs the passes.
        tokenizer: for chat templates and for prompts given as numbers.
        memory: the bytes now; called in the passes' thread.
        close: gives everything back; called in the passes' thread.
        plan: one line about where the model lies.
    """

    generator: Generator
    tokenizer: Any
    memory: Callable[[], Memory] = Memory
    close: Callable[[], None] = lambda: None
    plan: str = ""


class PassFailed(RuntimeError):
    """A pass through the model failed; its requests have no answer, and the service goes on."""

    def __init__(self, cause: BaseException | None) -> None:
        super().__init__(type(cause).__name__)
        self.is_out_of_memory = isinstance(cause, MemoryError) or "OutOfMemory" in type(cause).__name__


class WorkerDied(RuntimeError):
    """The thread of the passes is gone; nothing can be answered any more."""


def _is_device_lost(error: BaseException) -> bool:
    """Whether the process can compute nothing more on its device: CUDA says so of every call after a failed kernel."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


class Worker:
    """Runs the passes.

    Args:
        load: makes the model; called in the thread.
        on_change: called in the thread after loading, and when the thread ends.

    Attributes:
        loaded: the model; None before it is there.
        failure: what the thread died of.
        num_failed_passes: since the start.
        memory: at most a second old while passes run.
    """

    def __init__(self, load: Callable[[], Loaded], on_change: Callable[[], None]) -> None:
        self.loaded: Loaded | None = None
        self.failure: BaseException | None = None
        self.num_failed_passes = 0
        self.memory = Memory()
        self._load = load
        self._on_change = on_change
        self._woken = threading.Event()
        self._lock = threading.Lock()
        self._calls: set[Call] = set()
        self._is_stopping = False
        self._num_failed_in_a_row = 0
        self._memory_s = float("-inf")
        # A daemon: a pass may take seconds, and a second SIGTERM does not wait for it.
        self._thread = threading.Thread(target=self._main, name="zero passes", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Starts the thread, which loads the model first."""
        self._thread.start()

    def submit(self, call: Call, prompts: list[list[int]]) -> None:
        """Queues a request's encoded prompts; from any thread.

        Raises:
            UserError: the generator refuses one of them; none is queued.
            WorkerDied: nobody would run them.
        """
        loaded = self.loaded
        if loaded is None:
            raise WorkerDied()
        try:
            for index, prompt in enumerate(prompts):
                on_piece = partial(call.feed, index)
                call.jobs.append(loaded.generator.submit(prompt, call.wanted.sampling, call.wanted.n, on_piece))
        except BaseException:
            self._cancel_jobs(call)
            self._woken.set()
            raise
        with self._lock:
            self._calls.add(call)
        self._woken.set()
        if not self.is_alive:  # it died between the question and now, and has ended only what it knew
            self._end_all(WorkerDied())

    def cancel(self, call: Call) -> None:
        """Asks for a request's rows to be freed at the next pass border; from any thread."""
        self._cancel_jobs(call)
        self._woken.set()

    def stop(self, timeout_s: float) -> bool:
        """Ends the thread after the pass that runs; returns whether it has ended in time."""
        self._is_stopping = True
        self._woken.set()
        self._thread.join(timeout_s)
        return not self.is_alive

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self.loaded = self._load()
            self._look_at_memory()
            self._on_change()
            while not self._is_stopping:
                self._woken.clear()
                is_busy = self._run_pass()
                self._settle()
                self._look_at_memory()
                if not is_busy:
                    self._woken.wait()
        except BaseException as error:  # whatever it is: readiness has to go off, and nobody may wait for ever
            self.failure = error
        finally:
            self._end_all(WorkerDied())
            self._on_change()
            self._close()

    def _run_pass(self) -> bool:
        """One pass; False where there was nothing to do. A failure costs the requests that ran, not the service."""
        try:
            is_busy = self._generator().run_pass()
        except Exception as error:
            self.num_failed_passes += 1
            self._num_failed_in_a_row += 1
            logger.exception("a pass through the model failed; its requests are answered with an error")
            if self._num_failed_in_a_row >= _MOST_FAILED_PASSES:
                raise
            for call in self._known_calls():
                self._cancel_jobs(call)
                self._end(call, PassFailed(error))
            return True
        if is_busy:
            self._num_failed_in_a_row = 0
        return is_busy

    def _settle(self) -> None:
        """Tells the requests whose rows are done."""
        for call in self._known_calls():
            if all(job.done.is_set() for job in call.jobs):
                error = next((job.error for job in call.jobs if job.error is not None), None)
                is_known = error is None or isinstance(error, UserError)
                self._end(call, error if is_known else PassFailed(error))
                if error is not None and _is_device_lost(error):
                    raise error

    def _look_at_memory(self) -> None:
        now_s = time.monotonic()
        if self.loaded is not None and now_s - self._memory_s >= _MEMORY_EVERY_S:
            self._memory_s = now_s
            self.memory = self.loaded.memory()

    def _close(self) -> None:
        if self.loaded is None:
            return
        try:
            self.loaded.close()
        except Exception:
            logger.exception("the engine did not close")

    # -- in any thread -------------------------------------------------------------------------------------------------

    def _generator(self) -> Generator:
        if self.loaded is None:
            raise RuntimeError("no model is loaded")
        return self.loaded.generator

    def _known_calls(self) -> list[Call]:
        with self._lock:
            return list(self._calls)

    def _cancel_jobs(self, call: Call) -> None:
        for job in list(call.jobs):
            if not job.done.is_set():
                self._generator().cancel(job)

    def _end(self, call: Call, error: BaseException | None) -> None:
        with self._lock:
            self._calls.discard(call)
        call.end(error)

    def _end_all(self, error: BaseException) -> None:
        for call in self._known_calls():
            self._end(call, error)
