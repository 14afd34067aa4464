"""What every test runs under."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums over threads may differ in their last bit, and the machines that run these tests have few cores."""
    torch.set_num_threads(1)
