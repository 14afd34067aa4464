"""The trace of a long window from those of two short ones: what moments need grows by the same for each micro-batch."""

from __future__ import annotations

from dataclasses import fields, replace

from gemini.trace import Moment, Trace, window_shape

SHORT = 3
"""Micro-batches of the shorter window: a first one, one in the middle, and a last one; the other has one more."""

_KINDS = {field.name: field.type for field in fields(Moment)}
_FIGURES = [name for name, kind in _KINDS.items() if kind in ("int", "float")]


def longer_window(short: Trace, longer: Trace, num_micro_batches: int) -> Trace | None:
    """The trace of a window of that many micro-batches of the same shape.

    Args:
        short: of a window of :data:`SHORT`.
        longer: of one more.
        num_micro_batches: more than that.

    Returns:
        None if the two do not go through the same stages: micro-batches that are not alike.
    """
    moments: list[Moment] = []
    position = 0  # in moments of one micro-batch
    num_each = len(longer.moments) - len(short.moments)
    while position < num_each:
        stage = _stage(short.moments[SHORT * position :], longer.moments[(SHORT + 1) * position :])
        if stage is None:
            return None
        for index in range(num_micro_batches):
            moments += [
                _moment(short.moments, longer.moments, position, stage, offset, index, num_micro_batches)
                for offset in range(stage)
            ]
        position += stage
    if len(short.moments) != SHORT * num_each or not moments:
        return None
    shape = window_shape([longer.batch_shapes[0][2:]] * num_micro_batches)
    return replace(longer, moments=moments, batch_shapes=[shape])


def _stage(short: list[Moment], longer: list[Moment]) -> int | None:
    """Moments of each micro-batch in the stage that begins here: as few as repeat themselves for all."""
    mine, theirs = [moment.key for moment in short], [moment.key for moment in longer]
    for length in range(1, len(mine) // SHORT + 1):
        part = mine[:length]
        if mine[: SHORT * length] == part * SHORT and theirs[: (SHORT + 1) * length] == part * (SHORT + 1):
            return length
    return None


def _moment(
    short: list[Moment], longer: list[Moment], position: int, stage: int, offset: int, index: int, num: int
) -> Moment:
    """One moment of micro-batch ``index``: the first and the last are not like those between."""
    mine = [short[SHORT * position + stage * i + offset] for i in range(SHORT)]
    theirs = [longer[(SHORT + 1) * position + stage * i + offset] for i in range(SHORT + 1)]
    here = 0 if index == 0 else 2 if index == num - 1 else 1
    like = theirs[3 if here == 2 else here]
    figures = {}
    for name in _FIGURES:
        at = getattr(mine[here], name)
        more = getattr(like, name) - at  # one micro-batch more in the window
        value = at + (num - SHORT) * more
        if here == 1:  # and as many more before this one
            value += (index - 1) * (getattr(theirs[2], name) - getattr(theirs[1], name))
        figures[name] = max(0, value)
    return replace(like, **figures)
