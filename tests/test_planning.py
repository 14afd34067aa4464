"""What `zero plan` says must be what `zero train` does: every figure is tried at its edge."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_case import TINY, train, write_config

from gemini.plan import DoesNotFitError
from zero.cli.main import main
from zero.config.loading import load_config
from zero.config.overrides import parse_overrides
from zero.dryrun import CannotWalkError, models_own_code
from zero.errors import UserError
from zero.optimizers import _CLASSES
from zero.planning import PlannedRun, assumed_evaluation_shape, plan_run
from zero.setup import make_device

Output = pytest.CaptureFixture[str]
SHORT = ("--train.max_steps", "3")


def planned(*overrides: str) -> PlannedRun:
    """The plan of the tiny config under overrides."""
    config = load_config(TINY, parse_overrides(overrides))
    return plan_run(config, make_device(config), evaluation_shape=assumed_evaluation_shape(config))


def refused_before_anything_is_written(folder: Path, *overrides: str) -> bool:
    """Whether ``zero train`` says no, with exit code 2 and no run folder."""
    code = train(folder, folder / "refused", *overrides)
    assert code == 2 or (folder / "refused").exists()
    return code == 2


_QUICK = ("adamw", "adagrad", "radam", "asgd")
_NAMES = [name if name in _QUICK else pytest.param(name, marks=pytest.mark.full) for name in _CLASSES]


class TestOptimizers:
    @pytest.mark.parametrize("name", _NAMES)
    def test_every_optimizer_can_be_planned_for(self, name: str) -> None:
        states = {"sgd": 0, "adagrad": 1, "rmsprop": 1, "lion": 1}.get(name)
        facts = planned("--optimizer.name", name).dry.facts
        if states is not None:
            assert {fact.companion_bytes_per_numel for fact in facts} == {4 + 4 * states}, "gradient and states"

    def test_adagrad_whose_states_are_there_from_the_start_trains(self, tmp_path: Path, capsys: Output) -> None:
        assert train(tmp_path, tmp_path / "out", "--optimizer.name", "adagrad", *SHORT) == 0
        assert "device peak" in capsys.readouterr().out


class TestAdvice:
    """What a refusal says would fit does fit."""

    BF16 = ("--device.memory", "8MiB", "--precision.dtype", "bf16")

    def test_formats_of_states_that_the_host_could_hold(self) -> None:
        whole, split = (
            planned(*self.BF16, "--precision.optimizer_state", form).host_peak_bytes for form in ("fp32", "split")
        )
        assert split < whole
        less = (*self.BF16, "--memory.host")
        assert 'precision.optimizer_state = "split" or "bf16" or "8bit"' in str(planned(*less, str(split)).refusal)
        assert 'precision.optimizer_state = "bf16" or "8bit"' in str(planned(*less, str(split - 1)).refusal)
        assert planned(*less, str(split), "--precision.optimizer_state", "split").plan is not None
        assert "optimizer_state" not in str(planned("--device.memory", "8MiB", "--memory.host", "1KiB").refusal)

    def test_another_order_of_micro_batches(self) -> None:
        layer = ("--train.gradient_accumulation_steps", "4", "--train.accumulation_order", "layer")
        layer_bytes = planned(*layer, "--device.memory", "8MiB").dry.tight_device_bytes
        small = ("--device.memory", str(layer_bytes - 1))
        assert 'train.accumulation_order = "batch"' in str(planned(*layer, *small).refusal)
        assert planned(*layer[:2], *small).plan is not None


class TestOneMemory:
    """With ``device.type = "cpu"`` the host holds what is computed with, too."""

    CPU = ("--device.type", "cpu", "--device.memory", "null")

    @pytest.mark.parametrize("policy", ["auto", "cpu"])
    def test_a_model_that_the_machine_has_no_room_for_is_refused(self, policy: str) -> None:
        words = (*self.CPU, "--memory.policy", policy)
        roomy = planned(*words)
        needed = roomy.require().predicted_device_peak_bytes + roomy.host_bytes
        assert roomy.host_peak_bytes == needed
        assert planned(*words, "--memory.host", str(needed)).plan is not None
        refusal = str(planned(*words, "--memory.host", str(needed - 1)).refusal)
        assert "the host must hold" in refusal
        assert ('memory.policy = "cpu" with memory.disk' in refusal) == (policy == "auto")


class TestWhatCannotBeWalked:
    def test_only_failures_of_the_model_say_so_and_say_which(self) -> None:
        with pytest.raises(CannotWalkError, match="^RuntimeError: the first line$"), models_own_code():
            raise RuntimeError("the first line\nand more")
        with pytest.raises(UserError), models_own_code():
            raise UserError("nothing to train")

    def test_a_failure_of_our_own_comes_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("ours")

        monkeypatch.setattr("zero.planning.build_optimizer", fail)
        with pytest.raises(RuntimeError, match="ours"):
            main(["plan", write_config(tmp_path)])

    def test_adapters_are_planned_for(self, tmp_path: Path, capsys: Output) -> None:
        pytest.importorskip("peft")
        lora = ("--model.lora.r", "4", "--optimizer.name", "adamw")
        frozen = [fact for fact in planned(*lora).dry.facts if not fact.companion_bytes_per_numel]
        assert sum(fact.numel for fact in frozen) > 90_000, "all but the adapters is frozen"
        assert main(["plan", write_config(tmp_path), *lora, "--device.memory", "300KiB"]) == 2
        assert "it does not fit" in capsys.readouterr().out
        assert refused_before_anything_is_written(tmp_path, *lora, "--device.memory", "300KiB")


@pytest.mark.full
class TestHost:
    @pytest.mark.parametrize(
        "overrides",
        [
            pytest.param((), id="auto, everything on the device in the end"),
            pytest.param(("--memory.policy", "cuda"), id="cuda"),
            pytest.param(("--memory.policy", "cuda", "--precision.dtype", "bf16"), id="cuda, bf16"),
            pytest.param(
                (
                    "--memory.policy",
                    "static",
                    "--memory.resident_parameters",
                    "0.6",
                    "--memory.resident_optimizer",
                    "0.3",
                ),
                id="more values than states",
            ),
            pytest.param(
                (
                    "--memory.policy",
                    "static",
                    "--memory.resident_parameters",
                    "0.3",
                    "--memory.resident_optimizer",
                    "0.6",
                ),
                id="more states than values",
            ),
            pytest.param(
                ("--memory.policy", "cpu", "--precision.dtype", "fp16", "--train.gradient_accumulation_steps", "3"),
                id="gradients that are widened",
            ),
        ],
    )
    def test_the_host_needs_what_is_said_and_a_byte_less_is_refused(
        self, overrides: tuple[str, ...], tmp_path: Path, capsys: Output
    ) -> None:
        overrides = (*overrides, "--device.memory", "8MiB", *SHORT)
        peak_bytes = planned(*overrides).host_peak_bytes
        assert train(tmp_path, tmp_path / "out", *overrides, "--memory.host", str(peak_bytes)) == 0
        less = (*overrides, "--memory.host", str(peak_bytes - 1))
        assert main(["plan", write_config(tmp_path), *less]) == 2
        assert "the host must hold" in capsys.readouterr().out
        assert refused_before_anything_is_written(tmp_path, *less)

    @pytest.mark.parametrize(("parameters", "optimizer"), [("1.0", "0.4"), ("0.2", "1.0"), ("0.5", "0.5")])
    def test_what_stays_on_the_host_is_what_a_run_ends_with(
        self, parameters: str, optimizer: str, tmp_path: Path
    ) -> None:
        static = ("--memory.policy", "static", "--memory.resident_parameters", parameters)
        static = (*static, "--memory.resident_optimizer", optimizer, "--device.memory", "8MiB")
        assert train(tmp_path, tmp_path / "out", *static, *SHORT) == 0
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["host_bytes"] == planned(*static).host_bytes

    def test_host_memory_that_runs_out_ends_a_run_without_a_traceback(
        self, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unknown(*_: Any, **__: Any) -> None:
            raise CannotWalkError("the forward branches on values")

        monkeypatch.setattr("zero.trainer.plan_run", unknown)
        assert train(tmp_path, tmp_path / "out", "--memory.host", "200KiB") == 1
        said = capsys.readouterr().err
        assert "host memory" in said
        assert "Traceback" not in said


class TestEvaluation:
    def test_an_evaluation_batch_that_is_too_large_is_refused_before_the_run(
        self, tmp_path: Path, capsys: Output
    ) -> None:
        large = ("--train.per_device_eval_batch_size", "64", "--data.eval_fraction", "0.9", "--data.max_samples", "20")
        assert main(["plan", write_config(tmp_path), *large]) == 2
        assert "evaluation of 64 x 32 tokens" in capsys.readouterr().out
        assert refused_before_anything_is_written(tmp_path, *large)
        assert "or a lower train.per_device_eval_batch_size" in capsys.readouterr().err
        assert main(["plan", write_config(tmp_path), *large, "--data.eval_fraction", "0"]) == 0, "nothing to evaluate"

    @pytest.mark.parametrize("policy", ["auto", pytest.param("cuda", marks=pytest.mark.full)])
    def test_the_capacity_at_the_edge_is_enough_for_evaluations(self, policy: str, tmp_path: Path) -> None:
        large = ("--train.per_device_eval_batch_size", "16", "--data.eval_fraction", "0.9", "--data.max_samples", "20")
        large = (*large, *SHORT, "--memory.policy", policy)
        tight_bytes = _tight_bytes(*large)
        assert train(tmp_path, tmp_path / "out", *large, "--device.memory", str(tight_bytes)) == 0
        assert refused_before_anything_is_written(tmp_path, *large, "--device.memory", str(tight_bytes - 1))


def _tight_bytes(*overrides: str) -> int:
    """The capacity that a refusal says is needed."""
    refusal = planned(*overrides, "--device.memory", "100KiB").refusal
    assert refusal is not None
    return {what: num_bytes for what, _, num_bytes, _ in refusal.rows}["needed in all"]


class TestDevice:
    @pytest.mark.parametrize("policy", ["auto", "cuda", "cpu"])
    def test_what_a_refusal_says_is_needed_is_enough_and_a_byte_less_is_not(self, policy: str, tmp_path: Path) -> None:
        overrides = (*SHORT, "--memory.policy", policy)
        tight_bytes = _tight_bytes(*overrides)
        assert planned(*overrides, "--device.memory", str(tight_bytes - 1)).refusal is not None
        assert planned(*overrides, "--device.memory", str(tight_bytes)).refusal is None
        assert train(tmp_path, tmp_path / "out", *overrides, "--device.memory", str(tight_bytes)) == 0

    def test_all_figures_of_a_refusal_agree(self, tmp_path: Path, capsys: Output) -> None:
        few = planned("--device.memory", "500KiB")
        assert isinstance(few.refusal, DoesNotFitError)
        *parts, whole = [num_bytes for _, _, num_bytes, _ in few.refusal.rows]
        assert sum(parts) == whole == few.dry.tight_device_bytes
        advised = re.search(r"device.memory of at least (\d+)KiB", few.refusal.advice)
        assert advised is not None
        assert 0 <= int(advised[1]) * 1024 - few.dry.least_device_bytes < 1024
        assert main(["plan", write_config(tmp_path), "--device.memory", str(whole)]) == 0
        assert main(["plan", write_config(tmp_path), "--device.memory", str(whole - 1)]) == 2


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums over threads may differ in their last bit."""
    torch.set_num_threads(1)
