"""A model that an engine manages, as lm-eval sees models. Imported only where lm-eval is installed."""

from __future__ import annotations

import math
from typing import Any

import torch
from lm_eval.api.model import TemplateLM

from zero.data.ids import Frame
from zero.engine import Engine
from zero.evaluation.perplexity import beginning, windows
from zero.evaluation.scoring import Scorer, Sequence

_DEFAULT_NEW_TOKENS = 256
_DEFAULT_POSITIONS = 2048


class EngineLM(TemplateLM):  # type: ignore[misc]  # lm-eval is optional, and untyped for the checker
    """An ``lm_eval.api.model.LM``.

    Prompts begin as the tokenizer has texts begin (OPT's with ``</s>``); those too long lose their beginning.

    Args:
        engine: of the model.
        scorer: of the model.
        tokenizer: of the model.
        num_positions: most tokens the model reads; None for no limit.
    """

    def __init__(self, engine: Engine, scorer: Scorer, tokenizer: Any, num_positions: int | None) -> None:
        super().__init__()
        self._engine = engine
        self._scorer = scorer
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
        """What the model writes after each prompt, before the first of the texts that end it."""
        return [self._write(*request.args) for request in requests]

    def _write(self, prompt: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        num_new = min(int(options.get("max_gen_toks", _DEFAULT_NEW_TOKENS)), self.max_length - 1)
        ids = self.tok_encode(prompt)[-(self.max_length - num_new) :]
        tokens = torch.tensor([ids], device=self.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if options.get("do_sample") and float(options.get("temperature", 1.0)) > 0:
            sampling = {"do_sample": True, "temperature": float(options.get("temperature", 1.0))}
        model: Any = self._engine.module
        was_training = model.training
        self._engine.eval()
        with torch.no_grad():
            written = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=num_new,
                pad_token_id=self.tokenizer.pad_token_id,
                **sampling,
            )
        self._engine.train(was_training)
        text: str = self.tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)
        return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]
