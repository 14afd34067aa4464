"""The random generators that a training step draws from, as JSON."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch

from zero.checkpoint.codec import JSON, decode, dump, encode
from zero.checkpoint.problems import DamagedError


def rng_state(device: torch.device) -> JSON:
    """States of torch's, Python's and numpy's global generators, and of the accelerator's."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": (version, list(words), gauss),
        "numpy": _plain(np.random.get_state(legacy=False)),
        "device_type": device.type,
        "device": None,
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return encode(state, "random generators")


def _plain(state: Any) -> Any:
    """numpy's nested dictionary with arrays as lists."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        return [int(word) for word in state]
    return state.item() if isinstance(state, np.generic) else state


def restore_rng(state: JSON, device: torch.device) -> list[str]:
    """Puts all generators back to where :func:`rng_state` found them.

    Returns:
        What could not be restored, a line each.

    Raises:
        DamagedError: the state is none; generators may have been set in part.
    """
    values = decode(state)
    try:
        version, words, gauss = values["python"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(values["numpy"])
        torch.set_rng_state(values["torch"])
        saved_type, saved = values["device_type"], values["device"]
        if saved is not None and saved_type == device.type:
            torch.get_device_module(device).set_rng_state(saved, device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedError(f"the states of the random generators cannot be used: {error}") from error
    if saved_type == device.type:
        return []
    return [f"the checkpoint was written on {saved_type}, this run computes on {device.type}: dropout draws anew"]


def derive_rng(state: JSON, rank: int, size: int) -> None:
    """Seeds all generators of one rank for a number of ranks other than that which wrote the checkpoint.

    The seed is a hash of the state that rank 0 had, of the rank and of the number of ranks: the same checkpoint on the
    same number of ranks always goes on the same way, and no two ranks draw alike.

    Args:
        state: rank 0's, as :func:`rng_state` gave it.
        rank: this one.
        size: number of ranks now.
    """
    seed = int.from_bytes(hashlib.sha256(dump([state, rank, size])).digest()[:8], "little")
    torch.manual_seed(seed >> 1)  # of the accelerator too
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
