"""``zero generate`` for one prompt and for a file of them."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from cli_case import train

from zero.cli.main import main

Output = pytest.CaptureFixture[str]
CAP = ("--device.type", "simulated", "--device.memory", "2MiB")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of 32 positions."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    assert train(folder, folder / "run", "--train.max_steps", "1") == 0
    return str(folder / "run" / "model")


def refused(words: list[str], output: Output, *fragments: str) -> None:
    assert main(words) == 2
    said = output.readouterr().err
    assert "Traceback" not in said
    for fragment in fragments:
        assert fragment in said


class TestOnePrompt:
    def test_all_settings_at_once(self, model: str, capsys: Output) -> None:
        words = [
            "--prompt",
            "The sea",
            "--max-new-tokens",
            "5",
            "--temperature",
            "1.5",
            "--top-k",
            "50",
            "--top-p",
            "0.9",
        ]
        more = ["--repetition-penalty", "1.2", "--seed", "3", "--stop", "zq", "--stop", "qz"]
        said = []
        for _ in range(2):
            assert main(["generate", model, *CAP, *words, *more]) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == said[1]
        assert said[0].startswith("The sea")

    def test_several_answers_and_logprobs(self, model: str, capsys: Output) -> None:
        words = ["--prompt", "The", "--max-new-tokens", "3", "--temperature", "2", "-n", "2", "--logprobs", "1"]
        assert main(["generate", model, *CAP, *words]) == 0
        lines = capsys.readouterr().out.split("\n")
        assert [line[:7] for line in lines if line.startswith("[")] == ["[1] The", "[2] The"]
        assert sum("  of  " in line for line in lines) == 6

    @pytest.mark.parametrize(
        ("words", "fragment"),
        [
            (["-n", "0"], "-n 0: must be at least 1"),
            (["--repetition-penalty", "0"], "repetition_penalty = 0"),
            (["--logprobs", "1000"], "logprobs = 1000"),
            (["--stop", ""], "0 characters"),
            (["--stop", "\udce9"], "--stop: not UTF-8"),
            (["--out", "x.jsonl"], "--out is for"),
            (["--prompt", "a", "--prompts", "b"], "give one of them"),
            (["--prompts", "no-such-file"], "--prompts no-such-file: No such file"),
        ],
    )
    def test_what_cannot_be(self, words: list[str], fragment: str, model: str, capsys: Output) -> None:
        refused(["generate", model, *CAP, *words], capsys, fragment)


class TestFile:
    def test_lines_of_text(self, model: str, tmp_path: Path, capsys: Output) -> None:
        prompts = [f"The word {number}" + " and so on" * (number % 3) for number in range(12)]
        (tmp_path / "in.txt").write_text("\n".join(prompts) + "\n\n")
        words = ["--prompts", str(tmp_path / "in.txt"), "--out", str(tmp_path / "out.jsonl"), "--max-new-tokens", "4"]
        assert main(["generate", model, *CAP, *words]) == 0
        answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [answer["prompt"] for answer in answers] == prompts
        capsys.readouterr()
        for answer in answers[:3]:
            assert main(["generate", model, *CAP, "--prompt", answer["prompt"], "--max-new-tokens", "4"]) == 0
            assert capsys.readouterr().out == answer["prompt"] + answer["choices"][0]["text"] + "\n"
        refused(["generate", model, *CAP, *words], capsys, "is there already")

    def test_lines_of_json(self, model: str, tmp_path: Path, capsys: Output) -> None:
        given = [
            {"prompt": "The", "max_new_tokens": 2, "n": 2, "temperature": 1.0, "seed": 4},
            {"prompt": "The é", "logprobs": 2},
            {"prompt": "word " * 50},
            {"prompt": "The", "max_new_tokens": 31},
        ]
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in given))
        assert main(["generate", model, *CAP, "--prompts", str(tmp_path / "in.jsonl")]) == 1
        answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [len(answer.get("choices", ())) for answer in answers] == [2, 1, 0, 0]
        assert [choice["num_tokens"] for choice in answers[0]["choices"]] == [2, 2]
        assert answers[1]["num_prompt_tokens"] + answers[1]["choices"][0]["num_tokens"] <= 32
        assert len(answers[1]["choices"][0]["logprobs"][0]["top"]) == 2
        assert "the model reads at most 32" in answers[2]["error"]
        assert "allowed is at most" in answers[3]["error"]

    @pytest.mark.parametrize(
        ("line", "fragment"),
        [
            ("{", "no JSON"),
            ("[]", 'an object with "prompt"'),
            ('{"prompt": 1}', 'an object with "prompt"'),
            ('{"prompt": "a", "max_tokens": 1}', "'max_tokens' is unknown"),
            ('{"prompt": "a", "top_p": 2}', "top_p = 2"),
            ('{"prompt": "a", "n": 0}', "n = 0"),
            ('{"prompt": "a\\ud800"}', "prompt: not UTF-8 at character 2"),
            ('{"prompt": "a", "temperature": 1%s}' % ("0" * 400), "must be a finite number"),
        ],
    )
    def test_a_wrong_line_is_named_before_anything_runs(
        self, line: str, fragment: str, model: str, tmp_path: Path, capsys: Output
    ) -> None:
        (tmp_path / "in.jsonl").write_text('{"prompt": "fine"}\n\n' + line + "\n")
        words = ["--prompts", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out")]
        refused(["generate", model, *CAP, *words], capsys, "in.jsonl, line 3: ", fragment)
        assert not (tmp_path / "out").exists()

    def test_an_empty_file(self, model: str, tmp_path: Path, capsys: Output) -> None:
        (tmp_path / "in.txt").write_text("\n \n")
        refused(["generate", model, *CAP, "--prompts", str(tmp_path / "in.txt")], capsys, "no prompt is in it")

    def test_an_output_that_nothing_was_written_to_is_not_left(
        self, model: str, tmp_path: Path, capsys: Output
    ) -> None:
        """Else it would be in the way of the next try."""
        (tmp_path / "in.txt").write_text("The\n")
        words = ["--prompts", str(tmp_path / "in.txt"), "--out", str(tmp_path / "out")]
        refused(["generate", model, "--device.type", "simulated", "--device.memory", "1KiB", *words], capsys, "not fit")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("words", [["--prompts"], []], ids=["file", "one"])
    def test_an_output_that_is_full(
        self, words: list[str], model: str, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "in.txt").write_text("The\n")
        with contextlib.suppress(OSError), open("/dev/full", "w") as full:
            monkeypatch.setattr("sys.stdout", full)
            code = main(["generate", model, *CAP, *words, *([str(tmp_path / "in.txt")] if words else [])])
        said = capsys.readouterr().err
        assert code == 1
        assert said.rstrip().endswith("zero: stdout: No space left on device")
        assert "Traceback" not in said
