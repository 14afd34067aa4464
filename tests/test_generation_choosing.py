"""Choosing the next token: as transformers' own processors have it, each row by its own settings; and text as it comes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.generation_case import Bytes, settings
from zero.data.tokenizer import builtin_tokenizer
from zero.errors import UserError
from zero.generation import Sampling
from zero.generation.buckets import Need, most_positions
from zero.generation.cache import rounded
from zero.generation.choosing import Chosen, choose
from zero.generation.jobs import Job
from zero.generation.rows import Row
from zero.generation.text import StopFinder, TextStream

VOCAB = 50


@dataclass
class Chooser:
    """A row with numbers to draw that are given."""

    sampling: Sampling
    seen: set[int] = field(default_factory=set)
    at: float = 0.5

    def draw(self) -> float:
        return self.at


def allowed(logits: torch.Tensor, sampling: Sampling, seen: set[int]) -> torch.Tensor:
    """Probabilities by transformers' processors."""
    scores, ids = logits[None], torch.tensor([sorted(seen)])
    if sampling.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    if sampling.temperature > 0:
        scores = TemperatureLogitsWarper(sampling.temperature)(ids, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores[0].double().softmax(-1)


@pytest.mark.parametrize("seed", range(6))
def test_every_token_as_often_as_transformers_would_have_it(seed: int) -> None:
    """Drawn at evenly spaced numbers, each token comes as often as its probability says: no chance is left."""
    source = random.Random(seed)
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
    sampling = Sampling(
        temperature=source.choice([0.5, 1.0, 1.7]),
        top_k=source.choice([0, 5, 20, VOCAB + 5]),
        top_p=source.choice([1.0, 0.95, 0.5]),
        repetition_penalty=source.choice([1.0, 1.5, 0.7]),
    )
    seen = set(source.sample(range(VOCAB), 9))
    num = 2000
    rows = [Chooser(sampling, seen, (place + 0.5) / num) for place in range(num)]
    chosen = choose(logits.expand(num, -1), rows)
    counts = torch.bincount(torch.tensor([one.token for one in chosen if one is not None]), minlength=VOCAB)
    expected = allowed(logits, sampling, seen)
    assert counts.sum() == num
    assert (counts[expected == 0] == 0).all(), "a token that was cut"
    assert (counts - expected * num).abs().max() <= 2


def test_rows_of_any_settings_do_not_touch_each_other() -> None:
    """Each row beside all others, in any order, chooses what it chooses alone."""
    source = random.Random(1)
    logits = torch.randn(60, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    rows = [Chooser(one, set(source.sample(range(VOCAB), 7)), source.random()) for one in settings(60, seed=8)]
    single = [choose(logits[place : place + 1], [row])[0] for place, row in enumerate(rows)]
    order = source.sample(range(60), 60)
    together = choose(logits[order], [rows[place] for place in order])
    for place, one in zip(order, together, strict=True):
        assert one == single[place], rows[place].sampling


def test_greedy_takes_the_likeliest_and_draws_nothing() -> None:
    class Never(Chooser):
        def draw(self) -> float:
            raise AssertionError

    logits = torch.randn(8, VOCAB)
    rows = [Never(Sampling(top_k=3, top_p=0.2)) for _ in range(8)]
    assert [one.token for one in choose(logits, rows) if one] == logits.argmax(-1).tolist()


def test_a_row_draws_one_number_per_token_from_its_own_generator() -> None:
    """The same number until the token is taken, so that a pass can be run again; then the generator's next."""
    job = Job((5, 6), Sampling(temperature=1.0), n=2)
    row = Row(job, 1, 40, Bytes().decode, frozenset())
    source = torch.Generator().manual_seed(41)
    for _ in range(5):
        expected = float(torch.rand((), dtype=torch.float64, generator=source))
        assert [row.draw(), row.draw()] == [expected, expected]
        row.take(Chosen(70))
    assert row.tokens == [5, 6] + [70] * 5


def test_penalties_may_change_the_likeliest() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.9, -1.0]])
    chosen = choose(logits, [Chooser(Sampling(repetition_penalty=2.0, logprobs=1), {1, 99})])[0]
    assert chosen is not None
    assert chosen.token == 2
    assert chosen.top[0][0] == 1, "of the model's own distribution"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_concern_their_row_alone(bad: float) -> None:
    logits = torch.randn(3, VOCAB)
    logits[1, 7] = bad
    chosen = choose(logits, [Chooser(Sampling(temperature=1.0, top_k=place)) for place in range(3)])
    assert [one is None for one in chosen] == [False, True, False]


def test_the_last_draw_of_all() -> None:
    logits = torch.full((2, VOCAB), -torch.inf)
    logits[:, 3] = 0.0
    highest = 1 - 2**-53
    rows = [Chooser(Sampling(temperature=1.0, top_p=p), at=highest) for p in (1.0, 0.5)]
    assert [one.token for one in choose(logits, rows) if one] == [3, 3]


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
        ({"max_new_tokens": 1.0}, "whole number"),
        ({"max_new_tokens": True}, "whole number"),
        ({"temperature": -1}, "temperature = -1: must be 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": "1"}, "temperature = '1'"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0}, "top_p = 0: must be above 0"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0"),
        ({"repetition_penalty": 5e-324}, "must be from 0.001 to 1000"),
        ({"repetition_penalty": float("inf")}, "finite"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 1 << 63}, "seed"),
        ({"logprobs": 101}, "logprobs = 101: must be from 0 to 100"),
        ({"stop": ("",)}, "0 characters"),
        ({"stop": ("x" * 257,)}, "257 characters"),
        ({"stop": ("x",) * 17}, "17 texts"),
        ({"stop": (1,)}, "must be texts"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        Sampling(**values)


def test_one_stop_string_may_be_given_as_it_is() -> None:
    assert Sampling(stop="end").stop == ("end",)  # type: ignore[arg-type]


class TestText:
    @given(st.binary(max_size=60), st.integers(0, 8))
    def test_pieces_are_the_whole_in_parts(self, said: bytes, num_prompt: int) -> None:
        """Whatever the bytes: the pieces are what decoding all at once gives, but for half a character at the end."""
        tokens = [byte + 4 for byte in said]
        stream = TextStream(Bytes().decode, tokens[:num_prompt])
        before = Bytes().decode(tokens[:num_prompt])
        pieces = [stream.push(token) for token in tokens[num_prompt:]] + [stream.finish()]
        try:
            whole = said.decode()
        except UnicodeDecodeError:
            return
        shown = before.rstrip("\ufffd") + "".join(pieces)
        assert shown == whole
        assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in whole

    def test_bytes_that_never_become_text_are_shown_in_the_end(self) -> None:
        stream = TextStream(Bytes().decode, [])
        pieces = [stream.push(0x80 + 4) for _ in range(40)]
        assert "".join(pieces).count("\ufffd") > 20

    def test_a_trained_tokenizer(self) -> None:
        tokenizer = builtin_tokenizer(400)
        text = "The sea, naïve, 漢字 and 🙂 is as it was. " * 3
        tokens = tokenizer(text)["input_ids"]
        stream = TextStream(lambda t: tokenizer.decode(t, skip_special_tokens=True), tokens[:5])
        before = tokenizer.decode(tokens[:5], skip_special_tokens=True)
        assert before + "".join([*(stream.push(token) for token in tokens[5:]), stream.finish()]) == text

    @given(st.lists(st.sampled_from(["<s>", " ", " a", "b", " c"]), max_size=24), st.integers(1, 8))
    def test_special_tokens_take_no_space_with_them(self, said: list[str], num_prompt: int) -> None:
        """Where decoding leaves a space at the very beginning out, as the tokenizers of Llama and Mistral do."""
        said = ["a", *said]

        def decode(words: Sequence[Any]) -> str:
            return "".join(said[word] for word in words if said[word] != "<s>").removeprefix(" ")

        prompt, new = range(len(said))[:num_prompt], range(len(said))[num_prompt:]
        stream = TextStream(decode, prompt)
        pieces = [*map(stream.push, new), stream.finish()]
        assert decode(prompt) + "".join(pieces) == decode(range(len(said)))

    @given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.randoms())
    def test_stops_do_not_depend_on_borders(self, text: str, stops: list[str], source: random.Random) -> None:
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        expected = text[: min(ends)[1]] if ends else text
        finder = StopFinder(stops)
        shown, place, stopped = "", 0, False
        while place < len(text) and not stopped:
            num = source.randint(1, 4)
            piece, stopped = finder.push(text[place : place + num])
            shown, place = shown + piece, place + num
            assert expected.startswith(shown)
        assert shown + ("" if stopped else finder.finish()) == expected
        assert stopped == bool(ends)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 200)), min_size=1, max_size=8))
def test_what_a_bucket_takes_at_its_worst(rows: list[tuple[int, int]]) -> None:
    """The reckoning by events is what walking through all passes finds."""
    most = 0
    for step in range(201):
        running = [(length, left) for length, left in rows if left >= step]
        if running:
            most = max(most, len(running) * rounded(max(length for length, _ in running) + step))
    assert most_positions([Need(length, left) for length, left in rows]) == most
