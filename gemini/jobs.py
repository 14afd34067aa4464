"""Work on the host that runs beside the program, such as the update of one chunk.

Whoever queues a job keeps it, and waits for it before touching what it works on. Who may run when is the device's to
say (:meth:`gemini.device.Device.host_queue`): threads beside an accelerator, the program itself where computation needs
the same cores, and on the simulated device as late as possible, so that a missing wait is a wrong number every time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from gemini.profile import HostUpdate

if TYPE_CHECKING:
    from gemini.device import Event


class Job(ABC):
    """A piece of work that has been queued."""

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether waiting for it would take no time."""

    @abstractmethod
    def wait(self) -> None:
        """Returns once the work is done; may be called again.

        Raises:
            Exception: what the work raised, to everyone who waits.
        """

    def withdraw(self) -> bool:
        """Takes the work back if it has not begun: then it never will. Of several, those queued last come first."""
        return False


class HostQueue(ABC):
    """Takes jobs in an order, and begins them in that order.

    Attributes:
        runs_beside: the program goes on while they run.
        num_workers: jobs that run at a time.
    """

    runs_beside = True
    num_workers = 1

    @abstractmethod
    def submit(self, work: Callable[[], None], update: HostUpdate | None = None, after: Sequence[Event] = ()) -> Job:
        """Queues ``work``. What it reads and writes is nobody else's until the job has been waited for.

        Args:
            work: to be done.
            update: that it is, for a device that reckons what that takes.
            after: what the work itself waits for, likewise.
        """

    def close(self) -> None:  # noqa: B027 - only threads have an end
        """Ends what runs the jobs. All of them have been waited for."""


class _Done(Job):
    is_done = True

    def wait(self) -> None:
        """Nothing is left to do."""


DONE: Job = _Done()


class InlineQueue(HostQueue):
    """Runs each job when it is queued; an error is the caller's at once."""

    runs_beside = False

    def submit(self, work: Callable[[], None], update: HostUpdate | None = None, after: Sequence[Event] = ()) -> Job:
        """Runs ``work`` now."""
        del update, after
        work()
        return DONE


class _ThreadJob(Job):
    def __init__(self, future: Future[None]) -> None:
        self._future = future

    @property
    def is_done(self) -> bool:
        """Whether its thread has come to the end of it."""
        return self._future.done()

    def wait(self) -> None:
        """Waits for the thread that runs it."""
        self._future.result()

    def withdraw(self) -> bool:
        """Unless a thread has taken it."""
        return self._future.cancel()


class ThreadQueue(HostQueue):
    """Runs jobs on threads of this process, which live until the queue is closed.

    Args:
        num_workers: jobs that run at a time, at least 1.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._pool = ThreadPoolExecutor(num_workers, "zero-update")

    def submit(self, work: Callable[[], None], update: HostUpdate | None = None, after: Sequence[Event] = ()) -> Job:
        """Queues ``work`` for the next thread that is free."""
        del update, after
        return _ThreadJob(self._pool.submit(work))

    def close(self) -> None:
        """Waits for what runs; what has not begun never will."""
        self._pool.shutdown(wait=True, cancel_futures=True)
