"""Where log messages go: stderr, so that stdout holds results only."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

LOGGER_NAMES = ("zero", "gemini")


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at the time of writing.

    A live display replaces ``sys.stderr`` while it runs, so that messages appear above it instead of tearing it; a
    handler that keeps the stream it was made with would write around it.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AttributeError("the stream of this handler is always sys.stderr")


def configure_logging(level: int | str = "INFO", *, rank: int = 0, world: int = 1) -> None:
    """Send the project's log messages to stderr; calling it again replaces the former settings.

    Args:
        level: Lowest level shown on rank 0. Other ranks show warnings and errors only, unless ``level`` is DEBUG.
        rank: This process.
        world: Number of processes; with several, each message names its rank.
    """
    threshold = logging.getLevelNamesMapping()[level.upper()] if isinstance(level, str) else level
    if rank != 0 and threshold > logging.DEBUG:
        threshold = max(threshold, logging.WARNING)
    prefix = f"[rank {rank}] " if world > 1 else ""
    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter(f"{prefix}%(levelname)s: %(message)s"))
    for name in LOGGER_NAMES:
        logger = logging.getLogger(name)
        for old in [h for h in logger.handlers if isinstance(h, _CurrentStderr)]:
            logger.removeHandler(old)
        logger.addHandler(handler)
        logger.setLevel(threshold)
