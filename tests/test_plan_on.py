"""``zero plan --on CARD``: what it says about a machine that is not there."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_case import write_config

from gemini.profile import HardwareProfile
from zero.cli.main import main
from zero.config.loading import load_config
from zero.forecast import Machine, _neighbours, changes, forecast, most_rows, scaled_trace
from zero.planning import DryRun, dry_run_of

Output = pytest.CaptureFixture[str]
SMALL = ("--device.memory", "2MiB")
# A machine on which the tiny model takes its time.
SLOW = HardwareProfile(
    name="slow",
    source="made up",
    h2d_bytes_per_s=1e6,
    d2h_bytes_per_s=1e6,
    both_bytes_per_s=1e6,
    host_dram_bytes_per_s=1e7,
    host_update_numel_per_s=3e5,
    device_update_numel_per_s=1e7,
    device_flops_per_s=1e9,
    device_fp32_flops_per_s=1e9,
    device_bytes_per_s=1e9,
    launch_s=0.0,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured for ``--on this`` stays here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def planned(capsys: Output, folder: Path, *words: str) -> tuple[int, str]:
    """Exit code and report."""
    code = main(["plan", write_config(folder), *words])
    return code, capsys.readouterr().out


class TestReport:
    def test_a_card_by_name(self, tmp_path: Path, capsys: Output) -> None:
        code, said = planned(capsys, tmp_path, "--on", "rtx3090", *SMALL)
        assert code == 0
        assert "on rtx3090" in said
        assert "published figures, not measured" in said
        assert re.search(r"step, predicted +[\d.e-]+ s, [\d,]+ tokens/s", said)
        assert "limited by" in said
        assert re.search(r"largest micro-batch +about \d+ x 32 tokens", said)
        table = said[said.index("smaller and larger cards") :]
        assert "rtx2060" in table, "the next larger than 2 MiB"
        assert said.rstrip().endswith("it fits")

    def test_cards_around_it(self, tmp_path: Path, capsys: Output) -> None:
        _, said = planned(capsys, tmp_path, "--on", "a100-40gb", "--device.memory", "40GiB")
        lines = said[said.index("smaller and larger cards") :].splitlines()[2:5]
        assert [line.split()[0] for line in lines] == ["rtx5090", "a100-40gb", "l40s"]
        assert "40.0 GiB" in lines[1]

    def test_this_machine_is_measured(self, tmp_path: Path, capsys: Output) -> None:
        code, said = planned(capsys, tmp_path, "--on", "this")
        assert code == 0
        assert "measured on this machine" in said
        assert "published" not in said[: said.index("smaller and larger")]

    def test_without_a_card_it_says_what_the_configs_device_would_take(self, tmp_path: Path, capsys: Output) -> None:
        code, said = planned(capsys, tmp_path)
        assert code == 0
        assert "tokens/s" in said
        assert "largest micro-batch" not in said, "the short answer stays short"

    def test_what_does_not_fit_says_what_would(self, tmp_path: Path, capsys: Output) -> None:
        code, said = planned(capsys, tmp_path, "--on", "rtx3090", "--device.memory", "900KiB")
        assert code == 2
        assert "it does not fit" in said
        assert "what would fit" in said
        assert "train.per_device_train_batch_size = 2" in said

    def test_a_host_that_is_too_small(self, tmp_path: Path, capsys: Output) -> None:
        code, said = planned(capsys, tmp_path, "--on", "h100", "--memory.host", "1MiB")
        assert code == 2
        assert "the host must hold" in said

    @pytest.mark.parametrize("words", [["--on", "rtx309"], ["--on", ""], ["--on", "H100"], ["--onn", "h100"]])
    def test_a_card_that_nobody_knows(self, words: list[str], tmp_path: Path, capsys: Output) -> None:
        assert main(["plan", write_config(tmp_path), *words]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert "did you mean" in said or "known are" in said


class TestFiles:
    def test_the_schedule_as_a_trace(self, tmp_path: Path, capsys: Output) -> None:
        path = tmp_path / "trace.json"
        assert planned(capsys, tmp_path, "--on", "rtx3090", *SMALL, "--trace", str(path))[0] == 0
        events = json.loads(path.read_text())["traceEvents"]
        names = {event["args"]["name"] for event in events if event["ph"] == "M"}
        assert {"device", "host to device", "device to host", "host update"} <= names
        spans = [event for event in events if event["ph"] == "X"]
        assert all(event["dur"] > 0 and event["ts"] >= 0 for event in spans)
        labels = {event["name"] for event in spans}
        assert any(label.startswith("forward ") for label in labels)
        assert any(label.startswith("backward ") for label in labels)
        copies = [event for event in spans if event.get("args", {}).get("bytes")]
        assert copies

    def test_the_schedule_as_a_picture(self, tmp_path: Path, capsys: Output) -> None:
        pytest.importorskip("matplotlib")
        path = tmp_path / "timeline.png"
        assert planned(capsys, tmp_path, *SMALL, "--timeline", str(path))[0] == 0
        assert path.read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize("option", ["--trace", "--timeline"])
    def test_a_file_that_cannot_be_written(self, option: str, tmp_path: Path, capsys: Output) -> None:
        pytest.importorskip("matplotlib")
        path = tmp_path / "no such folder" / "file.png"
        assert main(["plan", write_config(tmp_path), *SMALL, option, str(path)]) == 2
        assert "cannot be written" in capsys.readouterr().err


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> DryRun:
    """The tiny model, with its neighbours."""
    config = load_config(write_config(tmp_path_factory.mktemp("dry")))
    return dry_run_of(config, None, None, 1, variants=True)


class TestForecast:
    def machine(self, memory_bytes: int) -> Machine:
        """With room for everything on the host."""
        return Machine(SLOW, memory_bytes, 1 << 40)

    def test_changes_are_faster_and_the_best_comes_first(self, dry: DryRun, tmp_path: Path) -> None:
        config = load_config(write_config(tmp_path))
        now = forecast(config, dry, self.machine(3 << 20))
        found = changes(config, dry, self.machine(3 << 20), now)
        assert found
        speeds = [change.forecast.tokens_per_s for change in found]
        assert speeds == sorted(speeds, reverse=True)
        assert min(speeds) > now.tokens_per_s
        accumulating = [change for change in found if change.key == "train.gradient_accumulation_steps"]
        assert accumulating, "an update for twice the tokens, on a machine whose updates are slow"
        assert accumulating[0].forecast.num_tokens == 2 * now.num_tokens

    def test_formats_order_activations_and_disk_are_tried(self, tmp_path: Path) -> None:
        extra = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}
        config = load_config(write_config(tmp_path), {"train": extra, "precision": {"dtype": "bf16"}})
        dry = dry_run_of(config, None, None, 1, variants=True)
        slow_memory = replace(SLOW, host_dram_bytes_per_s=1e6, host_update_numel_per_s=1e6)
        machine = Machine(slow_memory, 2 << 20, 1 << 40)
        tried = {change.key: change for change in _neighbours(config, dry, machine)}
        assert {"precision.optimizer_state", "train.accumulation_order", "memory.activations"} <= tried.keys()
        assert "memory.disk" not in tried, "the host has room"
        now = forecast(config, dry, machine)
        states = [c for c in changes(config, dry, machine, now) if c.key == "precision.optimizer_state"]
        assert states, "an update that host memory limits moves fewer bytes"
        assert all(change.forecast.step_s < now.step_s for change in states)
        small = replace(machine, host_bytes=now.planned.host_peak_bytes // 2)
        assert not forecast(config, dry, small).fits
        disk = next(change for change in _neighbours(config, dry, small) if change.key == "memory.disk")
        assert disk.forecast.fits
        assert disk.forecast.planned.disk_bytes > 0

    def test_the_largest_micro_batch_fits_and_twice_as_many_rows_do_not(self, dry: DryRun, tmp_path: Path) -> None:
        folder = write_config(tmp_path)
        rows = most_rows(load_config(folder), dry, self.machine(4 << 20))
        assert rows > 4
        for times, fits in ((1, True), (2, False)):
            more = load_config(folder, {"train": {"per_device_train_batch_size": times * rows}})
            assert forecast(more, dry_run_of(more, None, None, 1), self.machine(4 << 20)).fits is fits

    def test_a_line_through_two_batches_meets_a_third(self, dry: DryRun, tmp_path: Path) -> None:
        four_times = load_config(write_config(tmp_path), {"train": {"per_device_train_batch_size": 16}})
        true = dry_run_of(four_times, None, None, 1).trace
        assert dry.double is not None
        guess = scaled_trace(dry.trace, dry.double, 4)
        assert guess.same_shape(true)
        for mine, theirs in zip(guess.moments, true.moments, strict=True):
            assert mine.non_model_peak_bytes == pytest.approx(theirs.non_model_peak_bytes, rel=0.05, abs=4096)
            assert mine.fp32_flops == pytest.approx(theirs.fp32_flops, rel=0.02)

    def test_ranks_share_the_host(self, tmp_path: Path, dry: DryRun) -> None:
        config = load_config(write_config(tmp_path))
        one, four = (forecast(config, dry, Machine(SLOW, 1 << 21, 1 << 40, n, n)) for n in (1, 4))
        assert four.num_tokens == 4 * one.num_tokens
        assert four.step_s > one.step_s

    def test_more_memory_is_never_slower(self, tmp_path: Path, dry: DryRun) -> None:
        config = load_config(write_config(tmp_path))
        times = [forecast(config, dry, self.machine(num_bytes)).step_s for num_bytes in (2 << 20, 3 << 20, 8 << 20)]
        assert times == sorted(times, reverse=True)
        assert times[-1] < times[0]
