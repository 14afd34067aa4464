"""A model that an engine manages, as lm-eval sees models. Imported only where lm-eval is installed."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from lm_eval.api.model import TemplateLM

from zero.data.ids import Frame
from zero.engine import Engine
from zero.evaluation.perplexity import beginning, windows
from zero.evaluation.scoring import Scorer, Sequence
from zero.evaluation.writing import Prompt, Writer
from zero.generation.sampling import MOST_STOP_CHARACTERS, MOST_STOPS, Sampling

logger = logging.getLogger("zero")

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_READ = {"until", *_LENGTHS, "do_sample", "temperature", "top_p", "top_k", "repetition_penalty"}
_DEFAULT_NEW_TOKENS = 256
_DEFAULT_POSITIONS = 2048


class EngineLM(TemplateLM):  # type: ignore[misc]  # lm-eval is optional, and untyped for the checker
    """An ``lm_eval.api.model.LM``.

    Prompts begin as the tokenizer has texts begin (OPT's with ``</s>``); those too long lose their beginning.

    With several ranks each is given all requests, and does its share of them.

    Args:
        engine: of the model.
        scorer: of the model.
        writer: of the model.
        tokenizer: of the model.
        num_positions: most tokens the model reads; None for no limit.
    """

    def __init__(
        self, engine: Engine, scorer: Scorer, writer: Writer, tokenizer: Any, num_positions: int | None
    ) -> None:
        super().__init__()
        self._engine = engine
        self._scorer = scorer
        self._writer = writer
        self.tokenizer = tokenizer
        self._start = [int(token) for token in Frame(tokenizer).start]
        self.max_length = num_positions or _DEFAULT_POSITIONS

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self._engine.device.torch_device

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Token that stands before a continuation without a context."""
        start = beginning(self.tokenizer)
        return start[-1] if start else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's caches."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Token numbers of a text; by default after what the tokenizer begins texts with."""
        start = self._start if add_special_tokens is not False else []
        return [*start, *self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy writing would give it."""
        sequences = []
        for _, context, continuation in requests:
            tokens = [*context, *continuation][-self.max_length - 1 :]
            sequences.append(Sequence(tuple(tokens), min(len(continuation), len(tokens) - 1)))
        return [(score.loglikelihood, score.is_greedy) for score in self._scorer.scores(sequences)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token scored once, in windows that do not overlap."""
        found = []
        for request in requests:
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            tokens = (self.prefix_token_id, *ids)
            scores = self._scorer.scores(windows(tokens, 1, self.max_length, self.max_length)) if ids else []
            found.append(math.fsum(score.loglikelihood for score in scores))
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each prompt, before the first of the texts that end it.

        Read are ``until``, ``max_gen_toks`` and its other names, ``do_sample``, ``temperature``, ``top_p``, ``top_k`` and
        ``repetition_penalty``. The nth request draws from seed n.
        """
        given = [request.args for request in requests]
        _warn_of_unread({name for _, options in given for name in options} - _READ)
        prompts = [self._prompt(prompt, options, seed) for seed, (prompt, options) in enumerate(given)]
        texts = self._writer.write(prompts)
        return [_cut(text, _stops(options)) for text, (_, options) in zip(texts, given, strict=True)]

    def _prompt(self, text: str, options: dict[str, Any], seed: int) -> Prompt:
        asked = next((int(options[name]) for name in _LENGTHS if options.get(name) is not None), _DEFAULT_NEW_TOKENS)
        num_new = max(1, min(asked, self.max_length - 1))
        tokens = self.tok_encode(text)[-(self.max_length - num_new) :]
        # A task may name more, or longer ones, than are looked for while the text is written.
        stops = tuple(stop for stop in _stops(options) if len(stop) <= MOST_STOP_CHARACTERS)[:MOST_STOPS]
        return Prompt(tokens, Sampling(max_new_tokens=num_new, stop=stops, seed=seed, **_sampling(options)))


def _stops(options: dict[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def _cut(text: str, stops: list[str]) -> str:
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """As lm-eval means it: without ``do_sample`` a temperature above 0 draws, with it alone that of the model itself."""
    do_sample, given = options.get("do_sample"), options.get("temperature")
    temperature = float(given) if given is not None else 1.0 if do_sample else 0.0
    draws = do_sample is not False and temperature > 0
    kinds: dict[str, Any] = {"top_p": float, "top_k": int} if draws else {}
    kinds["repetition_penalty"] = float
    settings = {name: kind(options[name]) for name, kind in kinds.items() if options.get(name) is not None}
    return settings | {"temperature": temperature if draws else 0.0}


def _warn_of_unread(names: set[str]) -> None:
    if names:
        logger.warning("--tasks: settings of generation that are not read here: %s", ", ".join(sorted(names)))
