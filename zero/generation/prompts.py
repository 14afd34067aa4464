"""Prompts to token numbers, checked before anything is queued."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from zero.errors import UserError


class PromptReader:
    """Reads prompts, in any thread.

    Args:
        tokenizer: of the model.
        num_tokens: of the model's vocabulary.
        most: tokens of prompt and text together; at least one of them is new.
    """

    def __init__(self, tokenizer: Any, num_tokens: int, most: int) -> None:
        self._tokenizer = tokenizer
        self._num_tokens = num_tokens
        self._most = most
        self._lock = threading.Lock()

    def read(self, prompt: str | Sequence[int]) -> list[int]:
        """Token numbers.

        Raises:
            UserError: the prompt is empty, too long, no UTF-8, or has numbers that the model has no token for.
        """
        tokens = self._tokenized(prompt) if isinstance(prompt, str) else _numbers(prompt)
        if not tokens:
            raise UserError("prompt: it has no tokens; give some text")
        if len(tokens) >= self._most:
            raise UserError(
                f"prompt: {len(tokens)} tokens, and the model reads at most {self._most}, new ones among them; give less"
            )
        wrong = next((token for token in tokens if not 0 <= token < self._num_tokens), None)
        if wrong is not None:
            raise UserError(f"prompt: token {wrong}; the model has the tokens 0 to {self._num_tokens - 1}")
        return tokens

    def _tokenized(self, prompt: str) -> list[int]:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"prompt: not UTF-8 at character {error.start + 1}") from error
        with self._lock:
            return list(self._tokenizer(prompt, return_token_type_ids=False)["input_ids"])


def _numbers(prompt: Any) -> list[int]:
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise UserError(f"prompt: text or token numbers are needed, {type(prompt).__name__} was given")
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
        raise UserError("prompt: token numbers must be whole numbers")
    return [int(token) for token in prompt]
