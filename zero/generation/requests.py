"""Requests from their arrival to their end, and what they are told."""

from __future__ import annotations

import logging
import threading

from zero.generation.jobs import Job
from zero.generation.pieces import Piece
from zero.generation.rows import Row

logger = logging.getLogger("zero")


class Requests:
    """Requests that have not ended. They come and are cancelled in any thread; all else is the passes' thread's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrived: list[tuple[Job, list[Row]]] = []
        self._unwanted: list[Job] = []
        self._rows: dict[Job, list[Row]] = {}

    # -- in any thread -----------------------------------------------------------------------------------------------

    def arrive(self, job: Job, rows: list[Row]) -> None:
        """A request, and a row for each of its choices."""
        with self._lock:
            self._arrived.append((job, rows))

    def cancel(self, job: Job) -> None:
        """Nobody wants it any more."""
        with self._lock:
            self._unwanted.append(job)

    @property
    def num_arrived(self) -> int:
        """Choices that no pass border has seen yet."""
        with self._lock:
            return sum(len(rows) for _, rows in self._arrived)

    # -- in the passes' thread ---------------------------------------------------------------------------------------

    def take_in(self) -> list[Row]:
        """At a pass border: rows that have arrived; those that are cancelled are ended."""
        with self._lock:
            arrived, self._arrived = self._arrived, []
            unwanted, self._unwanted = self._unwanted, []
        self._rows.update(arrived)
        for job in unwanted:
            self.end(job)
        return [row for _, rows in arrived for row in rows if row.finish_reason is None]

    def end_all(self) -> None:
        """Cancels everything."""
        self.take_in()
        for job in list(self._rows):
            self.end(job)

    def hand_out(self, row: Row, piece: Piece) -> None:
        """What a pass has added to a row."""
        job = row.job
        try:
            job.add(piece)
        except Exception as error:
            logger.debug("a request's own function failed", exc_info=True)
            self.end(job, error)
            return
        if all(other.finish_reason is not None for other in self._rows.get(job, ())):
            self._rows.pop(job, None)
            job.settle()

    def end(self, job: Job, error: BaseException | None = None) -> None:
        """It ends before its time: its rows are marked, and leave at the next border."""
        rows = self._rows.pop(job, None)
        if rows is None:
            return
        job.error = error
        for row in rows:
            if row.finish_reason is not None:
                continue
            try:
                job.add(row.cancel())
            except Exception as raised:
                job.error = job.error or raised
        job.settle()
