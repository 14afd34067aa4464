"""What the documentation promises: configs load, examples and the README's commands run, links lead somewhere."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_case import train
from torch.utils.data import DataLoader

import zero
from gemini.exchange import ALONE
from gemini.layout import ParameterSpec, UnitSpec, build_layout
from gemini.plan import chunk_facts
from gemini.profile import NAMED
from zero.cli.main import main
from zero.config import load_config, to_toml
from zero.launcher import launch

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").iterdir() if path.suffix in (".toml", ".py", ".yaml", ".json"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FOLDERS = ("", "docs", "gemini", "zero", "configs", "examples", "benchmarks")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    """The config that a launch() has read, and the command line of this process, are as before."""
    argv, path = list(sys.argv), list(sys.path)
    yield
    sys.argv, sys.path[:] = argv, path
    launch({})


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OPT, trained for a step, and its run folder around it."""
    folder = tmp_path_factory.mktemp("run")
    assert train(folder, folder / "run", "--train.max_steps", "1") == 0
    return folder / "run" / "model"


@pytest.fixture(scope="module")
def example_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where examples run."""
    return tmp_path_factory.mktemp("examples")


def fenced(text: str, *languages: str) -> list[str]:
    """The code blocks of a page in one of the languages."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [body for language, body in blocks if language in languages]


class TestConfigs:
    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
    def test_it_loads_and_reads_back_the_same(self, path: Path, tmp_path: Path) -> None:
        config = load_config(path)
        config.require_model()
        (tmp_path / "resolved.toml").write_text(to_toml(config), encoding="utf-8")
        # The old Python form has free variables; everything else survives.
        assert load_config(tmp_path / "resolved.toml").model_dump() == config.model_dump()

    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
    def test_it_stands_in_the_readme(self, path: Path) -> None:
        assert f"(configs/{path.name})" in README

    def test_all_of_the_issue_are_there(self) -> None:
        names = {path.name for path in CONFIGS}
        models = ("opt-125m", "opt-1.3b", "opt-6.7b", "llama-3.1-8b")
        assert names >= {"quickstart.toml", "gemini_zero.py", *(f"{model}.toml" for model in models)}

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("opt-125m", (768, 3072, 12, 12)),
            ("opt-1.3b", (2048, 8192, 24, 32)),
            ("opt-6.7b", (4096, 16384, 32, 32)),
            ("llama-3.1-8b", None),
        ],
    )
    def test_the_arithmetic_in_its_comments_is_the_projects(self, name: str, shape: tuple[int, ...] | None) -> None:
        text = (ROOT / "configs" / f"{name}.toml").read_text(encoding="utf-8")
        found = re.search(r"([\d.]+) ([MG]) parameters x (\d+) = ([\d.]+) GiB", text)
        assert found is not None, "the comment says how many bytes the host must hold"
        num_parameters = _num_parameters(shape)
        assert float(found[1]) == pytest.approx(
            num_parameters / {"M": 1e6, "G": 1e9}[found[2]], abs=0.05 if found[2] == "M" else 5e-4
        )
        assert int(found[3]) == _bytes_per_parameter(load_config(ROOT / "configs" / f"{name}.toml"))
        assert float(found[4]) == pytest.approx(num_parameters * int(found[3]) / 2**30, rel=0.02)


def _num_parameters(shape: tuple[int, ...] | None) -> int:
    """Counted on a model without memory."""
    from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

    if shape is None:
        config: Any = LlamaConfig(
            vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, tie_word_embeddings=False
        )
    else:
        hidden, ffn, layers, heads = shape
        config = OPTConfig(
            hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=ffn, num_hidden_layers=layers,
            num_attention_heads=heads,
        )  # fmt: skip
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def _bytes_per_parameter(config: Any) -> int:
    """Values and companions, by the formula that placements are made with."""
    spec = ParameterSpec("weight", torch.Size([8]), (1,), torch.bfloat16, True)
    [layout] = build_layout([UnitSpec("unit", (spec,))], 2**20)
    assert (config.precision.dtype, config.optimizer.name) == ("bf16", "adamw")
    gradient_itemsize = 2 if config.train.gradient_accumulation_steps == 1 else 4
    return (
        layout.dtype.itemsize + chunk_facts(layout, ALONE.shard(layout), 8, gradient_itemsize).companion_bytes_per_numel
    )


class TestExamples:
    @pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
    def test_it_runs_as_a_program(self, path: Path, example_folder: Path) -> None:
        assert len(_steps(_run_example(path, example_folder))) == 2

    def test_the_unchanged_loop_gives_the_losses_of_plain_pytorch(self, example_folder: Path, capsys: Output) -> None:
        script = ROOT / "examples" / "own_loop_unchanged.py"
        managed = _steps(_run_example(script, example_folder))
        sys.argv = [script.name, "--steps", "2", "--plain"]
        runpy.run_path(str(script), run_name="__main__")
        assert _steps(capsys.readouterr().out) == managed

    def test_fine_tuning_goes_on_from_a_folder(self, model_folder: Path, tmp_path: Path, capsys: Output) -> None:
        words = ["--model", str(model_folder), "--steps", "2", "--seq-length", "16", "--device-memory", "2MiB"]
        script = str(ROOT / "examples" / "finetune_opt.py")
        assert main(["run", script, *words, "--dtype", "bf16", "--output", str(tmp_path / "out")]) == 0
        assert "device_peak_bytes" in capsys.readouterr().out
        assert (tmp_path / "out" / "model.safetensors").exists()


@cache
def _run_example(path: Path, folder: Path) -> str:
    """What an example prints in two steps."""
    output = ["--output", str(folder / "model")] if path.name == "finetune_opt.py" else []
    words = [sys.executable, str(path), "--steps", "2", *output]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _steps(output: str) -> list[str]:
    """The lines of steps, with loss and gradient norm to the last digit."""
    return [line for line in output.splitlines() if re.match(r"step \d.*loss \d", line)]


def _commands() -> list[str]:
    """Every line of the README's console blocks."""
    return [line for block in fenced(README, "console", "bash") for line in block.splitlines() if line.strip()]


class TestReadme:
    def test_it_has_the_two_commands_and_others(self) -> None:
        assert [line for line in _commands() if line.startswith("make")] == ["make quickstart", "make test"]
        assert {line.split()[1] for line in _commands() if line.startswith("zero ")} >= {
            *("train", "plan", "generate", "export", "run"),
        }
        known = ("make ", "zero ", "python examples/", "python3 -m venv", ". .venv/bin/activate", "pip install")
        assert [line for line in _commands() if not line.startswith(known)] == []

    @pytest.mark.parametrize("command", [line for line in _commands() if line.startswith("make ")])
    def test_make_targets_exist(self, command: str) -> None:
        done = subprocess.run([*shlex.split(command), "-n"], capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "zero train configs/quickstart.toml" in done.stdout or "pytest" in done.stdout

    @pytest.mark.parametrize("command", [line for line in _commands() if line.startswith("zero ")])
    def test_zero_commands_run(
        self, command: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(ROOT)
        assert main(_small(shlex.split(command)[1:], model_folder, tmp_path)) == 0

    @pytest.mark.parametrize("command", [line for line in _commands() if line.startswith("python ")])
    def test_scripts_exist_and_take_these_arguments(self, command: str) -> None:
        _, script, *arguments = shlex.split(command)
        source = (ROOT / script).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in arguments if word.startswith("--"))

    def test_every_command_of_the_table_exists(self, capsys: Output) -> None:
        commands = re.findall(r"^\| `zero (\w+)", README, re.MULTILINE)
        assert len(commands) >= 7
        for command in commands:
            assert main([command, "--help"]) == 0

    def test_the_python_block_runs(
        self, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
    ) -> None:
        block, _ = fenced(README, "python")
        assert "facebook/opt-1.3b" in block
        block = block.replace("facebook/opt-1.3b", str(model_folder)).replace("runs/mine", str(tmp_path / "mine"))
        block = block.replace('"configs/opt-1.3b.toml"', f'"{_on_a_simulated_device(tmp_path)}"')
        rows = [{"input_ids": torch.arange(16), "labels": torch.arange(16)} for _ in range(4)]
        exec(compile(block, "README.md", "exec"), {"train_dataloader": DataLoader(rows, batch_size=2)})  # type: ignore[arg-type]
        assert "device_peak_bytes" in capsys.readouterr().out
        assert (tmp_path / "mine" / "model.safetensors").exists()

    @pytest.mark.parametrize("page", ["README.md", "docs/models.md"])
    def test_what_loads_a_model_runs(self, page: str, model_folder: Path) -> None:
        blocks = fenced((ROOT / page).read_text(encoding="utf-8"), "python")
        [block] = [block for block in blocks if "zero.models.load(" in block]
        for given, instead in (("opt-6.7b", str(model_folder)), ("cuda", "simulated")):
            assert f'"{given}"' in block
            block = block.replace(f'"{given}"', f'"{instead}"')
        names: dict[str, Any] = {}
        exec(compile(block, page, "exec"), names)
        zero.models.loaded(names["model"]).engine.close(keep_values=False)


def _on_a_simulated_device(folder: Path) -> Path:
    """The README's config, as it is, but for the device."""
    config = load_config(ROOT / "configs" / "opt-1.3b.toml", {"device": {"type": "simulated", "memory": "2MiB"}})
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    return folder / "config.toml"


def _small(words: list[str], model_folder: Path, folder: Path) -> list[str]:
    """A command of the README, made small: nothing from the network, few steps, results in a folder of the test."""
    run = model_folder.parent
    words = [
        word.replace("runs/quickstart", str(run)).replace("runs/exported", str(folder / "exported")) for word in words
    ]
    if words[0] in ("train", "plan") and "quickstart" not in words[1]:
        if "--on" in words:
            card = words.index("--on")
            assert words[card + 1] in NAMED
            del words[card : card + 2]
        return ["validate", *words[1:]]  # a model of the Hub: the file and the keys are checked
    if words[0] == "train":
        small = ("--train.max_steps", "1", "--data.max_samples", "4", "--data.eval_fraction", "0")
        return [*words, *small, "--train.output_dir", str(folder / "run")]
    if words[0] == "run":
        return [*words[: words.index("--steps") + 1], "1", "--output", str(folder / "out")]
    return words


class TestPages:
    def test_the_config_reference_is_up_to_date(self) -> None:
        made = runpy.run_path(str(ROOT / "docs" / "generate.py"))["reference_text"]()
        assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == made, "run `make docs`"

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
    def test_links_lead_somewhere(self, page: Path) -> None:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" not in target and not target.startswith("#"):
                assert (page.parent / target.partition("#")[0]).exists(), target

    @pytest.mark.parametrize("package", ["gemini", "zero"])
    def test_folder_guides_have_a_line_per_file(self, package: str) -> None:
        listed = set(
            re.findall(r"^\| `([\w/]+(?:\.py)?)/?` \|", (ROOT / package / "README.md").read_text(), re.MULTILINE)
        )
        files = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
        folders = {path.parent.name + "/" for path in (ROOT / package).glob("*/*.py")}
        assert listed == files | {name.rstrip("/") for name in folders} or listed == files | folders

    def test_measurements_have_the_commands_that_repeat_them(self) -> None:
        text = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
        sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
        assert sections
        for section in sections:
            assert fenced(section, "console"), section.splitlines()[0]
            for line in "".join(fenced(section, "console")).splitlines():
                named = [word for word in shlex.split(line) if word.endswith((".py", ".toml"))]
                assert all((ROOT / name).exists() for name in named), line

    def test_nothing_of_one_machine_is_in_the_pages(self) -> None:
        for page in [*PAGES, *CONFIGS]:
            assert not re.search(r"/home/\w|/tmp/\w|/root\b", page.read_text(encoding="utf-8")), page
