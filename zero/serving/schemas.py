"""The requests, strictly: a key that is not known, or that cannot be honoured, is refused by name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from zero.generation.sampling import LEAST_PENALTY, MOST_SEED

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
StopString = Annotated[str, Field(min_length=1, max_length=128)]
Stop = StopString | Annotated[list[StopString], Field(max_length=4)]
Prompt = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompts = Annotated[list[Prompt], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]


class Strict(BaseModel):
    """No unknown keys, no conversions, no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """How a stream ends."""

    include_usage: bool = Field(default=False, description="send the token counts in a last chunk")


class OpenAIRequest(Strict):
    """What both of OpenAI's endpoints take, with two settings of open models beside."""

    model: str | None = Field(default=None, max_length=512, description="the served model; may be left out")
    temperature: float | None = Field(default=None, ge=0, le=2, description="0: the likeliest token; default 1")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1 << 20, description="0: off")
    repetition_penalty: float | None = Field(default=None, ge=LEAST_PENALTY, le=10, description="1: off")
    n: int | None = Field(default=None, ge=1, le=128)
    stop: Stop | None = None
    seed: int | None = Field(default=None, ge=0, le=MOST_SEED)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=512, description="not used and not logged")
    presence_penalty: float | None = Field(default=None, description="not offered: 0")
    frequency_penalty: float | None = Field(default=None, description="not offered: 0")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @field_validator("presence_penalty", "frequency_penalty")
    @classmethod
    def _nothing_asked_for(cls, penalty: float | None) -> float | None:
        if penalty:
            raise ValueError("not offered: leave it out or give 0; repetition_penalty is")
        return penalty

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> OpenAIRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


class CompletionRequest(OpenAIRequest):
    """``POST /v1/completions``."""

    prompt: Prompt | TokenIds | Prompts
    max_tokens: int | None = Field(default=None, ge=1, description="default 16")
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool | None = None
    best_of: int | None = Field(default=None, ge=1, le=128, description="not offered: n")
    suffix: Literal[""] | None = Field(default=None, description="not offered")

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more prompts, each a text or token numbers."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]

    @model_validator(mode="after")
    def _what_is_not_offered(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not offered: leave it out, or give the value of n")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not offered: log probabilities are of new tokens only")
        return self


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=64)]
    name: str | None = Field(default=None, max_length=64)

    @property
    def text(self) -> str:
        """All of its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(OpenAIRequest):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_tokens: int | None = Field(default=None, ge=1, description="default 256, or what there is room for")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _that_go_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens are two names of one number; give one")
        return self


class GenerationRequest(Strict):
    """``POST /generation``: the shape of EnergonAI's OPT service."""

    prompt: Prompt
    max_tokens: int = Field(ge=1, le=256)
    top_k: int | None = Field(default=None, ge=1, le=1 << 20)
    top_p: float | None = Field(default=None, gt=0, le=1)
    temperature: float | None = Field(default=None, gt=0, le=1)
