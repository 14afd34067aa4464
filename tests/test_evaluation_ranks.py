"""`zero eval` on several ranks: each has its share of the passes, and all get what one process gets."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_case import train
from test_evaluation_passes import sequences
from test_launch import finish, start

import zero
from tests.generation_case import Letters, model_of, prompts
from tests.ranks import run_ranks
from zero.cli.main import main
from zero.cli.parser import make_parser
from zero.config.loading import load_config
from zero.evaluation.scoring import BatchLimits, Scorer
from zero.evaluation.writing import Prompt, Writer
from zero.generation import Sampling

DEVICES: dict[str, dict[str, Any]] = {"host": {"type": "cpu"}, "small": {"type": "simulated", "memory": "400KiB"}}
CONVERSATION = {"turns": ["Hi!", "Hello, how are you?", "Fine.", "So am I.", "Where were you?", "At sea."]}


def _evaluate(device: str, num: int) -> dict[str, Any]:
    """What this rank finds, and how many passes it made for that."""
    torch.set_num_threads(1)
    config = {"device": DEVICES[device], "parallel": {"replicate": "1KiB"}}
    engine, *_ = zero.initialize(model_of("opt-pre-norm"), config=config)
    num_passes = 0

    def count(*_: Any) -> None:
        nonlocal num_passes
        num_passes += 1

    handle = engine.module.register_forward_pre_hook(count)
    scores = Scorer(engine, BatchLimits.of(3)).scores(sequences(num, 96, 40, seed=1))
    handle.remove()
    settings = [Sampling(max_new_tokens=5), Sampling(max_new_tokens=7, temperature=0.9, seed=2)]
    given = [Prompt(prompt, settings[i % 2]) for i, prompt in enumerate(prompts(num, seed=3))]
    writer = Writer(engine, Letters())
    texts = writer.write(given)
    engine.check_integrity()
    engine.close(keep_values=False)
    return {
        "scores": [(score.loglikelihood, score.is_greedy) for score in scores],
        "texts": texts,
        "num_new": writer.num_new,
        "num_passes": num_passes,
    }


@pytest.mark.parametrize(("device", "num"), [("host", 11), ("small", 12), ("small", 1)])
def test_ranks_find_what_one_process_does(device: str, num: int) -> None:
    alone = _evaluate(device, num)
    ranks = run_ranks(_evaluate, 2, device, num)
    for found in ranks:
        assert found["texts"] == alone["texts"]
        assert found["num_new"] == alone["num_new"]
        assert found["scores"] == alone["scores"], "the same batches give the same bits"
    assert [found["num_passes"] for found in ranks] == ([2, 2] if num > 1 else [1, 0])
    assert alone["num_passes"] == (4 if num > 1 else 1)


def _different(num: int) -> str:
    engine, *_ = zero.initialize(model_of("opt-pre-norm"), config={"device": DEVICES["host"]})
    scorer = Scorer(engine)
    with pytest.raises(zero.errors.UserError, match="evaluate different things") as raised:
        scorer.scores(sequences(num + torch.distributed.get_rank(), 96, 10))
    engine.close(keep_values=False)
    return str(raised.value)


def test_different_work_is_refused() -> None:
    for said in run_ranks(_different, 2, 3):
        assert "[3, 4]" in said


def _command(words: list[str]) -> str:
    """What it prints."""
    from zero.cli.evaluate import evaluate_model
    from zero.launcher import join

    torch.set_num_threads(1)
    arguments = make_parser()[0].parse_args(words)
    config = load_config(
        {"model": {"name_or_path": arguments.model}, "device": DEVICES["small"] | {"memory": "700KiB"}}
    )
    join(config)
    zero.ranks.join_ranks(config)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluate_model(config, arguments)
    return printed.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """A model's folder, and the words that name a text and a file of conversations."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    assert train(folder, folder / "run", "--train.max_steps", "1") == 0
    (folder / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 12)
    (folder / "talk.jsonl").write_text(f"{json.dumps(CONVERSATION)}\n" * 2)
    words = ["--text", str(folder / "text.txt"), "--stride", "8", "--batch-size", "4"]
    return str(folder / "run" / "model"), [*words, "--dialogue", str(folder / "talk.jsonl")]


def _same(found: dict[str, Any], alone: dict[str, Any]) -> None:
    for part in ("perplexity", "dialogue"):
        assert found[part]["num_tokens"] == alone[part]["num_tokens"]
        assert found[part]["loglikelihood"] == pytest.approx(alone[part]["loglikelihood"], rel=1e-7)
    assert found["dialogue"]["unigram_f1"] == alone["dialogue"]["unigram_f1"]


def test_the_command_on_ranks(files: tuple[str, list[str]], tmp_path: Path) -> None:
    model, words = files
    out = [tmp_path / "alone.json", tmp_path / "ranks.json"]
    _command(["eval", model, *words, "--out", str(out[0])])
    first, second = run_ranks(_command, 2, ["eval", model, *words, "--out", str(out[1])])
    assert "perplexity" in first
    assert "\nranks  " in first
    assert not second, "the second rank prints nothing"
    alone, found = (json.loads(path.read_text()) for path in out)
    _same(found, alone)
    assert found["cost"].keys() == alone["cost"].keys()


@pytest.mark.full
def test_two_processes_from_the_command_line(files: tuple[str, list[str]], tmp_path: Path) -> None:
    model, words = files
    options = ["--device.type", "simulated", "--device.memory", "700KiB"]
    assert main(["eval", model, *words, *options, "--out", str(tmp_path / "alone.json")]) == 0
    eval_words = ("-m", "zero", "eval", model, *words, *options, "--nprocs", "2", "--out", "ranks.json")
    code, out, err = finish(start(tmp_path, *eval_words))
    assert code == 0, err
    assert out.count("perplexity") == 2, "of the text and of the answers, once each"
    _same(json.loads((tmp_path / "ranks.json").read_text()), json.loads((tmp_path / "alone.json").read_text()))
    code, out, err = finish(start(tmp_path, "-m", "zero", "eval", model, "--text", "none.txt", "--nprocs", "2"))
    assert (code, out) == (2, "")
    assert err.count("none.txt") == 1, err
