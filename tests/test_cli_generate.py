"""`zero generate`, `zero export` and folders of models that are damaged: refused in words, never guessed around."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_case import TINY, train
from safetensors.torch import load_file, save_file

from zero.cli.main import main

Output = pytest.CaptureFixture[str]
CAP = ("--device.type", "simulated", "--device.memory", "8MiB")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one short run: a model of 32 positions."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    assert train(folder, folder / "run", "--train.max_steps", "1") == 0
    return folder / "run"


@pytest.fixture
def model(run: Path, tmp_path: Path) -> Path:
    """A copy of its model, to be damaged."""
    return Path(shutil.copytree(run / "model", tmp_path / "m"))


def says(code: int, output: Output, expected: int, *fragments: str) -> None:
    """The command ended with this exit code and these words, without a traceback."""
    said = output.readouterr()
    assert code == expected, said
    assert "Traceback" not in said.err
    for fragment in fragments:
        assert fragment in said.err, said.err


class TestPositions:
    def test_as_many_tokens_as_the_model_has_positions(self, run: Path, capsys: Output) -> None:
        generate = ["generate", str(run / "model"), *CAP, "--prompt", "word"]
        assert main(generate) == 0, "the default is cut to what there is room for"
        assert capsys.readouterr().out.startswith("word")
        says(main([*generate, "--max-new-tokens", "200"]), capsys, 2, "--max-new-tokens 200", "at most 32 in all")
        says(main([*generate[:-1], "word " * 400]), capsys, 2, "--prompt: ", "give less text")

    def test_the_most_that_is_allowed_works(self, run: Path, capsys: Output) -> None:
        generate = ["generate", str(run / "model"), *CAP, "--prompt", "word", "--max-new-tokens"]
        assert main([*generate, "1000"]) == 2
        most = capsys.readouterr().err.rsplit("at most ", 1)[1].strip()
        assert main([*generate, most]) == 0
        assert main([*generate, str(int(most) + 1)]) == 2


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--temperature", "nan"], "--temperature nan"),
        (["--temperature", "inf"], "--temperature inf"),
        (["--temperature", "1e-40"], "--temperature 1e-40"),
        (["--temperature", "1", "--seed", "9" * 30], "--seed 999"),
        (["--top-k", "5"], "give a --temperature"),
        (["--top-p", "0.5"], "give a --temperature"),
        (["--prompt", "caf\udce9"], "--prompt: not UTF-8 at character 4"),
        (["--train.max_steps", "5"], "--train.*: zero generate does not read it"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], fragment: str, run: Path, capsys: Output) -> None:
    says(main(["generate", str(run / "model"), *CAP, *words]), capsys, 2, fragment)


def test_sampling_works_at_both_ends_of_the_temperatures(run: Path) -> None:
    generate = ["generate", str(run / "model"), *CAP, "--max-new-tokens", "2", "--temperature"]
    assert main([*generate, "0.001"]) == 0
    assert main([*generate, "1000", "--top-k", "3", "--top-p", "0.9", "--seed", "7"]) == 0


def test_host_memory_that_is_too_small(run: Path, capsys: Output) -> None:
    code = main(["generate", str(run / "model"), *CAP, "--memory.host", "20KiB"])
    says(code, capsys, 2, "the host must hold", "raise memory.host")


def _without(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def _misshapen(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.decoder.layers.0.fc1.weight"] = torch.ones(3, 3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _without_tokenizer(folder: Path) -> None:
    for file in (*folder.glob("tokenizer*"), *folder.glob("special*"), *folder.glob("vocab*")):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        pytest.param(_without("model.decoder.layers.0.fc1.bias"), "lack the parameter", id="a parameter is missing"),
        pytest.param(_misshapen, "model.name_or_path = ", id="a parameter has another shape"),
        pytest.param(lambda m: (m / "config.json").write_text("[]"), "is the folder complete?", id="config is a list"),
        pytest.param(_without_tokenizer, "holds no tokenizer", id="no tokenizer"),
        pytest.param(lambda m: (m / "tokenizer.json").write_text("{}"), "model.name_or_path", id="empty tokenizer"),
    ],
)
def test_a_damaged_folder_is_refused(
    damage: Callable[[Path], None], fragment: str, model: Path, tmp_path: Path, capsys: Output
) -> None:
    damage(model)
    says(main(["generate", str(model), *CAP]), capsys, 2, fragment)
    config = {**TINY, "model": {"name_or_path": str(model)}}
    (tmp_path / "damaged.json").write_text(json.dumps(config))
    code = main(["train", str(tmp_path / "damaged.json"), "--train.output_dir", str(tmp_path / "out")])
    says(code, capsys, 2, fragment)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_run_is_not_its_model(run: Path, capsys: Output) -> None:
    says(main(["generate", str(run), *CAP]), capsys, 2, f"did you mean {run / 'model'}?")


class TestExport:
    def test_a_folder_that_cannot_be(self, run: Path, capsys: Output, tmp_path: Path) -> None:
        says(main(["export", str(run / "checkpoints"), str(tmp_path / ("x" * 300))]), capsys, 2, "File name too long")

    def test_not_into_the_checkpoint_itself(self, run: Path, capsys: Output) -> None:
        (checkpoint,) = (run / "checkpoints").iterdir()
        inside = checkpoint / "exported"
        says(main(["export", str(run / "checkpoints"), str(inside)]), capsys, 2, "lies inside the checkpoint")
        assert not inside.exists()


def test_nowhere_to_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    assert main(["env"]) == 0


class TestFoldersThatAreNotMeant:
    def test_a_slip_in_a_path(self, run: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(run.parent.parent)
        path = f"{run.parent.name}/{run.name}/modle"
        code = main(["generate", path, *CAP, "--prompt", "a"])
        says(code, capsys, 2, "model.name_or_path", "no such folder", f'did you mean "{path[:-2]}el"?')

    def test_adapters_alone(self, tmp_path: Path, capsys: Output) -> None:
        assert train(tmp_path, tmp_path / "run", "--train.max_steps", "1", "--model.lora.r", "2") == 0
        assert re.search(r"model +[\d,]+ parameters, [\d,]+ of them trained, in \d+ chunks", capsys.readouterr().out)
        code = main(["generate", str(tmp_path / "run" / "model"), *CAP, "--prompt", "a"])
        says(code, capsys, 2, "holds adapters (LoRA) without the model", "peft.PeftModel.from_pretrained")

    def test_the_run_folder_for_its_checkpoints(self, run: Path, tmp_path: Path) -> None:
        assert main(["export", str(run), str(tmp_path / "hf")]) == 0
        assert (tmp_path / "hf" / "model.safetensors").is_file()
