"""The adapter to lm-eval, with the real package, on a task of local files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_case import train

from zero import initialize
from zero.cli.main import main

pytest.importorskip("lm_eval", reason='lm-eval is not installed: pip install -c constraints.txt -e ".[eval]"')

Output = pytest.CaptureFixture[str]

TASK = """\
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {folder}/colours.jsonl
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
fewshot_split: validation
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one short run: a model of 32 positions."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    assert train(folder, folder / "run", "--train.max_steps", "1") == 0
    return folder / "run"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with one task, of ten questions."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [{"question": f"Number {i} is", "choices": ["red", "dark blue"], "label": i % 2} for i in range(10)]
    (folder / "colours.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "colours.yaml").write_text(TASK.format(folder=folder))
    return folder


def adapter(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    from zero.evaluation.harness import EngineLM
    from zero.evaluation.scoring import Scorer
    from zero.evaluation.writing import Writer

    engine, *_ = initialize(model, config={"device": {"type": "simulated", "memory": "8MiB"}})
    return EngineLM(engine, Scorer(engine), Writer(engine, tokenizer), tokenizer, 32), engine


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


class TestAdapter:
    def test_it_gives_what_lm_evals_own_model_gives(self, run: Path) -> None:
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(run / "model").eval()
        tokenizer = AutoTokenizer.from_pretrained(run / "model")
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=32, device="cpu")
        pairs = [("The cat", " sat"), ("The cat ", "sat down"), ("", "Alone"), ("x " * 60, " and y"), ("a b", " c d e")]
        requests = [request(*pair) for pair in pairs]
        texts = [request("One text."), request("Many words in a text that goes on. " * 8)]
        expected = theirs.loglikelihood(requests, disable_tqdm=True)
        # Where its tokenizer puts </s> before a text, lm-eval's own model puts another one there and scores the second.
        bare = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=32, device="cpu", add_bos_token=False
        )
        expected_rolling = bare.loglikelihood_rolling(texts, disable_tqdm=True)
        expected_text = theirs.generate_until([request("The", {"until": ["\n"], "max_gen_toks": 6})], disable_tqdm=True)
        ours, engine = adapter(model.requires_grad_(False), tokenizer)
        for (value, greedy), (wanted, wanted_greedy) in zip(
            ours.loglikelihood(requests, disable_tqdm=True), expected, strict=True
        ):
            assert value == pytest.approx(float(wanted), rel=1e-5)
            assert greedy == bool(wanted_greedy)
        assert ours.loglikelihood_rolling(texts) == pytest.approx(
            [float(value) for value in expected_rolling], rel=2e-2
        )
        assert ours.loglikelihood_rolling(texts[:1]) == pytest.approx([float(expected_rolling[0])], rel=1e-5)
        assert ours.generate_until([request("The", {"until": ["\n"], "max_gen_toks": 6})]) == expected_text
        first = expected_text[0].strip()[:1]
        assert first not in ours.generate_until([request("The", {"until": [first], "max_gen_toks": 6})])[0]
        engine.close()

    def test_many_texts_are_written_as_lm_evals_own_model_writes_them(self, run: Path) -> None:
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(run / "model").eval()
        tokenizer = AutoTokenizer.from_pretrained(run / "model")
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=32, device="cpu")
        options = [
            {"until": ["\n"], "max_gen_toks": 6},
            {"until": "e", "max_new_tokens": 9, "do_sample": False, "temperature": 0.0},
            {"until": [], "max_tokens": 3},
            {"max_gen_toks": 4, "temperature": 0.0, "top_p": 0.5},
            {"until": ["zz", "\n\n"], "max_gen_toks": 8, "do_sample": False, "repetition_penalty": 1.4},
        ]
        texts = ["The", "It was a bright cold day in", "x " * 60, "One"]
        requests = [request(text, dict(option)) for option in options for text in texts]
        expected = theirs.generate_until(requests, disable_tqdm=True)
        ours, engine = adapter(model.requires_grad_(False), tokenizer)
        found = ours.generate_until(requests)
        engine.close()
        # Of a character that is cut off at the end there is less in ours.
        assert [text.rstrip("\ufffd") for text in found] == [text.rstrip("\ufffd") for text in expected]

    def test_what_is_drawn_is_each_requests_own(self, run: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(run / "model").eval().requires_grad_(False)
        ours, engine = adapter(model, AutoTokenizer.from_pretrained(run / "model"))
        drawn = [request("The", option) for option in ({"do_sample": True}, {"temperature": 0.8}, {"temperature": 0.8})]
        first = ours.generate_until(drawn)
        assert ours.generate_until(drawn) == first, "the same again"
        assert first[1] != first[2], "the same prompt twice"
        greedy = ours.generate_until([request("The", {"do_sample": False, "temperature": 0.8}), request("The", {})])
        assert greedy[0] == greedy[1] != first[0]
        engine.close()

    def test_any_number_of_stops_of_any_length(self, run: Path, caplog: pytest.LogCaptureFixture) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(run / "model").eval().requires_grad_(False)
        ours, engine = adapter(model, AutoTokenizer.from_pretrained(run / "model"))
        (text,) = ours.generate_until([request("The", {"max_gen_toks": 12})])
        stops = [*(f"never {i}" for i in range(20)), "x" * 300, text[3:6], ""]
        (cut,) = ours.generate_until([request("The", {"max_gen_toks": 12, "until": stops, "num_beams": 1})])
        engine.close()
        assert len(text) > 6
        assert cut == text[: text.find(text[3:6])]
        assert "not read here: num_beams" in caplog.text

    def test_rolling_scores_each_token_once(self, run: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(run / "model").eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.zero_()  # every token is as likely as any other
        tokenizer = AutoTokenizer.from_pretrained(run / "model")
        text = "Many words in a text that goes on. " * 8
        ours, engine = adapter(model, tokenizer)
        num_tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert ours.loglikelihood_rolling([request(text)]) == pytest.approx([-num_tokens * math.log(512)])
        engine.close()


class TestCommand:
    def test_a_task_of_local_files(self, run: Path, tasks: Path, tmp_path: Path, capsys: Output) -> None:
        out = tmp_path / "out.json"
        words = ["eval", str(run / "model"), "--tasks", "colours", "--task-path", str(tasks), "--shots", "1"]
        assert main([*words, "--limit", "6", "--out", str(out)]) == 0
        assert "colours, acc" in capsys.readouterr().out
        found = json.loads(out.read_text())["tasks"]
        assert found["num_shots"] == 1
        assert found["average"] is None
        by_metric = {score["metric"]: score["value"] for score in found["scores"]}
        assert set(by_metric) == {"acc", "acc_norm"}
        assert by_metric["acc"] in [i / 6 for i in range(7)]

    def test_unknown_tasks_are_refused(self, run: Path, capsys: Output) -> None:
        assert main(["eval", str(run / "model"), "--tasks", "piqua"]) == 2
        assert "neither a task of the OPT paper" in capsys.readouterr().err
        assert main(["eval", str(run / "model"), "--tasks", "piqa", "--task-path", "nowhere"]) == 2
        assert "no such folder" in capsys.readouterr().err

    def test_the_papers_tasks_are_all_known(self) -> None:
        from zero.evaluation.tasks import PAPER_TASKS, TaskWish, check_tasks

        check_tasks(TaskWish(list(PAPER_TASKS.values())))

    def test_a_hub_that_does_not_answer_is_said(self, run: Path, capsys: Output) -> None:
        assert main(["eval", str(run / "model"), "--tasks", "PIQA", "--limit", "1"]) == 2
        assert "cannot be had" in capsys.readouterr().err
