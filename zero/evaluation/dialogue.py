"""Conversations: how likely the second person's answers are, and how close the model's own come to them.

The prompts are those of the OPT paper (Zhang et al. 2022, section 3.2): lines that begin with ``Person 1:`` and
``Person 2:``, answers written greedily, 32 tokens at most.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence as Several
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero.errors import UserError
from zero.evaluation.perplexity import beginning, exp_or_infinity
from zero.evaluation.scoring import Scorer, Sequence
from zero.evaluation.writing import Prompt, Writer
from zero.generation.sampling import Sampling

MAX_NEW_TOKENS = 32
_PERSONS = ("Person 1:", "Person 2:")
_PUNCTUATION = re.compile(r"""[!"#$%&()*+,\-./:;<=>?@\[\]\\^`{|}~_']""")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


@dataclass(frozen=True, slots=True)
class Exchange:
    """One answer to be judged.

    Attributes:
        where: File and line of its conversation.
        lines: What stands before it, as the prompt shows it.
        answer: What the second person said.
    """

    where: str
    lines: tuple[str, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class DialogueResult:
    """Of all answers.

    Attributes:
        num_answers: That were judged.
        num_tokens: Of them, as the model's tokenizer has it.
        loglikelihood: In nats.
        num_given_tokens: Of them, as another tokenizer has it; None where none was given.
        unigram_f1: Mean over answers, 0 to 1.
    """

    num_answers: int
    num_tokens: int
    loglikelihood: float
    num_given_tokens: int | None
    unigram_f1: float

    @property
    def perplexity(self) -> float:
        """Per token of the model's tokenizer."""
        return exp_or_infinity(-self.loglikelihood / self.num_tokens)

    @property
    def normalised_perplexity(self) -> float | None:
        """Per token of the other tokenizer: comparable between models. The paper takes GPT-2's."""
        if not self.num_given_tokens:
            return None
        return exp_or_infinity(-self.loglikelihood / self.num_given_tokens)


def normalised_words(text: str) -> list[str]:
    """As ParlAI compares answers: lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", _PUNCTUATION.sub(" ", text.lower())).split()


def unigram_f1(guess: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words that both have, each as often as both have it; 0 to 1."""
    guessed, wanted = normalised_words(guess), normalised_words(answer)
    num_common = sum((Counter(guessed) & Counter(wanted)).values())
    if not num_common:
        return 0.0
    precision, recall = num_common / len(guessed), num_common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def read_dialogues(path: Path) -> list[Exchange]:
    """The second person's answers in a file of conversations.

    Each line is a JSON object with ``turns``, a list of texts said by turns, the first person first, and perhaps
    ``context``, a text that stands before them.

    Raises:
        UserError: a line is of another form (says which), or there is no answer at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--dialogue {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--dialogue {path}: not UTF-8 at byte {error.start + 1}") from error
    found: list[Exchange] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found += _exchanges(f"{path}:{number}", line)
    if not found:
        raise UserError(f"--dialogue {path}: no answer of a second person in it")
    return found


def _exchanges(where: str, line: str) -> list[Exchange]:
    form = 'a JSON object such as {"turns": ["Hi!", "Hello, how are you?"]} is expected'
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); {form}") from error
    turns = record.get("turns") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise UserError(f"{where}: {form}, with texts that are not blank")
    context = record.get("context") or ""
    if not isinstance(context, str):
        raise UserError(f'{where}: "context" must be a text')
    said = [" ".join(turn.split()) for turn in turns]
    before = tuple(context.splitlines())
    shown = [f"{_PERSONS[index % 2]} {turn}" for index, turn in enumerate(said)]
    return [Exchange(where, (*before, *shown[:index]), said[index]) for index in range(1, len(said), 2)]


@dataclass(frozen=True, slots=True)
class Dialogues:
    """Answers as the model will read them.

    Attributes:
        exchanges: They are of.
        sequences: To be scored: of each the tokens of the answer alone, not the line end after it.
        prompts: To be answered, by the end of the line.
    """

    exchanges: Several[Exchange]
    sequences: list[Sequence]
    prompts: list[Prompt]


def prepare_dialogues(tokenizer: Any, exchanges: Several[Exchange], num_positions: int | None) -> Dialogues:
    """Makes token numbers of conversations; prompts that are too long lose their first lines.

    Args:
        tokenizer: of the model.
        exchanges: at least one.
        num_positions: most tokens the model reads; None for no limit.

    Raises:
        UserError: an answer is longer than what the model reads.
    """
    sequences = [_sequence(exchange, tokenizer, num_positions) for exchange in exchanges]
    return Dialogues(exchanges, sequences, [_prompt(exchange, tokenizer, num_positions) for exchange in exchanges])


def evaluate_dialogues(scorer: Scorer, writer: Writer, dialogues: Dialogues, counting: Any = None) -> DialogueResult:
    """Judges a model on answers.

    Args:
        scorer: of the model.
        writer: of the model.
        dialogues: at least one answer.
        counting: the tokenizer whose tokens perplexity is normalised to.
    """
    exchanges = dialogues.exchanges
    scores = scorer.scores(dialogues.sequences)
    guesses = [_first_line(text) for text in writer.write(dialogues.prompts)]
    f1 = [unigram_f1(guess, exchange.answer) for guess, exchange in zip(guesses, exchanges, strict=True)]
    return DialogueResult(
        num_answers=len(exchanges),
        num_tokens=sum(sequence.num_scored for sequence in dialogues.sequences),
        loglikelihood=math.fsum(score.loglikelihood for score in scores),
        num_given_tokens=None if counting is None else sum(_count(counting, exchange) for exchange in exchanges),
        unigram_f1=math.fsum(f1) / len(f1),
    )


def _count(tokenizer: Any, exchange: Exchange) -> int:
    return len(tokenizer(f" {exchange.answer}", add_special_tokens=False)["input_ids"])


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _fitting(lines: tuple[str, ...], tokenizer: Any, room: int | None) -> tuple[list[int], str]:
    """A prompt of the last lines that there is room for, as tokens with what begins a text, and as text."""
    start = list(beginning(tokenizer))
    for first in range(len(lines) + 1):
        text = "\n".join([*lines[first:], _PERSONS[1]])
        ids = start + _ids(tokenizer, text)
        if room is None or len(ids) <= room:
            return ids, text
    return (ids if room is None else ids[-room:]), text


def _sequence(exchange: Exchange, tokenizer: Any, num_positions: int | None) -> Sequence:
    """Prompt and answer; the answer's tokens are those that follow the prompt's in the whole."""
    answer_numel = len(_ids(tokenizer, f" {exchange.answer}"))
    room = None if num_positions is None else num_positions + 1 - answer_numel
    if room is not None and room < 1:
        raise UserError(
            f"{exchange.where}: an answer of {answer_numel} tokens, and the model reads at most {num_positions}"
        )
    prompt, text = _fitting(exchange.lines, tokenizer, room)
    whole = list(beginning(tokenizer)) + _ids(tokenizer, f"{text} {exchange.answer}")
    if whole[: len(prompt)] == prompt:
        return Sequence(tuple(whole), len(whole) - len(prompt))
    answer = _ids(tokenizer, f" {exchange.answer}")  # a token reaches over the seam, or the prompt was cut
    return Sequence((*prompt, *answer), len(answer))


def _prompt(exchange: Exchange, tokenizer: Any, num_positions: int | None) -> Prompt:
    """What is to be answered, with room for the answer."""
    room = None if num_positions is None else max(num_positions // 2, num_positions - MAX_NEW_TOKENS)
    tokens, _ = _fitting(exchange.lines, tokenizer, room)
    num_new = MAX_NEW_TOKENS if num_positions is None else min(MAX_NEW_TOKENS, num_positions - len(tokens))
    return Prompt(tokens, Sampling(max_new_tokens=num_new, stop=("\n",)))


def _first_line(text: str) -> str:
    """The answer alone, whatever ends its line."""
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else ""
