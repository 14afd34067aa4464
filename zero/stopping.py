"""A run asked to stop by its scheduler: it saves and leaves in good order."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = ("SIGTERM", "SIGUSR1")


class StopRequest:
    """Whether a signal has asked this process to stop.

    Attributes:
        signal_name: of the signal; None while none has come.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal_name = signal.Signals(number).name

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Inside, SIGTERM and SIGUSR1 are noted and do nothing else; outside they are what they were."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread may handle signals
            return
        numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
