"""A run killed at random moments, over and over, ends with the weights of the run that was never killed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import try_ranks
from tests.test_stop_and_go import _config


def live(folder: str, num_ranks: int, life_s: float | None) -> bool:
    """One life of a run; it is killed after so long, wherever it is."""
    from zero.config.loading import load_config
    from zero.trainer import Trainer

    if life_s is not None:
        threading.Timer(life_s, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    config: dict[str, Any] = _config(Path(folder), 1, 0, num_ranks, 20, save_total_limit=2)
    config["parallel"]["timeout"] = 10
    Trainer(load_config(config)).run()
    return True


def _weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("num_ranks", "num_kills"),
    [(2, 30), (1, 105)],
)
@pytest.mark.full
@pytest.mark.timeout(3000)
def test_killed_over_and_over(
    num_ranks: int, num_kills: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    began_s = time.monotonic()
    assert all(end.well for end in try_ranks(live, num_ranks, str(whole), num_ranks, None, own_group=num_ranks > 1))
    life_s = time.monotonic() - began_s
    rng, killed, finished = random.Random(5), 0, 0
    while killed < num_kills:
        ended = try_ranks(
            live, num_ranks, str(broken), num_ranks, rng.uniform(0.2, 0.6 * life_s), own_group=num_ranks > 1
        )
        killed += not all(end.well for end in ended)
        if (broken / "summary.json").exists():  # it came to the end in spite of all: that must be right, and once more
            assert _weights(broken) == _weights(whole)
            finished += 1
            broken.rename(tmp_path / f"finished-{finished}")
    assert all(end.well for end in try_ranks(live, num_ranks, str(broken), num_ranks, None, own_group=num_ranks > 1))
    assert _weights(broken) == _weights(whole)
    with capsys.disabled():
        print(f"\n{killed} kills of {num_ranks} ranks, {finished + 1} whole runs, all with the same weights")
