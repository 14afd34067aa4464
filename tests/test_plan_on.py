"""``zero plan --on CARD``: what it says about a machine that is not there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_case import write_config

from gemini.clock import Span
from gemini.profile import HardwareProfile
from zero.cli.main import main
from zero.cli.plan import Wish, _machine
from zero.config.loading import load_config
from zero.forecast import Machine, _neighbours, changes, forecast, most_rows, policy_of, scaled_trace, schedule_of
from zero.planning import DryRun, dry_run_of, plan_run

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

    @pytest.mark.full
    def test_a_reader_who_leaves_early_sees_no_traceback(self, tmp_path: Path) -> None:
        words = [sys.executable, "-m", "zero", "plan", write_config(tmp_path), "--on", "rtx3090", *SMALL]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().endswith("on rtx3090\n"), "said before what would help is reckoned"
        process.stdout.close()
        assert process.stderr is not None
        assert "Error" not in process.stderr.read()
        assert process.wait(timeout=120) == 1

    def test_a_cap_is_named_as_such(self, tmp_path: Path, capsys: Output) -> None:
        assert (
            "device capacity                     2.00 MiB given as device.memory"
            in planned(capsys, tmp_path, "--on", "rtx3090", *SMALL)[1]
        )

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

    @pytest.mark.parametrize("words", [["--parallel.data", "2"], ["--memory.host", "1MiB", "--memory.disk", "DISK"]])
    def test_a_picture_with_ranks_and_with_a_disk(self, words: list[str], tmp_path: Path, capsys: Output) -> None:
        pytest.importorskip("matplotlib")
        path = tmp_path / "timeline.png"
        words = [str(tmp_path / word) if word == "DISK" else word for word in words]
        assert planned(capsys, tmp_path, *SMALL, *words, "--timeline", str(path))[0] == 0
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

    @pytest.mark.parametrize("early", ["auto", True])
    @pytest.mark.parametrize("device", [{"type": "cpu", "memory": "null"}, {"type": "simulated", "memory": "2MiB"}])
    def test_without_a_card_it_is_planned_as_the_run_will_be(
        self, device: dict[str, str], early: Any, tmp_path: Path
    ) -> None:
        from zero.config.loading import for_trainer
        from zero.setup import make_device

        config = load_config(
            write_config(tmp_path), {"device": device, "optimizer": {"early": early}, "memory": {"host": "1GiB"}}
        )
        own = make_device(config)
        machine, _ = _machine(config, Wish())
        dry = dry_run_of(for_trainer(config), None, None, 1)
        policy = policy_of(config, machine, dry)
        assert policy.name == ("cuda" if own.is_host else "auto")
        assert policy.run.has_early_updates == (early is True and not own.is_host)
        want, got = plan_run(config, own).require(), forecast(for_trainer(config), dry, machine).planned.require()
        own.close()
        assert got.placements == want.placements
        assert got.predicted_device_peak_bytes == want.predicted_device_peak_bytes
        assert got.predicted_step_s == want.predicted_step_s

    def test_the_disk_of_this_machine_counts_for_no_other(
        self, dry: DryRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("zero.host_room.shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
        config = load_config(write_config(tmp_path), {"memory": {"disk": str(tmp_path)}})
        there = replace(self.machine(3 << 20), host_bytes=1 << 20)
        assert forecast(config, dry, there).fits
        here = forecast(config, dry, replace(there, is_here=True))
        assert "must go to disk" in str(here.planned.refusal)

    def test_ranks_share_what_was_measured_of_one(self) -> None:
        measured = replace(SLOW, measured=True)
        assert Machine(measured, 1 << 21, 1 << 40, 1, 1).shared_profile == measured
        four = Machine(measured, 1 << 21, 1 << 40, 4, 4).shared_profile
        assert four.host_update_numel_per_s == measured.host_update_numel_per_s / 4

    def test_a_forecast_for_one_device_leaves_another_as_it_was(self, dry: DryRun, tmp_path: Path) -> None:
        config = load_config(write_config(tmp_path))
        one = forecast(config, dry, self.machine(3 << 20))
        before = one.planned.dry.trace.step_peak_bytes
        assert before > 0
        assert forecast(config, dry, self.machine(1 << 40)).planned.dry.trace.step_peak_bytes > before
        assert one.planned.dry.trace.step_peak_bytes == before
        assert dry.trace.step_peak_bytes == 0

    @pytest.mark.parametrize("steps", [1, 2, 8])
    def test_one_step_is_drawn(self, steps: int, dry: DryRun, tmp_path: Path) -> None:
        """With updates inside backward, too, for which a step before it is walked through."""
        train = {"gradient_accumulation_steps": steps, "max_grad_norm": 0}
        config, machine = load_config(write_config(tmp_path), {"train": train}), self.machine(2 << 20)
        found = forecast(config, dry, machine)
        assert found.policy.run.has_early_updates == (steps == 1)
        spans, shown_s = schedule_of(machine, found)
        assert shown_s == pytest.approx(found.step_s) if steps < 3 else shown_s < found.step_s
        assert min(span.start_s for span in spans) == pytest.approx(0.0, abs=shown_s / 10)
        forwards = [span for span in spans if span.label == spans_first_forward(spans)]
        assert len(forwards) == min(steps, 3)
        for lane in {span.lane for span in spans}:
            assert sum(span.stop_s - span.start_s for span in spans if span.lane == lane) <= 1.01 * shown_s


def spans_first_forward(spans: list[Span]) -> str:
    """The label of the unit that a pass begins with."""
    return next(span.label for span in sorted(spans, key=lambda s: s.start_s) if span.label.startswith("forward"))
