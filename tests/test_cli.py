"""The command line from the outside: exit codes, messages, and what lies in the folders afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_case import comparable_metrics, listing, train, weights, write_config

from zero import trainer
from zero.checkpoint import saving
from zero.checkpoint.finding import list_candidates
from zero.cli.main import main
from zero.config import load_config
from zero.config.schema import FIELDS, table_of
from zero.launcher import current_config, launch
from zero.models import build
from zero.report.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished tiny run."""
    torch.set_num_threads(
        1
    )  # sums over threads may differ in their last bit; fixtures of a module come before conftest's
    folder = tmp_path_factory.mktemp("run")
    assert train(folder, folder / "run") == 0
    return folder / "run"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, wherever the tests run."""
    monkeypatch.setattr(build, "hub_has_address", lambda: False)


def refused(code: int, output: Output, *fragments: str) -> None:
    """The user's input was wrong: exit code 2, no traceback, and a message with these words on stderr."""
    said = output.readouterr()
    assert code == 2, said
    assert "Traceback" not in said.err + said.out
    for fragment in fragments:
        assert fragment in said.err, said.err


class TestTrain:
    def test_the_run_folder_holds_everything(self, run: Path) -> None:
        assert {path.name for path in run.iterdir()} == {
            *("config.toml", "metrics.jsonl", "memory_map.png", "summary.json", "energy.jsonl"),
            *("tensorboard", "checkpoints", "model"),
        }
        assert (run / "memory_map.png").read_bytes().startswith(b"\x89PNG")
        assert list((run / "tensorboard").rglob("events.out.tfevents.*"))
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]

    def test_the_metrics_have_a_line_per_step_and_per_evaluation(self, run: Path) -> None:
        lines = read_metrics(run)
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
        before, after = (line["eval_perplexity"] for line in lines if "eval_perplexity" in line)
        assert after < before
        first = next(line for line in lines if "loss" in line)
        assert first["num_fetches"] <= 20, "the fetches of the evaluation before it are not the step's"

    def test_the_summary_says_what_was_predicted_and_measured(self, run: Path) -> None:
        summary = json.loads((run / "summary.json").read_text())
        assert summary["eval_perplexity_after"] < summary["eval_perplexity_before"]
        assert 0 < summary["device_peak_bytes"] <= summary["device_capacity_bytes"] == 2 * 2**20
        assert 0 < summary["predicted_device_peak_bytes"] <= summary["device_capacity_bytes"]
        assert summary["num_steps"] == 6
        assert summary["num_skipped_steps"] == 0

    def test_the_resolved_config_is_the_one_that_ran(self, run: Path, tmp_path: Path) -> None:
        given = {"train": {"output_dir": str(run)}}
        asked = load_config(write_config(tmp_path), given)
        assert load_config(run / "config.toml").model_dump() == asked.model_dump()

    def test_the_model_folder_loads_without_this_project(self, run: Path) -> None:
        program = (
            "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
            "m, t = M.from_pretrained(sys.argv[1]), T.from_pretrained(sys.argv[1])\n"
            "x = t('The assert statement', return_tensors='pt', return_token_type_ids=False)\n"
            "out = m(**x, labels=x['input_ids'])\n"
            "assert not {'zero', 'gemini'} & set(sys.modules), 'this project was loaded'\n"
            "print(m.dtype, float(out.loss) < 6.5, t.decode(x['input_ids'][0], skip_special_tokens=True))"
        )
        done = subprocess.run(
            [sys.executable, "-I", "-c", program, str(run / "model")], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "torch.float32 True The assert statement"

    def test_a_second_run_gives_the_same_numbers_and_leaves_the_first_alone(self, run: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        assert train(tmp_path, out) == 0
        assert comparable_metrics(out) == comparable_metrics(run)
        assert weights(out) == weights(run)
        assert train(tmp_path, out, "--train.max_steps", "1") == 0
        assert len(read_metrics(out)) == 3, "the metrics hold one run"
        assert comparable_metrics(out / "earlier-1") == comparable_metrics(run)

    @pytest.mark.parametrize(
        "arguments",
        [
            pytest.param((), id="plain"),
            pytest.param(
                ("--data.max_samples", "1", "--train.save_steps", "1"),
                id="at the end of an epoch",
                marks=pytest.mark.full,
            ),
            pytest.param(
                ("--data.max_samples", "1", "--train.save_steps", "1", "--train.gradient_accumulation_steps", "3"),
                id="accumulating, last window short",
                marks=pytest.mark.full,
            ),
            pytest.param(
                ("--precision.dtype", "fp16", "--precision.initial_scale", "1e30", "--precision.max_scale", "1e38"),
                id="fp16 with skipped steps",
                marks=pytest.mark.full,
            ),
        ],
    )
    def test_a_run_that_was_stopped_goes_on_exactly(
        self, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, broken = tmp_path / "whole", tmp_path / "broken"
        assert train(tmp_path, whole, *arguments) == 0
        with monkeypatch.context() as patch:
            patch.setattr(trainer.Trainer, "_step", _stopping_after(4))
            assert train(tmp_path, broken, *arguments) == 130
        assert not (broken / "summary.json").exists()
        assert train(tmp_path, broken, *arguments, "--train.resume_from_checkpoint", "true") == 0
        assert _without_memory(comparable_metrics(broken)) == _without_memory(comparable_metrics(whole))
        assert weights(broken) == weights(whole)
        assert not (broken / "earlier-1").exists()

    def test_a_run_that_is_interrupted_leaves_the_checkpoint_that_was_being_written_complete(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        publish = saving._Save._publish

        def late(self: saving._Save, said: list[Any]) -> Any:
            time.sleep(1)
            return publish(self, said)

        monkeypatch.setattr(saving._Save, "_publish", late)
        monkeypatch.setattr(trainer.Trainer, "_step", _stopping_after(3))
        assert train(tmp_path, out) == 130
        assert [found.path.name for found in list_candidates(out / "checkpoints")] == ["step-00000003"]

    def test_resuming_with_no_checkpoint_starts_anew(self, tmp_path: Path, capsys: Output) -> None:
        resume = ("--train.resume_from_checkpoint", "true", "--train.max_steps", "1")
        assert train(tmp_path, tmp_path / "out", *resume) == 0
        assert "no checkpoint to resume from: starting anew" in capsys.readouterr().out

    def test_a_loss_that_is_not_finite_stops_the_run(self, tmp_path: Path, capsys: Output) -> None:
        given = ("--optimizer.lr", "1e30", "--train.max_skipped_steps", "2", "--train.max_steps", "50")
        assert train(tmp_path, tmp_path / "out", *given) == 1
        said = capsys.readouterr()
        assert "2 steps in a row had a loss or gradient that is not finite" in said.err
        assert "Traceback" not in said.err
        assert "SKIPPED (non-finite)" in said.out


def _stopping_after(num_steps: int) -> Any:
    original = trainer.Trainer._step

    def step(self: trainer.Trainer, *arguments: Any) -> Any:
        if self._progress.step == num_steps:
            raise KeyboardInterrupt
        return original(self, *arguments)

    return step


def _without_memory(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Losses, norms, rates: where the bytes lie after a resume may differ, the numbers may not."""
    return [{name: value for name, value in line.items() if not name.endswith("_bytes")} for line in lines]


class TestRefusals:
    def test_what_does_not_fit_is_refused_with_the_table_and_nothing_written(
        self, tmp_path: Path, capsys: Output
    ) -> None:
        code = train(tmp_path, tmp_path / "out", "--device.memory", "500KiB")
        refused(code, capsys, "it does not fit", "activations and temporaries", "500 KiB available", "smallest change")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("arguments", "fragments"),
        [
            (("--nprocs", "0"), ("--nprocs", "0", "at least 1")),
            (("-nprocs", "1000"), ("--nprocs 1000", "usable core")),
            (("--nprocs", "two"), ("--nprocs", "two")),
            (("--nproc", "1"), ("--nproc: no such option", "did you mean --nprocs?")),
            (("--train.max_step", "1"), ("did you mean train.max_steps?",)),
            (("--lr", "1e-4"), ("--optimizer.lr",)),
            (("--parallel.data", "2"), ("parallel asks for data 2", "start 2 ranks")),
            (("more.toml",), ("more.toml",)),
            (("--train.report_to", "wandb,x"), ("train.report_to",)),
            (("--train.resume_from_checkpoint", "no/such/folder"), ("no/such/folder",)),
            (("--optimizer.name", "lbfgs"), ("not elementwise",)),
            (("--model.tokenizer", "no/such-tokenizer"), ("model.tokenizer", "no/such-tokenizer")),
            (("--data.train", "no/such.jsonl"), ("no/such.jsonl", "no such file")),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
    )
    def test_wrong_arguments(
        self, arguments: tuple[str, ...], fragments: tuple[str, ...], tmp_path: Path, capsys: Output, offline: None
    ) -> None:
        out = tmp_path / "out"
        code = main(["train", write_config(tmp_path), "--train.output_dir", str(out), *arguments])
        refused(code, capsys, *fragments)
        assert not out.exists()

    def test_a_config_that_does_not_exist(self, capsys: Output) -> None:
        refused(main(["train", "configs/quikstart.toml"]), capsys, "configs/quikstart.toml", "no such file")
        refused(main(["train"]), capsys, "a config file is needed")

    def test_a_run_folder_that_cannot_be_one(self, tmp_path: Path, capsys: Output) -> None:
        (tmp_path / "file").write_text("mine")
        refused(train(tmp_path, tmp_path / "file"), capsys, "train.output_dir", "is a file")
        refused(train(tmp_path, tmp_path / "file" / "below"), capsys, "train.output_dir", "is a file")

    def test_a_checkpoint_of_another_model_changes_nothing(self, run: Path, tmp_path: Path, capsys: Output) -> None:
        out = tmp_path / "out"
        given = ("--model.config.ffn_dim", "96", "--train.resume_from_checkpoint", str(run / "checkpoints"))
        refused(train(tmp_path, out, *given), capsys, "does not belong to this run", "fc1")
        assert not out.exists()


class TestWords:
    """Which word is whose: argparse's, the config's, the script's."""

    def test_a_config_given_as_an_option(self, tmp_path: Path, capsys: Output) -> None:
        refused(main(["train", "--config", write_config(tmp_path)]), capsys, "--config", "zero train configs/")

    def test_a_folder_that_is_not_there(self, capsys: Output) -> None:
        refused(main(["generate", "runs/nope"]), capsys, "runs/nope", "no such folder here")

    @pytest.fixture
    def taken(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """The configs that ``zero train`` would have run."""
        configs: list[Any] = []

        def note(config: Any, _: Any) -> Any:
            configs.append(config)
            return SimpleNamespace(run=lambda: None)

        monkeypatch.setattr(trainer, "Trainer", note)
        return configs

    @pytest.mark.parametrize(
        "order",
        [
            ["FILE", "--train.max_steps", "3"],
            ["--train.max_steps", "3", "FILE"],
            ["--train.max_steps=3", "FILE"],
            ["--nprocs", "1", "--train.max_steps", "3", "FILE"],
            ["--train.max_steps", "3", "-nprocs", "1", "FILE"],
            ["FILE", "--train.max-steps", "3", "--nprocs=1"],
        ],
        ids=" ".join,
    )
    def test_keys_may_stand_anywhere(self, order: list[str], tmp_path: Path, taken: list[Any]) -> None:
        path = write_config(tmp_path)
        assert main(["train", *(path if word == "FILE" else word for word in order)]) == 0
        assert taken[0].train.max_steps == 3
        assert taken[0].source == path

    def test_a_config_can_be_given_by_keys_alone(self, taken: list[Any]) -> None:
        assert (
            main(["train", "--model.config.model_type", "opt", "--data.train", "builtin", "--optimizer.lr", "-0"]) == 0
        )
        assert taken[0].model.config == {"model_type": "opt"}

    @pytest.mark.parametrize(
        ("words", "fragments"),
        [
            (["trian"], ["trian: no such command", "did you mean train?"]),
            (
                ["qqqq"],
                ["qqqq: no such command", "train, plan, validate, run, generate, eval, serve, export, probe, env"],
            ),
            ([], ["usage: zero", "first steps"]),
            (["env", "--everything"], ["--everything"]),
            (["export", "somewhere"], ["DIR"]),
            (["generate"], ["MODEL"]),
            (["generate", "x", "--max-new", "3"], ["did you mean --max-new-tokens?"]),
            (["run"], ["SCRIPT"]),
        ],
    )
    def test_what_no_command_takes(self, words: list[str], fragments: list[str], capsys: Output) -> None:
        refused(main(words), capsys, *fragments)

    @pytest.mark.parametrize("command", ["train", "plan", "validate", "run", "generate", "export", "env"])
    def test_every_command_explains_itself(self, command: str, capsys: Output) -> None:
        assert main([command, "--help"]) == 0
        assert f"zero {command}" in capsys.readouterr().out

    def test_help_leads_to_a_first_run(self, capsys: Output) -> None:
        assert main(["--help"]) == 0
        assert "zero train configs/quickstart.toml" in capsys.readouterr().out

    def test_validate_answers_at_once(self, tmp_path: Path) -> None:
        (tmp_path / "config.toml").write_text("[train]\nmax_steps = 0\n")
        program = (
            "import sys; from zero.cli.main import main; code = main(['validate', sys.argv[1]])\n"
            "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'something slow was imported'\n"
            "sys.exit(code)"
        )
        words = [sys.executable, "-c", program, str(tmp_path / "config.toml")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=ROOT)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("zero: ")
        assert "train.max_steps = 0" in done.stderr


class TestValidate:
    def test_the_resolved_config_can_be_read_back(self, tmp_path: Path, capsys: Output) -> None:
        path = write_config(tmp_path)
        assert main(["validate", path, "--optimizer.lr", "0.25"]) == 0
        (tmp_path / "resolved.toml").write_text(capsys.readouterr().out)
        asked = load_config(path, {"optimizer": {"lr": 0.25}})
        assert load_config(tmp_path / "resolved.toml").model_dump() == asked.model_dump()

    def test_keys_lists_every_key(self, capsys: Output) -> None:
        assert main(["validate", "--keys"]) == 0
        listed = capsys.readouterr().out
        assert all(f"--{dotted} " in listed for dotted in FIELDS if table_of(dotted) is None)

    def test_all_problems_at_once(self, tmp_path: Path, capsys: Output) -> None:
        path = write_config(tmp_path, train={"max_steps": 0, "sede": 1}, memory={"policy": "gpu"})
        refused(main(["validate", path]), capsys, "3 problems", "max_steps = 0", "train.seed?", '"cuda"?')


class TestPlan:
    def test_what_fits_says_where_every_byte_goes(self, tmp_path: Path, capsys: Output) -> None:
        assert main(["plan", write_config(tmp_path)]) == 0
        said = capsys.readouterr().out
        for word in ("model data", "activations and temporaries", "least device that works", "host", "disk", "it fits"):
            assert word in said
        assert listing(tmp_path) == [(str(tmp_path / "tiny.json"), (tmp_path / "tiny.json").lstat().st_mtime_ns)]

    def test_what_does_not_fit_the_device(self, tmp_path: Path, capsys: Output) -> None:
        assert main(["plan", write_config(tmp_path), "--device.memory", "300KiB"]) == 2
        said = capsys.readouterr()
        assert "it does not fit" in said.out
        assert "smallest change that would fit" in said.out
        assert said.err == ""

    def test_a_host_of_another_machine_is_believed(self, tmp_path: Path, capsys: Output) -> None:
        path = write_config(tmp_path)
        assert main(["plan", path, "--memory.host", "1MiB"]) == 2
        assert "the host must hold" in capsys.readouterr().out
        assert main(["plan", path, "--memory.host", "999TiB"]) == 0
        assert "of 999 TiB given as memory.host" in capsys.readouterr().out


class TestEnv:
    def test_text_and_json(self, capsys: Output) -> None:
        assert main(["env"]) == 0
        assert "native AdamW" in capsys.readouterr().out
        assert main(["env", "--json"]) == 0
        assert "torch" in json.loads(capsys.readouterr().out)


class TestGenerate:
    def test_it_goes_on_from_the_prompt_under_a_cap(self, run: Path, capsys: Output) -> None:
        words = ["--prompt", "The assert", "--max-new-tokens", "4", "--device.type", "simulated"]
        assert main(["generate", str(run / "model"), *words, "--device.memory", "400KiB"]) == 0
        said = capsys.readouterr().out
        assert said.startswith("The assert")
        assert len(said.strip()) > len("The assert")

    @pytest.mark.parametrize(
        ("words", "fragments"),
        [
            (["--max-new-tokens", "0"], ["--max-new-tokens 0", "at least 1"]),
            (["--temperature", "-1"], ["--temperature"]),
            (["--top-p", "0"], ["--top-p"]),
            (["--max-new-tokens", "many"], ["--max-new-tokens", "many"]),
            (["--device.memry", "1GiB"], ["did you mean device.memory?"]),
        ],
    )
    def test_wrong_numbers(self, words: list[str], fragments: list[str], run: Path, capsys: Output) -> None:
        refused(main(["generate", str(run / "model"), *words]), capsys, *fragments)

    def test_no_such_model(self, capsys: Output, offline: None) -> None:
        refused(main(["generate", "./no/such/folder"]), capsys, "./no/such/folder", "no such folder")
        refused(main(["generate", "no/such-model"]), capsys, "no/such-model", "is the Hub reachable?")


class TestExport:
    def test_a_checkpoint_becomes_a_model(self, run: Path, tmp_path: Path, capsys: Output) -> None:
        from transformers import AutoModelForCausalLM

        assert main(["export", str(run / "checkpoints"), str(tmp_path / "hf")]) == 0
        assert "step-00000006 written as a Hugging Face folder" in capsys.readouterr().err
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
        trained = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
        assert exported.keys() == trained.keys()
        assert all(exported[name].equal(trained[name]) for name in trained)

    def test_an_older_one_in_another_dtype(self, run: Path, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        checkpoint = run / "checkpoints" / "step-00000003"
        assert main(["export", str(checkpoint), str(tmp_path / "hf"), "--dtype", "bf16"]) == 0
        assert str(AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype) == "torch.bfloat16"

    def test_what_is_refused(self, run: Path, tmp_path: Path, capsys: Output) -> None:
        refused(main(["export", str(tmp_path), str(tmp_path / "hf")]), capsys, "holds no checkpoint")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine.txt").write_text("mine")
        refused(main(["export", str(run / "checkpoints"), str(tmp_path / "full")]), capsys, "full")
        assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


class TestRun:
    @pytest.fixture(autouse=True)
    def _restore(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setattr(sys, "argv", list(sys.argv))
        monkeypatch.setattr(sys, "path", list(sys.path))
        yield
        launch({})

    def script(self, folder: Path, text: str) -> str:
        path = folder / "loop.py"
        path.write_text("import sys, zero\n" + text)
        return str(path)

    def test_the_script_gets_its_arguments_and_the_config(self, tmp_path: Path, capsys: Output) -> None:
        config = write_config(tmp_path, optimizer={"lr": 0.125})
        script = self.script(tmp_path, "print(__name__, sys.argv[1:], sys.path[0])")
        words = ["--steps", "3", "--config", "its own", "--nprocs", "7", "-nprocs", "x"]
        assert main(["run", script, "--config", config, "-nprocs", "1", *words]) == 0
        assert capsys.readouterr().out.strip() == f"__main__ {words} {tmp_path}"
        assert current_config().optimizer.lr == 0.125

    @pytest.mark.parametrize(("call", "lr"), [("launch()", 0.125), ("launch({'optimizer': {'lr': 0.5}})", 0.5)])
    def test_a_launch_without_a_config_keeps_the_one_given_here(
        self, call: str, lr: float, tmp_path: Path, capsys: Output
    ) -> None:
        config = write_config(tmp_path, optimizer={"lr": 0.125})
        assert main(["run", self.script(tmp_path, f"zero.{call}"), "--config", config]) == 0
        assert current_config().optimizer.lr == lr

    @pytest.mark.parametrize(
        ("before", "after", "own"),
        [
            (["--nprocs", "1"], [], []),
            ([], ["--help"], ["--help"]),
            ([], ["--", "--nprocs", "9"], ["--nprocs", "9"]),
            ([], ["data", "--nprocs", "9"], ["data", "--nprocs", "9"]),
        ],
    )
    def test_where_our_options_end(
        self, before: list[str], after: list[str], own: list[str], tmp_path: Path, capsys: Output
    ) -> None:
        assert main(["run", *before, self.script(tmp_path, "print(sys.argv[1:])"), *after]) == 0
        assert capsys.readouterr().out.strip() == str(own)

    def test_a_mistake_in_what_the_script_asks_for_has_no_traceback(self, tmp_path: Path, capsys: Output) -> None:
        refused(main(["run", self.script(tmp_path, "zero.launch({'lr': 1})")]), capsys, "optimizer", "lr")

    def test_a_mistake_of_the_script_is_its_own(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError):
            main(["run", self.script(tmp_path, "1 / 0")])
        with pytest.raises(SystemExit) as stop:
            main(["run", self.script(tmp_path, "sys.exit(3)")])
        assert stop.value.code == 3

    def test_what_is_refused(self, tmp_path: Path, capsys: Output) -> None:
        refused(main(["run", "no/such/script.py"]), capsys, "no/such/script.py: no such file")
        script = self.script(tmp_path, "raise AssertionError('must not run')")
        refused(main(["run", script, "--nprocs", "0"]), capsys, "--nprocs", "at least 1")
        refused(main(["run", script, "--config", "none.toml"]), capsys, "none.toml", "no such file")


@pytest.mark.parametrize(("is_terminal", "name", "value"), [(False, "TQDM_DISABLE", "1"), (True, "TQDM_LEAVE", "")])
def test_progress_bars_of_libraries_are_for_terminals(
    is_terminal: bool, name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    for variable in ("TQDM_DISABLE", "TQDM_LEAVE"):
        monkeypatch.setenv(variable, "")  # so that what main() sets is taken back in the end
        monkeypatch.delenv(variable)
    assert main(["validate", "--keys"]) == 0
    assert {key: os.environ[key] for key in ("TQDM_DISABLE", "TQDM_LEAVE") if key in os.environ} == {name: value}
    monkeypatch.setenv(name, "the user's")
    assert main(["validate", "--keys"]) == 0
    assert os.environ[name] == "the user's"
