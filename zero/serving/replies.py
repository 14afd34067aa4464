"""Answers in the shapes that clients know: OpenAI's completions and chat, and EnergonAI's generation."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from zero.serving.call import Call

if TYPE_CHECKING:
    from zero.generation import Piece, TokenLogprob

# JSON has no infinity; this is what OpenAI sends for a token of probability 0.
_LEAST_LOGPROB = -9999.0


def usage(call: Call) -> dict[str, int]:
    """Token counts of a request: each prompt counts once, every choice's tokens count."""
    num_new = sum(len(choice.tokens) for job in call.jobs for choice in job.choices)
    num_prompt = call.num_prompt_tokens
    return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}


class _OpenAIShape:
    """What both endpoints have in common."""

    kind = ""
    chunk_kind = ""
    id_prefix = ""

    def __init__(self, model_name: str, wants_usage: bool) -> None:
        self._wants_usage = wants_usage
        self._head = {"id": f"{self.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}

    def _reply(self, choices: list[dict[str, Any]], call: Call) -> dict[str, Any]:
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage(call)}

    def _chunk(self, choices: list[dict[str, Any]], counts: dict[str, int] | None = None) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_kind, "choices": choices}
        return {**chunk, "usage": counts} if self._wants_usage else chunk

    def closing(self, call: Call) -> Iterable[dict[str, Any]]:
        """The token counts, where they were asked for."""
        return [self._chunk([], usage(call))] if self._wants_usage else []


class CompletionShape(_OpenAIShape):
    """``POST /v1/completions``.

    Args:
        model_name: as served.
        wants_usage: whether a stream ends with the token counts.
        echoes: the prompts' texts that go before the answers; empty where they do not.
    """

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, model_name: str, wants_usage: bool = False, echoes: Sequence[str] = ()) -> None:
        super().__init__(model_name, wants_usage)
        self._echoes = echoes
        self._offsets: dict[int, int] = {}

    def whole(self, call: Call) -> dict[str, Any]:
        """All choices of all prompts, numbered through."""
        choices = []
        for prompt, job in enumerate(call.jobs):
            for choice in job.choices:
                index = prompt * call.wanted.n + choice.index
                logprobs = self._logprobs(call, index, choice.logprobs)
                text = (self._echoes[prompt] if self._echoes else "") + choice.text
                choices.append(_choice(index, choice.finish_reason, text=text, logprobs=logprobs))
        return self._reply(choices, call)

    def opening(self, call: Call) -> Iterable[dict[str, Any]]:
        """The prompts, where they were asked for."""
        for prompt, echo in enumerate(self._echoes):
            first = prompt * call.wanted.n
            indices = range(first, first + call.wanted.n)
            yield self._chunk([_choice(index, None, text=echo, logprobs=None) for index in indices])

    def chunk(self, call: Call, prompt: int, piece: Piece) -> dict[str, Any]:
        """A piece of one choice."""
        index = prompt * call.wanted.n + piece.index
        logprobs = self._logprobs(call, index, piece.logprobs)
        return self._chunk([_choice(index, piece.finish_reason, text=piece.text, logprobs=logprobs)])

    def _logprobs(self, call: Call, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if call.wanted.sampling.logprobs is None:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(token.text)
        tops = [{text: _finite(value) for _, text, value in token.top} for token in tokens]
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": tops if call.wanted.sampling.logprobs else None,
            "text_offset": offsets,
        }


class ChatShape(_OpenAIShape):
    """``POST /v1/chat/completions``."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def whole(self, call: Call) -> dict[str, Any]:
        """All choices."""
        choices = []
        for choice in call.jobs[0].choices:
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            logprobs = _chat_logprobs(call, choice.logprobs)
            choices.append(_choice(choice.index, choice.finish_reason, message=message, logprobs=logprobs))
        return self._reply(choices, call)

    def opening(self, call: Call) -> Iterable[dict[str, Any]]:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        for index in range(call.wanted.n):
            yield self._chunk([_choice(index, None, delta=delta, logprobs=None)])

    def chunk(self, call: Call, prompt: int, piece: Piece) -> dict[str, Any]:
        """A piece of one choice."""
        del prompt  # a chat is one prompt
        delta = {"content": piece.text} if piece.text else {}
        logprobs = _chat_logprobs(call, piece.logprobs)
        return self._chunk([_choice(piece.index, piece.finish_reason, delta=delta, logprobs=logprobs)])


class GenerationShape:
    """``POST /generation``: the prompt with its continuation, in one text.

    Args:
        prompt: as given.
    """

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt

    def whole(self, call: Call) -> dict[str, Any]:
        """``{"text": ...}``."""
        return {"text": self._prompt + call.jobs[0].choices[0].text}

    def opening(self, call: Call) -> Iterable[dict[str, Any]]:
        """This endpoint has no stream."""
        return []

    def chunk(self, call: Call, prompt: int, piece: Piece) -> dict[str, Any]:
        """This endpoint has no stream."""
        return {"text": piece.text}

    def closing(self, call: Call) -> Iterable[dict[str, Any]]:
        """This endpoint has no stream."""
        return []


def _choice(index: int, finish_reason: str | None, **fields: Any) -> dict[str, Any]:
    return {"index": index, **fields, "finish_reason": finish_reason}


def _chat_logprobs(call: Call, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if call.wanted.sampling.logprobs is None:
        return None
    content = [
        {
            **_token(token.text, token.logprob),
            "top_logprobs": [_token(text, value) for _, text, value in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB
