"""Passes of several threads: one after the other, since they share what is on the device."""

from __future__ import annotations

import sys
import threading
import time
from types import FrameType

from torch import nn

from zero.errors import UserError

_PAUSE_S = 1e-3


class OneAtATime:
    """Whose turn it is to run a model.

    A thread whose pass was broken off by Ctrl-C, of which torch tells nobody, has no turn any more: so it is asked what
    the thread is doing, not what it has said.

    Args:
        root: the model.
        waits: a thread waits until another's pass is over; else it is refused, because a backward belongs to the pass.
    """

    def __init__(self, root: nn.Module, waits: bool) -> None:
        self._root = root
        self._waits = waits
        self._lock = threading.Lock()
        self._thread: int | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the last turn was this thread's."""
        return self._thread == threading.get_ident()

    def take(self) -> None:
        """This thread is about to run the model.

        Raises:
            UserError: another is running it, and waiting makes no sense.
        """
        while not self._try():
            if not self._waits:
                raise UserError(
                    "another thread is running the model: one forward and backward at a time; use a lock around them"
                )
            time.sleep(_PAUSE_S)

    def _try(self) -> bool:
        with self._lock:
            if self._thread is not None and not self.is_ours and self._is_running(self._thread):
                return False
            self._thread = threading.get_ident()
            return True

    def _is_running(self, thread: int) -> bool:
        frame: FrameType | None = sys._current_frames().get(thread)
        while frame is not None:
            if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is self._root:
                return True
            frame = frame.f_back
        return False
