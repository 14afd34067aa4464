"""From records to token sequences with the labels to learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from zero.data.chat import render, require_chat_template, tokenise_spans
from zero.data.ids import Frame, token_ids
from zero.data.packing import TokenDataset, TokenRecord, pack_stream, pack_whole, pack_windows
from zero.data.records import BadRecord, MessagesRecord, Problems, PromptRecord, Record, TextRecord
from zero.errors import DataError

# With two, the last sequence could be left with a single token, and nothing to predict.
MIN_SEQ_LENGTH = 3


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """How records become sequences.

    Attributes:
        seq_length: Most tokens of a sequence, at least 3.
        packing: Put several records into a sequence.
        loss_on_prompt: Learn prompts and users' turns as well as answers.
        vocab_size: Rows of the model's embedding; larger token ids are refused. None: not checked.
        model_max_positions: Most tokens the model reads at once. None: no limit.
    """

    seq_length: int
    packing: bool = True
    loss_on_prompt: bool = False
    vocab_size: int | None = None
    model_max_positions: int | None = None

    def check(self) -> None:
        """Raises DataError where no sequence could be learned, or read by the model."""
        if self.seq_length < MIN_SEQ_LENGTH:
            raise DataError(f"data.seq_length = {self.seq_length}: allowed is {MIN_SEQ_LENGTH} or more")
        limit = self.model_max_positions
        if limit is not None and self.seq_length > limit:
            raise DataError(
                f"data.seq_length = {self.seq_length}: the model reads at most {limit} positions; set data.seq_length "
                f"to {limit} or less"
            )


@dataclass(slots=True)
class EncodeReport:
    """What happened to the records on the way.

    Attributes:
        num_records: Records given.
        num_truncated: Records longer than a sequence whose end was cut off.
        num_tokens_cut: Tokens lost by that.
        num_masked: Records refused because no token of theirs is to be learned.
    """

    num_records: int = 0
    num_truncated: int = 0
    num_tokens_cut: int = 0
    num_masked: int = 0


def encode(
    records: Sequence[Record],
    tokenizer: Any,
    seq_length: int,
    packing: bool = True,
    loss_on_prompt: bool = False,
    *,
    vocab_size: int | None = None,
    model_max_positions: int | None = None,
    on_error: str = "raise",
    problems: Problems | None = None,
) -> TokenDataset:
    """Tokenises, truncates and packs records of one kind; ``encode_records`` and ``pack`` in one call.

    Raises:
        DataError: As those two.
    """
    problems = Problems(on_error) if problems is None else problems
    options = EncodeOptions(seq_length, packing, loss_on_prompt, vocab_size, model_max_positions)
    encoded, _ = encode_records(records, tokenizer, options, problems)
    return pack(encoded, is_text(records), options)


def is_text(records: Sequence[Record]) -> bool:
    """True for plain text, which is cut anywhere; prompts and conversations stay whole."""
    return isinstance(records[0], TextRecord) if records else True


def encode_records(
    records: Sequence[Record], tokenizer: Any, options: EncodeOptions, problems: Problems
) -> tuple[list[TokenRecord], EncodeReport]:
    """Tokenises records.

    Plain text becomes what ``tokenizer(text)`` gives, with the end-of-sequence token after it. Prompts begin, and
    completions end, in the same way. Conversations are what the chat template makes of them.

    Args:
        records: All of one kind.
        tokenizer: A transformers tokenizer.
        options: Those of ``EncodeOptions``.
        problems: Takes records without a token to learn.

    Returns:
        Tokenised records in the same order, those without a token to learn left out, and what happened to them.

    Raises:
        DataError: No records, or none with a token to learn; a token id that the model has no embedding for; a
            ``seq_length`` that the model cannot read; conversations, but no chat template.
    """
    options.check()
    if not records:
        raise DataError("data: there is no record to train on")
    report = EncodeReport(num_records=len(records))
    kept = list(learnable(records, tokenizer, options, problems, report))
    problems.raise_if_refused()
    if not kept:
        skipped = problems.summary()
        raise DataError("data: no record has a token to learn" + (f"\n{skipped}" if skipped else ""))
    return kept, report


def learnable(
    records: Sequence[Record], tokenizer: Any, options: EncodeOptions, problems: Problems, report: EncodeReport
) -> Iterator[TokenRecord]:
    """Those of the records that something can be learned from, tokenised; the others go to ``problems``.

    Raises:
        DataError: A token id that the model has no embedding for; records of several kinds; no chat template.
    """
    for encoded in _tokenised(records, tokenizer, problems):
        _check_vocabulary(encoded, tokenizer, options.vocab_size)
        whole = replace(encoded, in_loss=None) if options.loss_on_prompt else encoded
        short = whole if is_text(records) else _truncated(whole, options.seq_length, report)
        if short.num_learned or not (short.begins and short.ends):
            yield short
        else:
            report.num_masked += 1
            problems.add(encoded.where, _why_masked(encoded, options.seq_length))


def pack(records: Sequence[TokenRecord], text: bool, options: EncodeOptions) -> TokenDataset:
    """Lays tokenised records out as sequences.

    Plain text: with packing one stream cut every ``seq_length`` tokens, without it every record cut by itself; no
    token is lost. Prompts and conversations: with packing whole records together, without it one to a sequence.
    """
    if text:
        return (pack_stream if options.packing else pack_windows)(records, options.seq_length)
    return (pack_whole if options.packing else pack_windows)(records, options.seq_length)


def _tokenised(records: Sequence[Record], tokenizer: Any, problems: Problems) -> Iterator[TokenRecord]:
    """Each record with its tokens and mask; what the chat template refuses goes to ``problems``."""
    texts = [record for record in records if isinstance(record, TextRecord)]
    prompts = [record for record in records if isinstance(record, PromptRecord)]
    chats = [record for record in records if isinstance(record, MessagesRecord)]
    if len(records) not in (len(texts), len(prompts), len(chats)):
        raise DataError("data: records of several kinds (text, prompts, conversations); train on one kind at a time")
    if chats:
        return _tokenised_chats(chats, tokenizer, problems)
    return _tokenised_texts(texts, tokenizer) if texts else _tokenised_prompts(prompts, tokenizer)


def _tokenised_texts(records: Sequence[TextRecord], tokenizer: Any) -> Iterator[TokenRecord]:
    frame = Frame(tokenizer)
    for record, ids in zip(records, token_ids((record.text for record in records), tokenizer), strict=True):
        start = frame.start if record.begins else frame.start[:0]
        end = frame.end(ids) if record.ends else ids[:0]
        yield TokenRecord(record.where, np.concatenate([start, ids, end]), None, record.begins, record.ends)


def _tokenised_prompts(records: Sequence[PromptRecord], tokenizer: Any) -> Iterator[TokenRecord]:
    """A prompt's tokens are those it has on its own, as when the model is used; the completion's follow.

    A prompt that ends within a word, or in a blank, makes the tokenizer write the completion's start another way than
    in running text. That is what the model meets in use, too.
    """
    frame = Frame(tokenizer)
    prompts = token_ids((record.prompt for record in records), tokenizer)
    completions = token_ids((record.completion for record in records), tokenizer)
    joined = token_ids((record.prompt + record.completion for record in records), tokenizer)
    for record, prompt, completion, both in zip(records, prompts, completions, joined, strict=True):
        # Where the prompt's tokens begin those of both, the rest is how the tokenizer writes the completion here. Where
        # a token would reach over the seam, the completion has its own.
        if np.array_equal(both[: len(prompt)], prompt):
            completion = both[len(prompt) :]
        ids = np.concatenate([frame.start, prompt, completion, frame.end(completion)])
        yield TokenRecord(record.where, ids, np.arange(len(ids)) >= len(frame.start) + len(prompt))


def _tokenised_chats(records: Sequence[MessagesRecord], tokenizer: Any, problems: Problems) -> Iterator[TokenRecord]:
    template = require_chat_template(tokenizer)
    for record in records:
        try:
            text, spans = render(record.messages, tokenizer, template)
        except BadRecord as error:
            problems.add(record.where, str(error))
        else:
            ids, mask = tokenise_spans(text, spans, tokenizer)
            yield TokenRecord(record.where, np.array(ids, np.int32), mask)


def _truncated(record: TokenRecord, seq_length: int, report: EncodeReport) -> TokenRecord:
    excess = len(record.token_ids) - seq_length
    if excess <= 0:
        return record
    report.num_truncated += 1
    report.num_tokens_cut += excess
    in_loss = None if record.in_loss is None else record.in_loss[:seq_length]
    return TokenRecord(record.where, record.token_ids[:seq_length], in_loss)


def _why_masked(record: TokenRecord, seq_length: int) -> str:
    num_tokens = len(record.token_ids)
    if record.num_learned:
        return (
            f"no token to learn is left: the answer begins after the first {seq_length} of its {num_tokens} tokens. "
            "Set data.seq_length higher"
        )
    if num_tokens < 2:
        return f"{num_tokens} token{'s' if num_tokens != 1 else ''}: nothing to predict"
    return (
        f"no token to learn: the labels of all its {num_tokens} tokens are masked (no text of the assistant's in it?)"
    )


def _check_vocabulary(record: TokenRecord, tokenizer: Any, vocab_size: int | None) -> None:
    if vocab_size is None or not len(record.token_ids):
        return
    highest = int(record.token_ids.max())
    if highest >= vocab_size:
        raise DataError(
            f"{record.where}: the tokenizer gives token id {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), "
            f"but the model has embeddings for ids below {vocab_size} only: tokenizer ({len(tokenizer)} tokens) and "
            "model do not belong together. Set model.tokenizer to the model's own, or vocab_size in model.config to "
            f"{len(tokenizer)} or more"
        )
