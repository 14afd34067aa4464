"""What goes wrong with checkpoints."""

from __future__ import annotations

from zero.errors import UserError


class CheckpointError(UserError):
    """A checkpoint cannot be written, read or used; the message names the file and says what to do."""


class DamagedError(Exception):
    """A file of a checkpoint is not what its manifest says, or what its format allows. Users see it as a line."""
