"""Resumable checkpoints: every byte of a training state, exact, verified, written so that no crash can lose the last.

A checkpoint is a folder ``step-00000012``:

- ``manifest.json``: run, step, ranks; length and SHA-256 of every file; file, key, shape and slice of every tensor;
- ``state.json``: everything that is no large tensor and the same on all ranks;
- ``rank-00000.json`` ...: what each rank has of its own: its random generators;
- ``tensors-r00000-00000.safetensors`` ...: what a rank holds of parameters, optimizer states and buffers;
- ``model/``: config and tokenizer, for an export without the model.
"""

from __future__ import annotations

from zero.checkpoint.background import BackgroundSaves
from zero.checkpoint.export import export
from zero.checkpoint.finding import choose, find_latest, verify
from zero.checkpoint.loading import LoadedState, load_checkpoint
from zero.checkpoint.problems import CheckpointError
from zero.checkpoint.saving import save_checkpoint

__all__ = [
    "BackgroundSaves",
    "CheckpointError",
    "LoadedState",
    "choose",
    "export",
    "find_latest",
    "load_checkpoint",
    "save_checkpoint",
    "verify",
]
