"""Bad configs and bad data through the command line: exit code 2, words to act on, no traceback, nothing written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import config_cases as cases
import pytest
from cli_case import listing, write_config
from config_helpers import has_line
from data_case import chat_tokenizer
from test_data_bad_files import CASES as BAD_DATA

from zero.cli.main import main
from zero.models import build

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder: what a run would write goes there, whatever the config says."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems_through(command: str, words: list[str], folder: Path, output: Output) -> list[str]:
    """The lines on stderr of a command that must refuse its input and leave the folder as it is."""
    before = listing(folder)
    code = main([command, *words])
    said = output.readouterr()
    assert code == 2, said
    assert said.err.startswith("zero: "), said.err
    assert said.out == ""
    assert "Traceback" not in said.err
    assert listing(folder) == before
    return said.err.splitlines()


BAD_CONFIGS = [
    *((name, "bad.toml", text.encode(), fragments) for name, text, fragments in cases.BAD_TOML),
    *((name, "bad.toml", f"[model.config]\n{text}".encode(), fragments) for name, text, fragments in cases.BAD_MODEL),
    *cases.BAD_FILES,
]


@pytest.mark.parametrize("command", ["train", "plan", "validate"])
@pytest.mark.parametrize(
    ("file", "data", "fragments"), [case[1:] for case in BAD_CONFIGS], ids=[c[0] for c in BAD_CONFIGS]
)
def test_bad_configs(command: str, file: str, data: bytes, fragments: list[str], folder: Path, capsys: Output) -> None:
    (folder / file).write_bytes(data)
    problems = problems_through(command, [file], folder, capsys)
    assert has_line(problems, fragments), problems


@pytest.mark.parametrize(("words", "fragments"), cases.BAD_ARGUMENTS, ids=[" ".join(c[0]) for c in cases.BAD_ARGUMENTS])
def test_bad_keys_on_the_command_line(words: list[str], fragments: list[str], folder: Path, capsys: Output) -> None:
    problems = problems_through("train", [write_config(folder), *words], folder, capsys)
    assert has_line(problems, fragments), problems


# The config's own check of paths finds these before the data are looked at, in words of its own.
FOUND_IN_THE_CONFIG = {
    "missing file",
    "misspelt file",
    "missing folder above",
    "dangling link",
    "nothing named",
    "blank name",
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(name: str, folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    make, pattern = BAD_DATA[name]
    (folder / "data").mkdir()
    given: Any = make(folder / "data")
    monkeypatch.setattr(build, "builtin_tokenizer", lambda *_: chat_tokenizer())  # with a template, and made once
    config = write_config(folder, data={"train": given, "max_samples": 10**6}, model={"tokenizer": "builtin"})
    message = "\n".join(problems_through("train", [config], folder, capsys))
    expected = pattern.replace("{at}", re.escape(str(given)))
    found = re.search(expected, message, re.DOTALL)
    if name in FOUND_IN_THE_CONFIG:
        assert found or "data.train" in message, message
    else:
        assert found, message


def test_there_are_as_many_as_promised() -> None:
    assert len(BAD_CONFIGS) + len(cases.BAD_ARGUMENTS) >= 60
    assert len(BAD_DATA) >= 20
