"""What every test runs under."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from gemini import simulated

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test asks the network

pytest.register_assert_rewrite("tests.reference", "tests.exactness")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums over threads may differ in their last bit, and the machines that run these tests have few cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_device_waits_for_a_backward() -> Iterator[None]:
    """An engine that a failed test left behind must not count the backward passes of the tests after it."""
    yield
    for device in list(simulated._BackwardWatch._devices):
        device.expects_backward = False
