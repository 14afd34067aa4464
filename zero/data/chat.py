"""Conversations as tokens, with the assistant's turns marked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from zero.data.packing import LossMask
from zero.data.records import BadRecord
from zero.errors import DataError

_OTHER_TEMPLATE = (
    "Use a chat template that marks answers with {% generation %}, or keep only the last answer of each conversation"
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Message = Mapping[str, Any]
Span = tuple[int, int]


def require_chat_template(tokenizer: Any) -> str:
    """The tokenizer's template for conversations.

    Raises:
        DataError: It has none.
    """
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        name = getattr(tokenizer, "name_or_path", "") or "this tokenizer"
        raise DataError(
            f'data: the records are conversations ("messages"), but {name} has no chat template. Use the tokenizer of '
            "an instruction-tuned model (model.tokenizer), put a chat_template.jinja beside the tokenizer's files, or "
            'give the data as "prompt" + "completion"'
        ) from error


def render(messages: Sequence[Message], tokenizer: Any, template: str) -> tuple[str, list[Span]]:
    """A conversation as the model reads it, and where in it the assistant speaks.

    Templates with a ``{% generation %}`` block say themselves what the assistant's part is. With others, an answer is
    what is added to the conversation before it, once its generation prompt stands, by the answer.

    Returns:
        The text, and [start, end) spans of characters.

    Raises:
        BadRecord: The template refuses the conversation, or an answer cannot be found in what it renders.
    """
    try:
        if _GENERATION.search(template):
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                chat_template=template,
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
            )
            return texts[0], list(spans[0])
        text = _apply(tokenizer, messages)
        return text, [
            _answer_span(messages, index, text, tokenizer)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
    except BadRecord:
        raise
    except Exception as error:  # templates are programs of others and fail in every way
        raise BadRecord(f"the tokenizer's chat template refuses this conversation: {error}") from error


def _apply(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    if not messages:
        return ""
    return str(
        tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    )


def _answer_span(messages: Sequence[Message], index: int, text: str, tokenizer: Any) -> Span:
    """Where in ``text`` the answer ``messages[index]`` stands, its end-of-turn mark included."""
    before = _before(messages, index, text, tokenizer)
    after = _apply(tokenizer, messages[: index + 1])
    if text.startswith(after) and len(after) > before:
        return before, len(after)
    # Some templates write earlier answers another way than the last (without their reasoning): look for the words.
    content = str(messages[index]["content"]).strip()
    start, in_after = text.find(content, before), after.rfind(content)
    if not content or start < 0 or in_after < 0:
        raise BadRecord(
            f"messages[{index}]: this answer cannot be found in what the chat template renders. {_OTHER_TEMPLATE}"
        )
    end = start + len(content)
    closing = after[in_after + len(content) :]
    return before, end + (len(closing) if text.startswith(closing, end) else 0)


def _before(messages: Sequence[Message], index: int, text: str, tokenizer: Any) -> int:
    """Number of characters of ``text`` that stand before the answer ``messages[index]``."""
    head = _apply(tokenizer, messages[:index])
    prompted = _apply(tokenizer, messages[:index], add_generation_prompt=True)
    # A generation prompt may end in words that this answer does not begin with, such as the start of a reasoning block.
    shared = os.path.commonprefix([prompted, text])
    if text.startswith(head):
        return max(len(head), len(shared))
    if shared == prompted:
        return len(prompted)
    raise BadRecord(f"messages[{index}]: the chat template rewrites what stands before this answer. {_OTHER_TEMPLATE}")


def tokenise_spans(text: str, spans: Sequence[Span], tokenizer: Any) -> tuple[list[int], LossMask]:
    """Token ids of ``text`` as it is (no special tokens are added), and which of them reach into one of the spans."""
    if not tokenizer.is_fast:
        return _tokenise_by_prefix(text, spans, tokenizer)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoding["input_ids"])
    ends = np.array([end for _, end in encoding["offset_mapping"]], np.int64)
    # Tokenizers may trim blanks off offsets, which leaves those of a token of blanks empty; its end is right.
    starts = np.minimum(np.array([start for start, _ in encoding["offset_mapping"]], np.int64), ends - 1)
    mask = np.zeros(len(ids), np.bool_)
    for start, end in spans:
        if start < end:
            mask |= (starts < end) & (ends > start)
    return ids, mask


def _tokenise_by_prefix(text: str, spans: Sequence[Span], tokenizer: Any) -> tuple[list[int], LossMask]:
    """For tokenizers without offsets: a span begins where the tokens of the text before it stop being a prefix."""
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    mask = np.zeros(len(ids), np.bool_)
    for start, end in spans:
        first, last = (
            common_prefix(list(tokenizer(text[:position], add_special_tokens=False, verbose=False)["input_ids"]), ids)
            for position in (start, end)
        )
        mask[first:last] = True
    return ids, mask


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids at the start of two lists are the same."""
    for position, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return position
    return min(len(left), len(right))
