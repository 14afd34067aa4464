"""``metrics.jsonl`` and the trackers."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from report_samples import MIB, make_record

from zero.errors import UserError
from zero.report import trackers as trackers_module
from zero.report.metrics import MetricsWriter, read_metrics
from zero.report.trackers import check_trackers, flatten_config, start_trackers


class TestMetrics:
    def test_lines_are_strict_json_and_come_back(self, tmp_path: Path) -> None:
        with MetricsWriter(tmp_path / "run") as writer:
            writer.log_step(make_record(1))
            writer.log({"eval": {"loss": torch.tensor(2.5)}, "count": np.int64(3), "path": tmp_path}, step=1)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[0])["grad_norm"] == 1.2345
        first, second = read_metrics(tmp_path / "run")
        assert first["device_peak_bytes"] == int(3.9 * MIB)
        assert first["skipped"] is False
        assert second == {"step": 1, "eval": {"loss": 2.5}, "count": 3, "path": str(tmp_path), "finite": True}

    @pytest.mark.parametrize(
        "bad",
        [float("nan"), float("inf"), -float("inf"), np.float32("nan"), torch.tensor(float("inf")), [1.0, float("nan")]],
    )
    def test_what_is_not_finite_is_null_and_flagged(self, tmp_path: Path, bad: Any) -> None:
        with MetricsWriter(tmp_path) as writer:
            writer.log({"loss": bad, "lr": 0.1}, step=1)
        text = (tmp_path / "metrics.jsonl").read_text()
        assert "NaN" not in text
        assert "Infinity" not in text
        (line,) = read_metrics(tmp_path)
        assert line["loss"] in (None, [1.0, None])
        assert line["finite"] is False
        assert line["lr"] == 0.1

    def test_every_line_is_there_before_the_writer_is_closed(self, tmp_path: Path) -> None:
        writer = MetricsWriter(tmp_path)
        writer.log({"loss": 1.0}, step=1)
        assert len(read_metrics(tmp_path)) == 1
        writer.close()
        writer.close()

    @pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2}', b"\xff\xfe"])
    def test_a_torn_last_line_is_dropped_by_the_reader_and_cut_by_the_next_writer(
        self, tmp_path: Path, torn: bytes
    ) -> None:
        with MetricsWriter(tmp_path) as writer:
            writer.log({"loss": 1.0}, step=1)
        file = tmp_path / "metrics.jsonl"
        file.write_bytes(file.read_bytes() + torn)
        assert [line["step"] for line in read_metrics(file)] == [1]
        with MetricsWriter(tmp_path) as writer:
            writer.log({"loss": 0.5}, step=2)
        assert [(line["step"], line["loss"]) for line in read_metrics(file)] == [(1, 1.0), (2, 0.5)]

    def test_damage_in_the_middle_is_named_by_file_and_line(self, tmp_path: Path) -> None:
        file = tmp_path / "metrics.jsonl"
        file.write_text('{"step": 1}\nbroken\n{"step": 3}\n')
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not valid JSON"):
            read_metrics(file)
        file.write_text('{"step": 1}\n[1]\n')
        with pytest.raises(ValueError, match="line 2: a JSON object is expected, got list"):
            read_metrics(file)

    def test_a_full_disk_leaves_whole_lines_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        writer = MetricsWriter(tmp_path)
        writer.log({"loss": 1.0}, step=1)
        real_write, calls = os.write, []

        def short_write(descriptor: int, data: bytes) -> int:
            calls.append(data)
            if len(calls) > 1:
                raise OSError(28, "No space left on device")
            return real_write(descriptor, data[:5])

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", short_write)
            with pytest.raises(OSError, match="No space left"):
                writer.log({"loss": 2.0}, step=2)
        writer.log({"loss": 3.0}, step=3)
        writer.close()
        assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]

    def test_other_ranks_write_nothing(self, tmp_path: Path) -> None:
        with MetricsWriter(tmp_path / "run", rank=1, trackers=["tensorboard"]) as writer:
            writer.log_step(make_record())
            writer.log({"loss": 1.0}, step=1)
        assert not (tmp_path / "run").exists()


class TestTrackers:
    @pytest.fixture(autouse=True)
    def _fresh_process_state(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Each test starts without accelerate's state and variables, and leaves what it found."""
        from accelerate import PartialState

        saved = dict(PartialState._shared_state)
        PartialState._shared_state.clear()
        for name in trackers_module._RANK_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        yield
        PartialState._shared_state.clear()
        PartialState._shared_state.update(saved)

    def scalars(self, folder: Path) -> dict[str, list[tuple[int, float]]]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder))
        events.Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    def test_tensorboard_gets_the_finite_numbers(self, tmp_path: Path) -> None:
        config = {"train": {"max_steps": 2, "resume": None}, "optimizer": {"betas": [0.9, 0.95]}}
        with MetricsWriter(tmp_path / "run7", trackers=["tensorboard", "tensorboard"], config=config) as writer:
            writer.log_step(make_record(1))
            writer.log_step(make_record(2, loss=float("nan"), skipped=True))
            writer.log({"eval/perplexity": 12.5, "note": "text"}, step=2)
        curves = self.scalars(tmp_path / "run7" / "tensorboard" / "run7")
        assert curves["train/loss"] == [(1, pytest.approx(3.21446))]
        assert [step for step, _ in curves["train/lr"]] == [1, 2]
        assert curves["train/skipped"] == [(1, 0.0), (2, 1.0)]
        assert curves["eval/perplexity"] == [(2, 12.5)]
        assert "train/step" not in curves

    def test_unknown_and_missing_trackers_are_refused_together_before_anything_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(trackers_module, "_is_available", lambda name: name == "tensorboard")
        with pytest.raises(UserError) as caught:
            MetricsWriter(tmp_path / "run", trackers=["tensorboard", "wandb", "tenserboard"])
        assert "pip install wandb" in str(caught.value)
        assert "unknown tracker 'tenserboard'; allowed: tensorboard, wandb, trackio, mlflow" in str(caught.value)
        assert not (tmp_path / "run").exists()

    def test_availability_is_asked_of_accelerate(self) -> None:
        check_trackers(["tensorboard"])
        from accelerate.tracking import get_available_trackers

        for name in trackers_module.TRACKERS:
            assert trackers_module._is_available(name) == (name in map(str, get_available_trackers()))

    def test_a_tracker_that_does_not_start_is_a_user_error(self, tmp_path: Path) -> None:
        (tmp_path / "tensorboard").write_text("a file in the way")
        with pytest.raises(UserError, match="tracker 'tensorboard' does not start: .*leave it out"):
            MetricsWriter(tmp_path, trackers=["tensorboard"])

    def test_a_tracker_that_fails_is_dropped_and_training_goes_on(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        writer = MetricsWriter(tmp_path, trackers=["tensorboard"])
        (tracker,) = writer._trackers
        calls = []

        def fail(values: dict[str, Any], step: int | None = None) -> None:
            calls.append(step)
            raise ConnectionError("the network is gone")

        tracker.log = fail  # type: ignore[method-assign]
        with caplog.at_level(logging.WARNING, logger="zero"):
            writer.log({"loss": 1.0}, step=1)
            writer.log({"loss": 2.0}, step=2)
        writer.close()
        assert calls == [1]
        assert "tracker tensorboard failed" in caplog.text
        assert len(read_metrics(tmp_path)) == 2

    def test_one_process_under_torchrun_opens_no_process_group(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            monkeypatch.setenv(name, value)
        num_threads = torch.get_num_threads()
        before = dict(os.environ)
        trackers_module._ensure_process_state()
        assert not torch.distributed.is_initialized()
        assert dict(os.environ) == before
        assert torch.get_num_threads() == num_threads

    def test_an_existing_process_group_is_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from accelerate import PartialState

        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        num_threads = torch.get_num_threads()
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            before = dict(os.environ)
            trackers_module._ensure_process_state()
            assert PartialState().is_main_process
            assert dict(os.environ) == before
            assert torch.get_num_threads() == num_threads
        finally:
            torch.distributed.destroy_process_group()

    def test_several_ranks_without_a_process_group_are_an_error_not_a_hang(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(RuntimeError, match="process group must be initialised"):
            start_trackers(["tensorboard"], logging_dir=tmp_path, project="p", run_name="r", config=None)

    def test_configs_are_flattened_to_what_trackers_take(self) -> None:
        config = {"a": {"b": 1, "c": None, "d": {"e": True}}, "f": [1, 2], "g": Path("x")}
        assert flatten_config(config) == {"a.b": 1, "a.d.e": True, "f": "[1, 2]", "g": "x"}
