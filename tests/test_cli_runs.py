"""Runs and their folders: what is extended, what is in the way, who else is there, and disks that are full."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_case import TINY, comparable_metrics, listing, train, weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from zero import export, recovery, trainer
from zero.cli.main import main
from zero.health import HealthWatch
from zero.report.metrics import read_metrics
from zero.run_folder import forget_metrics_after, held_run_folder

Output = pytest.CaptureFixture[str]
CONSTANT = ("--scheduler.name", "constant", "--scheduler.warmup_ratio", "0")
RESUME = ("--train.resume_from_checkpoint", "true")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums over threads may differ in their last bit."""
    torch.set_num_threads(1)


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """A disk that takes no file larger than so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda num_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestExtending:
    @pytest.mark.parametrize("accumulation", [pytest.param("1", marks=pytest.mark.full), "3"])
    def test_a_finished_run_that_is_extended_is_the_long_run(self, accumulation: str, tmp_path: Path) -> None:
        same = (*CONSTANT, "--train.save_steps", "100", "--train.gradient_accumulation_steps", accumulation)
        whole, extended = tmp_path / "whole", tmp_path / "extended"
        assert train(tmp_path, whole, *same, "--train.max_steps", "6") == 0
        assert train(tmp_path, extended, *same, "--train.max_steps", "3") == 0
        assert train(tmp_path, extended, *same, "--train.max_steps", "6", *RESUME) == 0
        losses = [[line["loss"] for line in comparable_metrics(run) if "loss" in line] for run in (whole, extended)]
        assert losses[0] == losses[1]
        assert weights(extended) == weights(whole)

    @pytest.mark.full
    def test_an_extended_run_takes_the_rates_of_the_longer_schedule(self, tmp_path: Path) -> None:
        """The shorter run ended at a rate of 0, which is what its checkpoint holds."""
        falling = ("--scheduler.name", "linear", "--scheduler.warmup_ratio", "0", "--optimizer.lr", "1e-3")
        out = tmp_path / "out"
        assert train(tmp_path, out, *falling, "--train.max_steps", "2") == 0
        summary = (out / "summary.json").read_text()
        assert train(tmp_path, out, *falling, "--train.max_steps", "2", *RESUME) == 0
        assert (out / "summary.json").read_text() == summary, "nothing was trained"
        assert train(tmp_path, out, *falling, "--train.max_steps", "4", *RESUME) == 0
        rates = [line["lr"] for line in comparable_metrics(out) if "lr" in line]
        assert rates == pytest.approx([1e-3, 5e-4, 5e-4, 2.5e-4])

    @pytest.mark.full
    def test_a_resume_with_nothing_left_to_do_changes_nothing(self, tmp_path: Path) -> None:
        short = (*CONSTANT, "--train.max_steps", "2")
        out = tmp_path / "out"
        places = []
        for resume in ((), RESUME, RESUME):
            assert train(tmp_path, out, *short, *resume) == 0
            manifests = [json.loads(f.read_text()) for f in out.glob("checkpoints/step-00000002/*.json")]
            places.append([text for text in map(json.dumps, manifests) if '"fingerprint"' in text])
        assert places[0], "the place in the data is in the checkpoint"
        assert [_place(text) for text in places[0]] == [_place(text) for text in places[2]]


def _place(text: str) -> str:
    """The part of a checkpoint's document that says where in the data it was taken."""
    before, _, _ = text.partition('"fingerprint"')
    return before[before.rindex("{") :]


class TestStopped:
    def test_asked_to_stop_before_the_first_step_it_saves_and_goes_on_from_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
    ) -> None:
        whole, stopped = tmp_path / "whole", tmp_path / "stopped"
        assert train(tmp_path, whole, "--train.max_steps", "2") == 0
        build = trainer.build_model

        def build_and_be_stopped(*arguments: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return build(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "build_model", build_and_be_stopped)
            assert train(tmp_path, stopped, "--train.max_steps", "2") == 0
        assert "stopped by SIGTERM at step 0" in capsys.readouterr().out
        assert read_metrics(stopped) == []
        assert train(tmp_path, stopped, "--train.max_steps", "2", *RESUME) == 0
        assert comparable_metrics(stopped) == comparable_metrics(whole)
        assert weights(stopped) == weights(whole)


class TestRestarted:
    """Ranks that ``--max-restarts`` has started again, as one process plays it."""

    @pytest.fixture
    def restarted(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        return lambda ours: monkeypatch.setattr(recovery, "_written_since_launch", lambda _: ours)

    def test_what_this_launch_has_done_is_gone_on_with(
        self, tmp_path: Path, restarted: Callable[[bool], None], capsys: Output
    ) -> None:
        out = tmp_path / "out"
        restarted(True)
        assert train(tmp_path, out, "--train.max_steps", "3") == 0
        assert train(tmp_path, out, "--train.max_steps", "4") == 0
        assert "step-00000003 at step 3" in capsys.readouterr().out
        assert [line["step"] for line in read_metrics(out) if "loss" in line] == [1, 2, 3, 4]

    @pytest.mark.full
    def test_an_earlier_run_is_not(self, tmp_path: Path, restarted: Callable[[bool], None], capsys: Output) -> None:
        out = tmp_path / "out"
        restarted(False)
        assert train(tmp_path, out, "--train.max_steps", "3") == 0
        assert train(tmp_path, out, "--train.max_steps", "1") == 0
        assert "no checkpoint to resume from: starting anew" in capsys.readouterr().out
        assert len(read_metrics(out / "earlier-1")) > len(read_metrics(out))

    @pytest.mark.full
    def test_progress_beyond_the_checkpoint_that_was_named_is_kept(
        self, tmp_path: Path, restarted: Callable[[bool], None], capsys: Output
    ) -> None:
        other, out = tmp_path / "other", tmp_path / "out"
        restarted(False)
        assert train(tmp_path, other, "--train.max_steps", "3") == 0
        named = ("--train.resume_from_checkpoint", str(other / "checkpoints"))
        assert train(tmp_path, out, "--train.max_steps", "4", *named) == 0
        restarted(True)
        assert train(tmp_path, out, "--train.max_steps", "5", *named) == 0
        assert f"{out / 'checkpoints' / 'step-00000004'} at step 4" in capsys.readouterr().out
        assert not (out / "earlier-1").exists()

    def test_what_was_written_before_the_launcher_started_is_not_its_own(self, tmp_path: Path) -> None:
        file = tmp_path / "config.toml"
        assert not recovery._written_since_launch(file)
        file.write_text("")
        assert recovery._written_since_launch(file)
        os.utime(file, (0, 0))
        assert not recovery._written_since_launch(file)


def test_metrics_of_a_run_that_went_back_are_cut_behind_its_last_stretch(tmp_path: Path) -> None:
    steps = [*range(1, 10), 6, *range(7, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "at": {i}}}\n' for i, step in enumerate(steps)))
    forget_metrics_after(tmp_path, 7)
    assert [line["at"] for line in read_metrics(tmp_path)] == list(range(11))


def test_bad_steps_after_a_resume_are_no_run_without_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert train(tmp_path, out, "--train.max_steps", "5") == 0
    monkeypatch.setattr(HealthWatch, "problem", lambda self, loss: "bad")
    assert train(tmp_path, out, "--train.max_steps", "6", *RESUME) == 0


class TestFullDisk:
    def test_a_model_that_cannot_be_written_fails_the_run_in_words(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise SafetensorError("No space left on device")

        monkeypatch.setattr(export, "save_file", full)
        assert train(tmp_path, tmp_path / "out", "--train.max_steps", "2") == 1
        said = capsys.readouterr().err
        assert "No space left on device" in said
        assert "still stand" in said
        assert "Traceback" not in said

    def test_a_checkpoint_that_cannot_be_written_fails_the_run(
        self, tmp_path: Path, capsys: Output, largest_file: Callable[[int], None]
    ) -> None:
        largest_file(200_000)
        assert train(tmp_path, tmp_path / "out") == 1
        said = capsys.readouterr().err
        assert "the checkpoint of step 3 could not be written" in said
        assert "Traceback" not in said

    def test_metrics_that_cannot_be_written_fail_the_run_in_words(
        self, tmp_path: Path, capsys: Output, largest_file: Callable[[int], None]
    ) -> None:
        largest_file(1_500)
        assert train(tmp_path, tmp_path / "out", "--train.report_to", "[]") == 1
        said = capsys.readouterr().err
        assert "stopped at step" in said
        assert "File too large" in said
        assert "Traceback" not in said

    def test_a_picture_that_cannot_be_drawn_costs_a_warning(
        self, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied", "memory_map.png")

        monkeypatch.setattr(trainer, "draw_memory_map", refuse)
        assert train(tmp_path, tmp_path / "out") == 0
        said = capsys.readouterr()
        assert "no memory map: " in said.err
        assert "memory_map.png" not in said.out, "the summary names no file that is not there"

    def test_what_does_not_fit_once_the_run_has_begun_is_a_failure_and_no_refusal(
        self, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unknown(*_: object, **__: object) -> None:
            raise trainer.CannotWalkError("the forward branches on values")

        monkeypatch.setattr(trainer, "plan_run", unknown)
        assert train(tmp_path, tmp_path / "out", "--device.memory", "600KiB", "--data.eval_fraction", "0") == 1
        assert "it does not fit" in capsys.readouterr().err


class TestNothingLearnt:
    def test_a_run_without_one_update_has_failed_and_exports_nothing(self, tmp_path: Path, capsys: Output) -> None:
        out = tmp_path / "out"
        assert train(tmp_path, out, "--train.max_steps", "1") == 0
        weights_file = out / "model" / "model.safetensors"
        values = {name: torch.full_like(value, float("nan")) for name, value in load_file(weights_file).items()}
        save_file(values, weights_file, {"format": "pt"})
        config = {**TINY, "model": {"name_or_path": str(out / "model")}}
        (tmp_path / "nan.json").write_text(json.dumps(config))
        capsys.readouterr()
        assert main(["train", str(tmp_path / "nan.json"), "--train.output_dir", str(tmp_path / "nan")]) == 1
        assert "6 steps in a row had a loss or gradient that is not finite" in capsys.readouterr().err
        assert not (tmp_path / "nan" / "model").exists()

    @pytest.mark.full
    def test_a_resume_past_the_end_says_so(self, tmp_path: Path, capsys: Output) -> None:
        assert train(tmp_path, tmp_path / "out", "--train.max_steps", "2") == 0
        assert train(tmp_path, tmp_path / "out", "--train.max_steps", "1", *RESUME) == 0
        assert "nothing is left to train: step 2 of 1" in capsys.readouterr().out


class TestFolders:
    @pytest.mark.parametrize("kind", ["loop", "nowhere", "long name", "file", "not ours"])
    def test_a_folder_that_cannot_be_is_refused(self, kind: str, tmp_path: Path, capsys: Output) -> None:
        out = {"long name": tmp_path / ("x" * 300), "not ours": Path("/proc/x")}.get(kind, tmp_path / "out")
        if kind == "loop":
            out.symlink_to(out)
        if kind == "nowhere":
            out.symlink_to(tmp_path / "nothing" / "here")
        if kind == "file":
            out.write_text("mine")
        assert train(tmp_path, out) == 2
        said = capsys.readouterr().err
        assert "train.output_dir = " in said
        assert "name another folder" in said

    @pytest.mark.parametrize(
        "name",
        [
            "model",
            *(pytest.param(name, marks=pytest.mark.full) for name in ("tensorboard", "config.toml", "memory_map.png")),
            "metrics.jsonl",
        ],
    )
    def test_what_lies_in_the_way_is_set_aside_and_never_written_over(self, name: str, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / name).write_text("mine")
        assert train(tmp_path, out, "--train.max_steps", "3") == 0
        assert (out / "earlier-1" / name).read_text() == "mine"

    def test_the_config_that_was_given_is_not_written_over(self, tmp_path: Path, capsys: Output) -> None:
        (tmp_path / "config.json").write_text(json.dumps(TINY))
        given = tmp_path / "config.toml"
        assert main(["validate", str(tmp_path / "config.json")]) == 0
        given.write_text("# mine\n" + capsys.readouterr().out)
        before = listing(tmp_path)
        assert main(["train", str(given), "--train.output_dir", str(tmp_path)]) == 2
        assert "over the config that was given" in capsys.readouterr().err
        assert listing(tmp_path) == before

    @pytest.mark.full
    def test_the_model_that_is_trained_is_not_written_over(self, tmp_path: Path, capsys: Output) -> None:
        out = tmp_path / "out"
        assert train(tmp_path, out, "--train.max_steps", "1") == 0
        config = {**TINY, "model": {"name_or_path": str(out / "model")}}
        (tmp_path / "second.json").write_text(json.dumps(config))
        before = listing(tmp_path)
        assert main(["train", str(tmp_path / "second.json"), "--train.output_dir", str(out)]) == 2
        assert "over the model that is to be trained" in capsys.readouterr().err
        assert listing(tmp_path) == before
        again = ["train", str(tmp_path / "second.json"), "--train.max_steps", "1", "--train.output_dir"]
        assert main([*again, str(tmp_path / "other")]) == 0

    def test_a_run_can_be_repeated_and_resumed_from_its_own_config(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        assert train(tmp_path, out, "--train.max_steps", "1") == 0
        assert main(["train", str(out / "config.toml"), *RESUME, "--train.max_steps", "2"]) == 0
        assert main(["train", str(out / "config.toml"), "--train.max_steps", "1"]) == 0

    def test_two_runs_in_one_folder_at_the_same_time(self, tmp_path: Path, capsys: Output) -> None:
        out = tmp_path / "out"
        assert train(tmp_path, out, "--train.max_steps", "1") == 0
        before = listing(out)
        with held_run_folder(out):
            assert train(tmp_path, out, "--train.max_steps", "1") == 2
            assert train(tmp_path, out, "--train.max_steps", "2", *RESUME) == 2
        assert "another run is writing there" in capsys.readouterr().err
        assert listing(out) == before
        assert train(tmp_path, out, "--train.max_steps", "2", *RESUME) == 0
