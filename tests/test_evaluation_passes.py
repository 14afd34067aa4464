"""The passes of `zero eval`: likelihoods without logits, answers from one generator, and batches that fit the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli_case import write_config

from gemini.plan import DoesNotFitError
from tests.generation_case import HOST, KINDS, SMALL, Letters, model_of, prompts
from zero import initialize
from zero.cli.main import main
from zero.config.loading import load_config
from zero.dryrun import Scoring
from zero.engine import Engine
from zero.evaluation.scoring import MOST_TOKENS, BatchLimits, Scorer, Sequence
from zero.evaluation.writing import Prompt, Writer, _limits
from zero.generation import Sampling
from zero.generation.facts import facts_of
from zero.inference import make_inference_engine
from zero.likelihoods import most_logits_on, scoring, scoring_inputs

Output = pytest.CaptureFixture[str]
MANY = 8192
"""Tokens of a vocabulary whose logits are most of what a pass without pieces needs."""


def wide_model() -> Any:
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=MANY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def plain_score(model: Any, sequence: Sequence) -> tuple[float, bool]:
    """By plain torch, one sequence at a time."""
    with torch.no_grad():
        logits = model(torch.tensor([sequence.tokens[:-1]])).logits[0, -sequence.num_scored :].double()
    wanted = torch.tensor(sequence.tokens[-sequence.num_scored :])
    value = logits.log_softmax(-1).gather(1, wanted[:, None]).sum()
    return float(value), bool((logits.argmax(1) == wanted).all())


def sequences(num: int, num_tokens: int, longest: int, seed: int = 0) -> list[Sequence]:
    source = torch.Generator().manual_seed(seed)

    def number(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=source))

    def one(length: int) -> Sequence:
        tokens = torch.randint(4, num_tokens, (length,), generator=source).tolist()
        return Sequence(tuple(tokens), number(1, length - 1))

    return [one(number(2, longest)) for _ in range(num)]


def inferring(model: Any, memory: str, expected: Scoring) -> tuple[Engine, int]:
    """An engine planned for scoring, and the rows it is planned for."""
    config = load_config({"device": {"type": "simulated", "memory": memory}})
    engine, outlook = make_inference_engine(model, config, expected=expected, fewer=True)
    return engine, outlook.num_rows


class TestLikelihoods:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("device", [HOST, SMALL], ids=["host", "small"])
    def test_they_are_those_of_the_logits(self, kind: str, device: dict[str, Any]) -> None:
        given = sequences(9, 96, 40, seed=2)
        plain = model_of(kind)
        wanted = [plain_score(plain, sequence) for sequence in given]
        engine, *_ = initialize(model_of(kind), config={"device": device})
        found = Scorer(engine, BatchLimits.of(4)).scores(given)
        engine.check_integrity()
        engine.close()
        for score, (value, is_greedy) in zip(found, wanted, strict=True):
            assert score.loglikelihood == pytest.approx(value, rel=1e-6)
            assert score.is_greedy == is_greedy

    def test_what_is_likeliest_is_greedy(self) -> None:
        model = model_of("llama")
        start = prompts(1, longest=8)[0]
        written = model.generate(torch.tensor([start]), max_new_tokens=6, min_new_tokens=6, do_sample=False)[0].tolist()
        engine, *_ = initialize(model, config={"device": HOST})
        other = [*written[:-1], 4 + (written[-1] - 3) % 90]
        found = Scorer(engine).scores([Sequence(tuple(tokens), 6) for tokens in (written, other)])
        engine.close()
        assert [score.is_greedy for score in found] == [True, False]

    def test_the_model_is_left_as_it_was(self) -> None:
        model = model_of("llama")
        tokens = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            before = model(tokens).logits
        with pytest.raises(ZeroDivisionError), scoring(model, torch.arange(3), tokens[0], 96):
            raise ZeroDivisionError
        assert "forward" not in model.__dict__
        assert "forward" not in model.lm_head.__dict__
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, before)

    def test_a_model_that_wraps_its_own_forward_keeps_the_wrapper(self) -> None:
        model = model_of("llama")
        inner, calls = model.forward, []

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return inner(*args, **kwargs)

        model.forward = wrapper
        tokens = torch.tensor([[5, 6, 7]])
        with torch.no_grad(), scoring(model, torch.arange(2), tokens[0, 1:], 96):
            found = model(**scoring_inputs(model, tokens, torch.ones_like(tokens)))
        assert found.values.shape == (2,)
        assert (calls, model.forward) == ([1], wrapper)

    def test_logits_larger_than_the_device(self) -> None:
        given = sequences(8, MANY, 100, seed=3)
        plain = wide_model()
        logits_bytes = max(sequence.num_read for sequence in given) * MANY * 4
        engine, num_rows = inferring(wide_model(), "2600KiB", Scoring(8, 99, most_logits=1))
        assert logits_bytes > engine.device.capacity_bytes
        found = Scorer(engine, BatchLimits.of(num_rows)).scores(given)
        assert engine.device.memory().peak_bytes <= engine.device.capacity_bytes
        engine.check_integrity()
        engine.close()
        for score, sequence in zip(found, given, strict=True):
            assert score.loglikelihood == pytest.approx(plain_score(plain, sequence)[0], rel=1e-6)


class TestBatches:
    def test_as_many_as_make_so_many_tokens(self) -> None:
        assert BatchLimits().num_rows(MOST_TOKENS // 8) == 8
        assert BatchLimits().num_rows(10 * MOST_TOKENS) == 1
        assert BatchLimits().num_rows(1) == 512
        assert BatchLimits.of(3).num_rows(1 << 40) == 3

    @pytest.mark.parametrize("memory", ["200KiB", "300KiB", "4MiB"])
    def test_what_the_plan_says_fits_does(self, memory: str) -> None:
        """Fewer rows where not all fit, and then no batch is halved, and nothing taken off the device in a hurry."""
        most = most_logits_on(make_device_of(memory))
        engine, num_rows = inferring(model_of("opt-pre-norm"), memory, Scoring(16, 60, most_logits=most))
        assert (num_rows < 16) == (memory != "4MiB")
        scorer = Scorer(engine, BatchLimits.of(num_rows))
        limit = scorer.most_tokens
        scorer.scores([Sequence(tuple(range(4, 65)), 60)] * 33)
        assert scorer.most_tokens == limit
        assert engine.device.memory().peak_bytes <= engine.device.capacity_bytes
        engine.close()

    def test_a_text_that_does_not_fit_alone_is_refused_before_the_first_pass(self) -> None:
        with pytest.raises(DoesNotFitError, match="smallest change that would fit: device.memory of at least"):
            inferring(model_of("opt-pre-norm"), "60KiB", Scoring(16, 60, most_logits=96))

    def test_the_command_says_what_would_help(self, tmp_path: Path, capsys: Output) -> None:
        config = write_config(tmp_path, train={"output_dir": str(tmp_path / "run"), "max_steps": 1})
        assert main(["train", config]) == 0
        text = tmp_path / "text.txt"
        text.write_text("It was a bright cold day in April. " * 20)
        words = ["eval", str(tmp_path / "run" / "model"), "--text", str(text), "--device.type", "simulated"]
        capsys.readouterr()
        assert main([*words, "--device.memory", "150KiB"]) == 2
        said = capsys.readouterr().err
        assert "smallest change that would fit: device.memory of at least" in said
        assert "--window N: tokens read at a time, now 32" in said
        assert "Traceback" not in said
        assert main([*words, "--device.memory", "400KiB"]) == 0
        shown = capsys.readouterr().out
        for name in ("speed, read", "device capacity", "device peak, predicted", "device peak, measured", "host"):
            assert f"\n{name} " in shown


def make_device_of(memory: str) -> Any:
    from zero.setup import make_device

    return make_device(load_config({"device": {"type": "simulated", "memory": memory}}))


class TestWriter:
    @pytest.mark.parametrize("device", [HOST, SMALL], ids=["host", "small"])
    def test_answers_are_those_of_generate_in_the_order_of_the_prompts(self, device: dict[str, Any]) -> None:
        plain, given, letters = model_of("opt-pre-norm"), prompts(9, seed=4), Letters()
        wanted = []
        for prompt in given:
            out = plain.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=1)
            wanted.append(letters.decode(out[0, len(prompt) :].tolist()))
        engine, *_ = initialize(model_of("opt-pre-norm"), config={"device": device})
        writer = Writer(engine, letters)
        assert writer.write([Prompt(prompt, Sampling(max_new_tokens=6)) for prompt in given]) == wanted
        assert 0 < writer.num_new <= 9 * 6
        assert engine.device.memory().non_model_bytes <= 4096, "keys and values are left on the device"
        engine.check_integrity()
        engine.close()

    def test_the_model_crosses_the_link_once_for_all_prompts(self) -> None:
        def streamed_bytes(num: int) -> int:
            device = {"type": "simulated", "memory": "150KiB"}
            engine, *_ = initialize(model_of("opt-pre-norm"), config={"device": device})
            writer = Writer(engine, Letters())
            writer.write([Prompt([7, 8, 9, 10], Sampling(max_new_tokens=6, stop=()))] * num)
            moved_bytes = engine.manager.transfer.h2d_bytes
            engine.close()
            return moved_bytes

        assert streamed_bytes(12) < 2 * streamed_bytes(1)

    def test_keys_and_values_that_the_device_cannot_hold_lie_on_the_host(self) -> None:
        model = model_of("llama")
        facts = facts_of(model, Letters())
        row_bytes = 64 * facts.position_bytes * 5 // 4
        for memory_bytes, on_host in ((4 * row_bytes + 4, False), (4 * row_bytes - 4, True)):
            device = make_device_of(f"{memory_bytes}B")
            limits = _limits(facts, device, 50, 1)
            assert limits.cache_on_host == on_host
            assert (limits.max_cache_bytes or 0) >= row_bytes
            assert limits.max_tokens == 50
        engine, *_ = initialize(model, config={"device": {"type": "simulated", "memory": "116KiB"}})
        assert _limits(facts, engine.device, 60, 1).cache_on_host
        prompt = prompts(1, longest=50)[0]
        found = Writer(engine, Letters()).write([Prompt(prompt, Sampling(max_new_tokens=60 - len(prompt)))])
        engine.close()
        plain = model_of("llama").generate(
            torch.tensor([prompt]), max_new_tokens=60 - len(prompt), do_sample=False, pad_token_id=1
        )
        assert found == [Letters().decode(plain[0, len(prompt) :].tolist())]

    def test_nothing_to_write(self) -> None:
        engine, *_ = initialize(model_of("llama"), config={"device": HOST})
        assert Writer(engine, Letters()).write([]) == []
        engine.close()
