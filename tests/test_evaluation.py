"""`zero eval`: every token once, the same numbers as plain torch, and published ones beside them."""

from __future__ import annotations

import contextlib
import errno
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_case import TINY, train, write_config
from hypothesis import given
from hypothesis import strategies as st

from zero import initialize
from zero.cli.main import main
from zero.errors import UserError
from zero.evaluation import references
from zero.evaluation.dialogue import (
    evaluate_dialogues,
    normalised_words,
    prepare_dialogues,
    read_dialogues,
    unigram_f1,
)
from zero.evaluation.perplexity import Text, check_window, text_perplexity, text_windows, windows
from zero.evaluation.scoring import BatchLimits, Scorer, Sequence
from zero.evaluation.tasks import PAPER_TASKS, average_accuracy, task_names
from zero.evaluation.writing import Writer

Output = pytest.CaptureFixture[str]
CAP = ("--device.type", "simulated", "--device.memory", "8MiB")
LINES = (
    "The quick brown fox jumps over the lazy dog.\n = Heading = \n\nIt was a bright cold day in April , and so on .\n"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one short run: a model of 32 positions."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    assert train(folder, folder / "run", "--train.max_steps", "1") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def plain(run: Path) -> tuple[Any, Any]:
    """The same model as transformers loads it, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run / "model"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(LINES * 3, encoding="utf-8")
    return path


def straightforward(plain: tuple[Any, Any], text: str, window: int, stride: int) -> tuple[float, int]:
    """Sum of log-likelihoods and number of tokens, one window at a time, in float64 by plain torch."""
    model, tokenizer = plain
    tokens = tokenizer(text)["input_ids"]  # begins with </s>
    total, scored = 0.0, 1
    while scored < len(tokens):
        stop = min(len(tokens), (scored + stride) if scored > 1 else window + 1)
        start = max(0, stop - 1 - window)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens[start : stop - 1]])).logits[0].double()
        for target in range(scored, stop):
            total += float(logits[target - 1 - start].log_softmax(-1)[tokens[target]])
        scored = stop
    return total, len(tokens) - 1


def evaluate(run: Path, folder: Path, *words: str) -> dict[str, Any]:
    """``zero eval`` of the run's model; what it wrote."""
    assert main(["eval", str(run / "model"), *CAP, "--out", str(folder / "out.json"), *words]) == 0
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def says(code: int, output: Output, expected: int, *fragments: str) -> None:
    said = output.readouterr()
    assert code == expected, said
    assert "Traceback" not in said.err
    for fragment in fragments:
        assert fragment in said.err, said.err


class TestWindows:
    @given(num_tokens=st.integers(2, 80), first=st.integers(1, 3), window=st.integers(1, 20), stride=st.integers(1, 20))
    def test_each_token_is_scored_once_with_what_is_before_it(
        self, num_tokens: int, first: int, window: int, stride: int
    ) -> None:
        stride, first = min(stride, window), min(first, num_tokens - 1, window)
        tokens = tuple(range(num_tokens))
        scored: Counter[int] = Counter()
        for piece in windows(tokens, first, window, stride):
            assert piece.num_read <= window
            assert piece.tokens == tuple(range(piece.tokens[0], piece.tokens[-1] + 1))
            scored.update(piece.tokens[-piece.num_scored :])
            context = piece.num_read - piece.num_scored + 1
            assert piece.tokens[0] == 0 or context >= window - stride + 1
        assert scored == Counter(range(first, num_tokens))

    def test_what_cannot_be_is_refused(self) -> None:
        assert check_window(None, None, 32) == (32, 32)
        assert check_window(16, 4, 32) == (16, 4)
        assert check_window(None, None, None) == (2048, 2048)
        for window, stride, fragment in (
            (33, None, "at most 32"),
            (0, None, "at least 1"),
            (8, 9, "from 1 to the window"),
        ):
            with pytest.raises(UserError, match=fragment):
                check_window(window, stride, 32)


class TestPerplexity:
    @pytest.mark.parametrize(("window", "stride"), [(32, 32), (32, 5), (7, 3), (1, 1)])
    def test_it_is_that_of_plain_torch(
        self, window: int, stride: int, run: Path, plain: tuple[Any, Any], text_file: Path, tmp_path: Path
    ) -> None:
        words = ("--text", str(text_file), "--window", str(window), "--stride", str(stride))
        found = evaluate(run, tmp_path, *words)["perplexity"]
        loglikelihood, num_tokens = straightforward(plain, text_file.read_text(), window, stride)
        assert found["num_tokens"] == num_tokens
        assert found["loglikelihood"] == pytest.approx(loglikelihood, rel=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(-loglikelihood / num_tokens), rel=1e-6)

    def test_it_does_not_depend_on_the_batch_nor_on_the_capacity(
        self, run: Path, text_file: Path, tmp_path: Path
    ) -> None:
        texts = [text_file, tmp_path / "short.txt"]
        texts[1].write_text("Only this.")
        words = ("--text", *map(str, texts), "--stride", "7")
        found = [
            evaluate(run, tmp_path, *words, "--batch-size", size, "--device.memory", memory)["perplexity"][
                "loglikelihood"
            ]
            for size, memory in (("1", "8MiB"), ("3", "8MiB"), ("64", "8MiB"), ("64", "700KiB"))
        ]
        assert found == pytest.approx([found[0]] * 4, rel=1e-6)

    def test_more_context_is_never_less_than_it_says(self, run: Path, text_file: Path, tmp_path: Path) -> None:
        few = evaluate(run, tmp_path, "--text", str(text_file), "--stride", "32")["perplexity"]
        many = evaluate(run, tmp_path, "--text", str(text_file), "--stride", "1")["perplexity"]
        assert few["num_tokens"] == many["num_tokens"]
        assert few["loglikelihood"] != many["loglikelihood"]

    def test_a_file_of_any_name_is_a_text(self, run: Path, text_file: Path, tmp_path: Path, capsys: Output) -> None:
        page, empty, latin = tmp_path / "PAGE.md", tmp_path / "empty", tmp_path / "latin.rst"
        page.write_bytes(text_file.read_bytes())
        named = evaluate(run, tmp_path, "--text", str(page))["perplexity"]
        assert named == evaluate(run, tmp_path, "--text", str(text_file))["perplexity"]
        empty.write_text("")
        latin.write_bytes("Été\n".encode("latin-1"))
        capsys.readouterr()
        says(main(["eval", str(run / "model"), *CAP, "--text", str(empty)]), capsys, 2, "empty")
        says(main(["eval", str(run / "model"), *CAP, "--text", str(latin)]), capsys, 2, "latin.rst:1", "UTF-8")

    def test_bytes_and_words(self, run: Path, tmp_path: Path, capsys: Output) -> None:
        file = tmp_path / "t.txt"
        file.write_text(" \n = Été = \n two words \n", encoding="utf-8")
        found = evaluate(run, tmp_path, "--text", str(file), "--words")["perplexity"]
        assert (found["num_bytes"], found["num_words"], found["num_lines"]) == (26, 5, 3)
        assert found["bits_per_byte"] == pytest.approx(-found["loglikelihood"] / math.log(2) / 26)
        assert found["word_perplexity"] == pytest.approx(math.exp(-found["loglikelihood"] / 8))
        assert "perplexity per word" in capsys.readouterr().out
        evaluate(run, tmp_path, "--text", str(file))
        assert "perplexity per word" not in capsys.readouterr().out

    def test_a_tokenizer_without_a_beginning_leaves_the_first_token(self, plain: tuple[Any, Any]) -> None:
        model, tokenizer = plain

        class Bare:
            bos_token_id = eos_token_id = None

            def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
                return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}

        engine, *_ = initialize(model, config={"device": {"type": "cpu"}})
        result = text_perplexity(Scorer(engine), text_windows(Bare(), [Text("t", LINES)], 32, 32))
        engine.close()
        assert result.num_unscored == 1
        assert result.num_tokens == len(Bare()(LINES)["input_ids"]) - 1

    def test_the_default_text_is_that_of_the_config(self, text_file: Path, tmp_path: Path, capsys: Output) -> None:
        (tmp_path / "c").mkdir()
        config = write_config(tmp_path / "c", data={"eval": str(text_file)}, train={"output_dir": str(tmp_path / "r")})
        says(main(["eval", config]), capsys, 2, "train first, or name a model folder")
        assert main(["train", config, "--train.max_steps", "1"]) == 0
        capsys.readouterr()
        assert main(["eval", config]) == 0
        assert "1 text, window 32, stride 32" in capsys.readouterr().out

    def test_what_cannot_be_is_refused(self, run: Path, text_file: Path, tmp_path: Path, capsys: Output) -> None:
        evaluation = ["eval", str(run / "model"), *CAP]
        empty, one = tmp_path / "empty.txt", tmp_path / "one.jsonl"
        empty.write_text("")
        one.write_text('{"prompt": "a", "completion": "b"}\n')
        text = ["--text", str(text_file)]
        for words, fragment in (
            ([], "nothing to evaluate"),
            (["--text", str(empty)], "empty"),
            (["--text", str(tmp_path / "none.txt")], "none.txt"),
            (["--text", str(one)], "text"),
            ([*text, "--window", "33"], "--window 33: must be at least 1 and at most 32"),
            ([*text, "--window", "8", "--stride", "9"], "--stride 9"),
            ([*text, "--batch-size", "0"], "--batch-size 0"),
            ([*text, "--out", str(tmp_path / "no" / "out.json")], "--out"),
            ([*text, "--train.max_steps", "3"], "--train.*: zero eval MODEL does not read it"),
            ([*text, "--strid", "3"], "--stride"),
        ):
            says(main([*evaluation, *words]), capsys, 2, fragment)

    def test_a_full_disk_takes_neither_what_was_found_nor_what_was_there(
        self, run: Path, text_file: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def half(path: Path, text: str, encoding: str) -> int:
            path.write_bytes(text.encode(encoding)[:20])
            raise OSError(errno.ENOSPC, "No space left on device")

        out = tmp_path / "out.json"
        out.write_text("{}")
        monkeypatch.setattr(Path, "write_text", half)
        code = main(["eval", str(run / "model"), *CAP, "--text", str(text_file), "--out", str(out)])
        said = capsys.readouterr()
        assert (code, "perplexity" in said.out, "No space left on device" in said.err) == (2, True, True)
        assert (out.read_text(), list(tmp_path.glob(".tmp-*"))) == ("{}", [])
        monkeypatch.undo()
        with contextlib.suppress(OSError), open("/dev/full", "w") as full:
            monkeypatch.setattr("sys.stdout", full)
            with pytest.raises(OSError, match="No space left"):
                main(["eval", str(run / "model"), *CAP, "--text", str(text_file), "--out", str(out)])
        assert "perplexity" in json.loads(out.read_text())


class TestScorer:
    def test_a_batch_that_does_not_fit_is_halved(self, plain: tuple[Any, Any], run: Path) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(run / "model").eval().requires_grad_(False)
        engine, *_ = initialize(model, config={"device": {"type": "simulated", "memory": "600KiB"}})
        sequences = [Sequence(tuple(range(4 + i % 3, 30 + i % 3)), 20) for i in range(32)]
        scorer = Scorer(engine, BatchLimits.of(32))
        found = scorer.scores(sequences)
        engine.close()
        assert scorer.most_tokens < 32 * 29
        for sequence, score in zip(sequences, found, strict=True):
            with torch.no_grad():
                logits = plain[0](input_ids=torch.tensor([sequence.tokens[:-1]])).logits[0, -20:].double()
            wanted = torch.tensor(sequence.tokens[-20:])
            each = logits.log_softmax(-1).gather(1, wanted[:, None])
            assert score.loglikelihood == pytest.approx(float(each.sum()), rel=1e-6)

    def test_nothing_to_score_is_refused(self, plain: tuple[Any, Any]) -> None:
        engine, *_ = initialize(plain[0], config={"device": {"type": "cpu"}})
        for tokens, num_scored in (((1,), 1), ((1, 2), 2), ((1, 2, 3), 0)):
            with pytest.raises(UserError, match="to be scored"):
                Scorer(engine).scores([Sequence(tokens, num_scored)])
        engine.close()


class TestUnigramF1:
    @pytest.mark.parametrize(
        ("guess", "answer", "expected"),
        [
            ("The cat sat.", "a cat, sat!", 1.0),
            ("I like dogs", "I like cats", 2 / 3),
            ("no no no", "no", 0.5),
            ("", "something", 0.0),
            ("the", "a", 0.0),
            ("don't", "don t", 1.0),
            ("yes", "I do not know", 0.0),
            ("theatre an", "theatre", 1.0),
        ],
    )
    def test_words_in_common(self, guess: str, answer: str, expected: float) -> None:
        assert unigram_f1(guess, answer) == pytest.approx(expected)
        assert unigram_f1(answer, guess) == pytest.approx(expected)

    def test_normalisation(self) -> None:
        assert normalised_words("  An APPLE, (the) apple-pie?  ") == ["apple", "apple", "pie"]


class TestDialogue:
    def test_answers_of_the_second_person(self, tmp_path: Path) -> None:
        file = tmp_path / "d.jsonl"
        file.write_text(
            '{"turns": ["Hi!", "Hello.\\nYou?", "Fine.", "Good."], "context": "I ski."}\n\n{"turns": ["A", "B", "C"]}\n'
        )
        found = read_dialogues(file)
        assert [exchange.answer for exchange in found] == ["Hello. You?", "Good.", "B"]
        assert found[1].lines == ("I ski.", "Person 1: Hi!", "Person 2: Hello. You?", "Person 1: Fine.")

    def test_perplexity_and_f1_are_those_of_plain_torch(self, plain: tuple[Any, Any], tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        tokenizer = plain[1]
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(opt(1, 2, 32, vocab_size=512, word_embed_proj_dim=32)).eval()
        file = tmp_path / "d.jsonl"
        file.write_text('{"turns": ["Hi", "Hello"]}\n{"turns": ["So it was", "no and yes", "ok", "the end"]}\n')
        exchanges = read_dialogues(file)
        total, num_tokens = 0.0, 0
        for exchange in exchanges:
            prompt = "\n".join([*exchange.lines, "Person 2:"])
            before, whole = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {exchange.answer}")["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
            total += sum(float(logits[i - 1, whole[i]]) for i in range(len(before), len(whole)))
            num_tokens += len(whole) - len(before)
        engine, *_ = initialize(model, config={"device": {"type": "cpu"}})
        dialogues = prepare_dialogues(tokenizer, exchanges, None)
        found = evaluate_dialogues(Scorer(engine), Writer(engine, tokenizer), dialogues, tokenizer)
        engine.close()
        assert (found.num_answers, found.num_tokens) == (3, num_tokens)
        assert found.loglikelihood == pytest.approx(total, rel=1e-6)
        assert found.normalised_perplexity == pytest.approx(found.perplexity)
        assert 0 <= found.unigram_f1 <= 1

    def test_the_command(self, run: Path, tmp_path: Path, capsys: Output) -> None:
        file = tmp_path / "d.jsonl"
        turns = ["Hello, and how are you on this fine day of all days?", "Well.", "And what do you do?", "I write."] * 3
        file.write_text(json.dumps({"turns": turns}) + "\n")
        found = evaluate(run, tmp_path, "--dialogue", str(file), "--dialogue-tokenizer", str(run / "model"))["dialogue"]
        assert found["num_answers"] == 6
        assert found["normalised_perplexity"] == pytest.approx(found["perplexity"])
        assert "unigram F1" in capsys.readouterr().out
        bad = tmp_path / "bad.jsonl"
        for line, fragment in (
            ("{", "bad.jsonl:1: not JSON"),
            ('{"turns": "Hi"}', "bad.jsonl:1: a JSON object"),
            ('{"turns": ["Hi", ""]}', "not blank"),
            ('{"turns": ["Hi"]}', "no answer"),
        ):
            bad.write_text(line + "\n")
            says(main(["eval", str(run / "model"), "--dialogue", str(bad)]), capsys, 2, fragment)
        says(main(["eval", str(run / "model"), "--dialogue", str(tmp_path / "none")]), capsys, 2, "--dialogue")


def opt(layers: int, heads: int, hidden: int, **fields: Any) -> Any:
    from transformers import OPTConfig

    return OPTConfig(
        num_hidden_layers=layers, num_attention_heads=heads, hidden_size=hidden, ffn_dim=4 * hidden, **fields
    )


class TestReferences:
    def test_sizes_are_recognised_by_their_config(self) -> None:
        assert references.recognise(opt(12, 12, 768)) == "OPT-125M"
        assert references.recognise(opt(64, 72, 9216)) == "OPT-66B"
        assert (
            references.recognise(opt(24, 16, 1024, do_layer_norm_before=False, word_embed_proj_dim=512)) == "OPT-350M"
        )
        assert references.recognise(opt(24, 16, 1024)) is None
        assert references.recognise(opt(12, 12, 768, vocab_size=512)) is None
        assert references.recognise(opt(11, 12, 768)) is None
        from transformers import GPT2Config

        assert references.recognise(GPT2Config()) is None

    def test_numbers_come_with_their_source(self) -> None:
        wikitext = references.of_wikitext2("OPT-175B")
        assert wikitext is not None
        assert wikitext.value == 8.34
        assert "GPTQ" in wikitext.text
        piqa = references.of_task("OPT-6.7B", "piqa", "acc", 0)
        assert piqa is not None
        assert piqa.value == 76.3
        assert "pythia" in piqa.text
        assert references.of_task("OPT-6.7B", "piqa", "acc", 1) is None
        assert references.of_task("OPT-175B", "piqa", "acc", 0) is None
        assert references.of_wikitext2(None) is None
        assert {reference.model for reference in references.of_dialogue("OPT-125M")} == {"OPT-175B"}

    def test_they_stand_beside_the_result(self) -> None:
        from zero.cli.evaluation_tables import perplexity_rows
        from zero.evaluation.perplexity import PerplexityResult

        result = PerplexityResult(0, 30, 8, 2, 1, 2048, 2048, loglikelihood=-20.0, num_tokens=10)
        rows = perplexity_rows(result, False, references.of_wikitext2("OPT-125M"))
        assert any("27.65 (OPT-125M: Frantar" in published for _, _, published in rows)


class TestTasks:
    def test_the_papers_names(self) -> None:
        assert len(PAPER_TASKS) == 16
        assert task_names(["opt-paper"]) == list(PAPER_TASKS.values())
        assert task_names(["PIQA,arc-E", "sciq", "piqa"]) == ["piqa", "arc_easy", "sciq"]

    def test_the_average_is_of_fourteen(self) -> None:
        results = {task: {"acc,none": 0.5, "acc_stderr,none": 0.1} for task in PAPER_TASKS.values()}
        results["wic"] = results["multirc"] = {"acc,none": 0.0}
        results["record"] = {"f1,none": 0.9, "em,none": 0.5}
        assert average_accuracy(results) == pytest.approx(0.5)
        del results["cb"]
        assert average_accuracy(results) is None

    def test_a_missing_extra_is_said(self, run: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("zero.evaluation.tasks.importlib.util.find_spec", lambda name: None)
        says(main(["eval", str(run / "model"), "--tasks", "piqa"]), capsys, 2, '-e ".[eval]"')
        says(main(["eval", str(run / "model"), "--tasks", "piqa", "--shots", "-1"]), capsys, 2, "--shots -1")


def test_the_tiny_config_is_not_taken_for_a_published_size() -> None:
    from transformers import AutoConfig

    fields = dict(TINY["model"]["config"])
    assert references.recognise(AutoConfig.for_model(fields.pop("model_type"), **fields)) is None
