"""The memory-map picture."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from report_samples import GIB, MIB

from gemini.device import DeviceMemory
from gemini.store import Tier
from gemini.trace import Moment
from zero.errors import UserError
from zero.report.memory_map import MemorySample, draw_memory_map
from zero.report.recorder import StepRecorder


class TestMemoryMap:
    def samples(self, num_units: int = 4, **device: int) -> list[MemorySample]:
        samples = []
        for phase in ("forward", "backward", "step"):
            for unit in range(num_units):
                held = {"parameters": MIB, "COMPUTE": MIB, **device} if phase != "step" else {"parameters": MIB}
                host = {"parameters": 8 * MIB, "optimizer": 16 * MIB}
                samples.append(MemorySample(len(samples), f"block {unit}", phase, held, unit * MIB // 2, host))
        return samples

    def pixels(self, path: Path) -> np.ndarray[Any, Any]:
        from PIL import Image

        return np.asarray(Image.open(path).convert("RGB"))

    def is_colour(self, path: Path, colour: str) -> np.ndarray[Any, Any]:
        """Which pixels have that colour, up to rounding."""
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        return np.abs(self.pixels(path).astype(int) - wanted).max(axis=2) <= 2

    def has_colour(self, path: Path, colour: str) -> bool:
        return bool(self.is_colour(path, colour).sum() > 50)

    def test_the_picture_is_a_png_that_shows_the_capacity_line_and_the_states(self, tmp_path: Path) -> None:
        path = draw_memory_map(
            self.samples(hold_after_forward=MIB),
            tmp_path / "deep" / "map.png",
            capacity_bytes=6 * MIB,
            predicted_peak_bytes=5 * MIB,
            title="$a_b$ [x]",
        )
        assert path.read_bytes().startswith(b"\x89PNG")
        height, width, _ = self.pixels(path).shape
        assert width > 1000 < height + 300
        assert self.is_colour(path, "#B00020").sum(axis=1).max() > 0.5 * width, "no capacity line"
        for colour in ("#0072B2", "#56B4E9", "#0B3C5D", "#CC79A7"):
            assert self.has_colour(path, colour), colour
        assert not self.has_colour(path, "#D55E00"), "a state that never held bytes was drawn"

    def test_a_capacity_far_above_the_peak_does_not_flatten_the_picture(self, tmp_path: Path) -> None:
        near = draw_memory_map(self.samples(), tmp_path / "near.png", capacity_bytes=5 * MIB)
        far = draw_memory_map(self.samples(), tmp_path / "far.png", capacity_bytes=24 * GIB)
        assert self.is_colour(far, "#0072B2").sum() > 0.7 * self.is_colour(near, "#0072B2").sum()

    @pytest.mark.parametrize("num_units", [1, 200])
    def test_one_unit_and_very_many(self, tmp_path: Path, num_units: int) -> None:
        path = draw_memory_map(self.samples(num_units), tmp_path / "map.png", capacity_bytes=None)
        assert self.pixels(path).shape[1] < 3000

    def test_nothing_on_the_device_unknown_kinds_and_disk(self, tmp_path: Path) -> None:
        empty = [MemorySample(0, "block 0", "forward", {}, 0)]
        assert draw_memory_map(empty, tmp_path / "empty.png", capacity_bytes=MIB).exists()
        odd = [MemorySample(0, "block 0", "other", {"surprise": MIB}, 0, {"disk": GIB, "parameters": MIB})]
        assert draw_memory_map(odd, tmp_path / "odd.png").exists()

    def test_no_samples_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="at least one moment"):
            draw_memory_map([], tmp_path / "map.png")

    def test_without_matplotlib_the_message_says_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(UserError, match="pip install matplotlib"):
            draw_memory_map(self.samples(), tmp_path / "map.png")


def test_no_sample_of_a_step_is_above_what_was_there() -> None:
    """Activations may have been highest before the chunk came that is there at the end: their sum was never there."""
    there = DeviceMemory(model_data_bytes=30, non_model_bytes=1, peak_bytes=32, non_model_peak_bytes=20)
    manager: Any = SimpleNamespace(
        device=SimpleNamespace(memory=lambda: there),
        store=SimpleNamespace(
            kinds=lambda tier: {"parameters": 30} if tier is Tier.DEVICE else {}, tier_bytes=lambda _: 30
        ),
        gathered_by_state=dict,
    )
    recorder = StepRecorder(manager)
    recorder.moment_ended(Moment("block 0", "forward", non_model_peak_bytes=20))
    (sample,) = recorder.samples
    assert sum(sample.device_bytes.values()) + sample.non_model_bytes == 32
