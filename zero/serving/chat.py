"""From the messages of a chat to the prompt that its model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zero.serving.problems import ApiError
from zero.serving.schemas import Message


def chat_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token numbers of a chat, up to where the assistant's answer begins.

    Raises:
        ApiError: 400 where the model has no chat template, or where that does not take these messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ApiError(
            400,
            "this model has no chat template: it continues texts; use /v1/completions with the chat written as text",
            param="messages",
            code="no_chat_template",
        )
    turns = [{"role": message.role, "content": message.text} for message in messages]
    try:
        # As text first: templates write their own begin token, which encoding must not add a second time.
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template can refuse, or fail, in any way of Jinja's
        raise ApiError(
            400, f"the model's chat template does not take these messages ({type(error).__name__})", param="messages"
        ) from None
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens
