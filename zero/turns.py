"""Threads that take turns: one runs at a time, and each stops where it says so.

Threads and not coroutines, because a model's forward cannot be stopped in the middle otherwise, and because what autograd
and the dispatcher know of a running forward (grad mode, saved-tensor hooks, modes) belongs to the thread.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator

import torch


class Abandoned(BaseException):
    """Raised where a turn would begin, to end a thread whose work nobody wants any more."""


class Turns:
    """A thread that runs only while its maker waits for it.

    Args:
        work: runs in the thread, and calls :meth:`stop` where others may go on.
        before: called in the thread whenever a turn begins.
        after: likewise when one ends.
    """

    def __init__(self, work: Callable[[], None], before: Callable[[], None], after: Callable[[], None]) -> None:
        self._work = work
        self._before = before
        self._after = after
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._abandoned = self._has_ended = False
        self._error: BaseException | None = None
        setting = _Setting()
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._main, setting), name="micro-batch", daemon=True)
        self._thread.start()

    # -- in the maker's thread ---------------------------------------------------------------------------------------

    def take(self) -> bool:
        """One turn; True if the work is over.

        Raises:
            BaseException: what the work raised.
        """
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # whose traceback refers to this frame
        return self._has_ended

    def end(self) -> None:
        """Ends the thread, in the middle of its work if need be, and waits for it. A Ctrl-C meanwhile waits as well.

        Of several that may be in the middle of a turn, one that was interrupted must be ended first.
        """
        interrupt: KeyboardInterrupt | None = None
        self._abandoned = True
        self._go.release()
        while self._thread.is_alive():
            try:
                self._thread.join()
            except KeyboardInterrupt as error:
                interrupt = error
        self._error = None
        self._work = self._before = self._after = _nothing  # which refer to their owner, and it to this object
        if interrupt is not None:
            raise interrupt

    # -- in the thread -----------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """The turn ends here; returns when the next begins."""
        self._after()
        self._done.release()
        self._go.acquire()
        self._before()
        if self._abandoned:
            raise Abandoned

    def _main(self, setting: _Setting) -> None:
        try:
            with setting.taken_over():
                self._go.acquire()
                self._before()
                try:
                    if not self._abandoned:
                        self._work()
                finally:
                    self._after()
        except Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._has_ended = True
            self._done.release()


def _nothing() -> None:
    """Nothing is left to do."""


class _Setting:
    """What torch keeps per thread, as the present thread has it."""

    def __init__(self) -> None:
        self._fake = torch._guards.detect_fake_mode()
        self._grad = torch.is_grad_enabled()
        self._stream: torch.Stream | None = None
        kinds = {"cpu"}
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is not None:
            kinds.add(accelerator.type)
            self._stream = torch.accelerator.current_stream()
        self._casts = {kind: torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}

    @contextlib.contextmanager
    def taken_over(self) -> Iterator[None]:
        """The same in another thread."""
        with contextlib.ExitStack() as stack:
            if self._stream is not None:
                torch.accelerator.set_device_index(self._stream.device_index)
                torch.accelerator.set_stream(self._stream)
            for kind, dtype in self._casts.items():  # without the cache: a cast would be shared by several graphs
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            if self._fake is not None:
                stack.enter_context(self._fake)
            stack.enter_context(torch.set_grad_enabled(self._grad))
            yield
