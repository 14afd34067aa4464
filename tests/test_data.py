"""Training data, from text to batches: no token lost, and none learned that should not be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_case import CHATML, CHATML_GENERATION, PROPERTY, TALK, chat_tokenizer, ids_of, tokenizer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

import zero.data.ids as ids_module
from zero.data.chat import tokenise_spans
from zero.data.collate import Collator, pad_id
from zero.data.packing import IGNORED_LABEL, TokenDataset, TokenRecord, best_fit, pack_stream
from zero.data.preview import describe_sample
from zero.data.records import MessagesRecord, Problems, PromptRecord, TextRecord
from zero.data.sample import builtin_documents
from zero.data.tokenise import EncodeOptions, encode, encode_records
from zero.data.tokenizer import builtin_tokenizer
from zero.errors import ConfigError, DataError

EOS = 2


def labels_of(dataset: TokenDataset) -> list[list[int]]:
    return [dataset[i]["labels"].tolist() for i in range(len(dataset))]


def texts(*contents: str) -> list[TextRecord]:
    return [TextRecord(f"t:{i}", content) for i, content in enumerate(contents, 1)]


# --- the built-in sample and tokenizer


def test_sample_is_prose_without_a_paragraph_twice() -> None:
    documents = builtin_documents()
    assert len(documents) > 100
    assert sum(map(len, documents)) > 200_000
    paragraphs = [paragraph for document in documents for paragraph in document.strip().split("\n\n")[1:]]
    assert len(paragraphs) == len(set(paragraphs))
    assert not any("::=" in paragraph or ">>>" in paragraph for paragraph in paragraphs)


def test_tokenizer_is_the_same_every_time_and_survives_saving(tmp_path: Path) -> None:
    first, second = builtin_tokenizer(600), builtin_tokenizer(600)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    first.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = builtin_documents()[3]
    assert loaded(text).input_ids == first(text).input_ids
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (1, EOS, EOS)
    assert len(loaded) == 600


@PROPERTY
@given(st.text())
def test_tokenizer_writes_any_text(text: str) -> None:
    token_ids = tokenizer()(text, add_special_tokens=False).input_ids
    assert tokenizer().decode(token_ids) == text
    assert tokenizer()(text).input_ids == [EOS, *token_ids]


def test_tokenizer_learns_from_other_text_and_refuses_too_small_a_vocabulary() -> None:
    made = builtin_tokenizer(300, ["abab abab abab"] * 50)
    assert len(made("abab", add_special_tokens=False).input_ids) == 1
    with pytest.raises(ConfigError, match="at least 260"):
        builtin_tokenizer(259)


# --- plain text


@PROPERTY
@given(st.lists(st.text(min_size=1), min_size=1, max_size=8), st.integers(3, 40), st.booleans())
def test_plain_text_loses_no_token(contents: list[str], seq_length: int, packing: bool) -> None:
    given_ids = [[*tokenizer()(content).input_ids, EOS] for content in contents]
    dataset = encode(texts(*contents), tokenizer(), seq_length, packing)
    sequences = ids_of(dataset)
    assert sum(sequences, []) == sum(given_ids, [])
    assert all(2 <= len(sequence) <= seq_length for sequence in sequences)
    if packing:
        assert all(len(sequence) == seq_length for sequence in sequences[:-2])
    assert labels_of(dataset) == sequences
    assert dataset.num_tokens == sum(map(len, given_ids))
    assert dataset.num_loss_tokens == dataset.num_tokens - len(sequences)


def test_the_first_token_of_a_sequence_counts_as_none_in_the_loss() -> None:
    tokens, mask = np.arange(6, dtype=np.int32), np.array([True, False, True, True, True, False])
    dataset = TokenDataset(tokens, mask, np.array([0, 3, 6]))
    assert dataset.num_loss_tokens == 2
    assert TokenRecord("t", tokens, mask).num_learned == 3
    assert labels_of(dataset) == [[0, IGNORED_LABEL, 2], [3, 4, IGNORED_LABEL]]


def test_without_packing_no_sequence_holds_two_documents() -> None:
    dataset = encode(texts("one two three", "four"), tokenizer(), 4, packing=False)
    joined = [tokenizer().decode(sequence) for sequence in ids_of(dataset)]
    assert not any("three" in text and "four" in text for text in joined)
    assert "".join(joined) == "</s>one two three</s></s>four</s>"


@pytest.mark.parametrize(("num_tokens", "lengths"), [(8, [4, 4]), (9, [4, 3, 2]), (10, [4, 4, 2]), (3, [3]), (1, [1])])
def test_the_rest_of_a_stream_is_kept_and_never_a_lone_token(num_tokens: int, lengths: list[int]) -> None:
    dataset = pack_stream([TokenRecord("t", np.arange(num_tokens, dtype=np.int32))], 4)
    assert [len(sequence) for sequence in ids_of(dataset)] == lengths
    assert sum(ids_of(dataset), []) == list(range(num_tokens))


def test_long_texts_go_through_in_parts_with_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(builtin_documents()[:6])
    whole = tokenizer()(text).input_ids
    monkeypatch.setattr(ids_module, "MAX_BATCH_CHARS", 37)
    assert sum(1 for _ in ids_module._parts(text)) > 50
    assert sum(ids_of(encode(texts(text), tokenizer(), 64)), []) == [*whole, EOS]
    one_line = "x" * 500
    assert sum(ids_of(encode(texts(one_line), tokenizer(), 64)), []) == [*tokenizer()(one_line).input_ids, EOS]


def test_a_document_that_ends_itself_gets_no_second_end() -> None:
    ids = ids_of(encode(texts("the end</s>"), tokenizer(), 64))[0]
    assert ids[-1] == EOS
    assert ids[-2] != EOS


def test_tokenizers_without_bos_and_with_a_suffix_keep_their_ways() -> None:
    from tokenizers import processors

    plain = builtin_tokenizer(512)
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    bare = tokenizer()("hello there", add_special_tokens=False).input_ids
    assert ids_of(encode(texts("hello there"), plain, 64)) == [[*bare, EOS]]
    framed = builtin_tokenizer(512)
    framed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", EOS)]
    )
    assert ids_of(encode(texts("hello there"), framed, 64)) == [[0, *bare, EOS]]


def test_parts_are_not_cut_within_blank_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "word\n\n\n\nword\n\n\n" * 20 + "end"
    made = builtin_tokenizer(300, [text])
    whole = made(text).input_ids
    monkeypatch.setattr(ids_module, "MAX_BATCH_CHARS", 5)
    assert sum(ids_of(encode(texts(text), made, 64)), []) == [*whole, EOS]


# --- prompts and completions


def test_only_the_completion_is_learned_token_by_token() -> None:
    prompt, completion = "Translate: bonjour\n", "good morning"
    before = tokenizer()(prompt).input_ids
    after = tokenizer()(completion, add_special_tokens=False).input_ids
    sample = encode([PromptRecord("p:1", prompt, completion)], tokenizer(), 64)[0]
    assert sample["input_ids"].tolist() == [*before, *after, EOS]
    assert sample["labels"].tolist() == [IGNORED_LABEL] * len(before) + [*after, EOS]


def test_a_prompt_has_the_tokens_it_has_on_its_own_where_a_token_would_cross_the_seam() -> None:
    made = builtin_tokenizer(300, ["abcd abcd abcd"] * 50)
    assert len(made("abcd", add_special_tokens=False).input_ids) == 1
    sample = encode([PromptRecord("p:1", "ab", "cd")], made, 64)[0]
    prompt = made("ab").input_ids
    assert sample["input_ids"].tolist()[: len(prompt)] == prompt
    assert made.decode(sample["input_ids"]) == "</s>abcd</s>"
    assert (sample["labels"] != IGNORED_LABEL).tolist() == [i >= len(prompt) for i in range(len(sample["labels"]))]


def test_a_tokenizer_that_begins_texts_with_a_blank_puts_none_between_prompt_and_completion() -> None:
    from tokenizers import Tokenizer, decoders, models, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator(builtin_documents()[:40], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    made = PreTrainedTokenizerFast(tokenizer_object=backend)
    for prompt, completion in (("The name", " is this"), ("The name:", "me")):
        sample = encode([PromptRecord("p:1", prompt, completion)], made, 64)[0]
        assert made.decode(sample["input_ids"]) == prompt + completion
        assert made.decode(sample["input_ids"][sample["labels"] == IGNORED_LABEL]) == prompt


def test_loss_on_prompt_learns_everything() -> None:
    sample = encode([PromptRecord("p:1", "question ", "answer")], tokenizer(), 64, loss_on_prompt=True)[0]
    assert torch.equal(sample["labels"], sample["input_ids"])


@PROPERTY
@given(st.lists(st.tuples(st.text(max_size=20), st.text(min_size=1, max_size=20)), min_size=1, max_size=12))
def test_packed_samples_stay_whole_with_their_masks(pairs: list[tuple[str, str]]) -> None:
    records = [PromptRecord(f"p:{i}", *pair) for i, pair in enumerate(pairs)]
    single = encode(records, tokenizer(), 512, packing=False)
    packed = encode(records, tokenizer(), 512, packing=True)
    alone = list(zip(ids_of(single), labels_of(single), strict=True))
    for ids, labels in zip(ids_of(packed), labels_of(packed), strict=True):
        # Take whole samples off the front until nothing is left.
        while ids:
            match = next(one for one in alone if ids[: len(one[0])] == one[0] and labels[: len(one[1])] == one[1])
            alone.remove(match)
            ids, labels = ids[len(match[0]) :], labels[len(match[1]) :]
    assert not alone


@PROPERTY
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 90))
def test_best_fit_places_everything_once_and_leaves_no_two_bins_to_join(lengths: list[int], capacity: int) -> None:
    bins = best_fit(lengths, capacity)
    assert sorted(index for one in bins for index in one) == list(range(len(lengths)))
    filled = sorted(sum(lengths[index] for index in one) for one in bins)
    assert all(total <= capacity for total in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > capacity


def test_overlong_records_are_cut_and_counted() -> None:
    records = [PromptRecord("p:1", "a\n", "long words here " * 40), PromptRecord("p:2", "a\n", "b")]
    problems = Problems()
    encoded, report = encode_records(records, tokenizer(), EncodeOptions(16), problems)
    assert [len(record.token_ids) for record in encoded] == [16, 5]
    whole = len(tokenizer()("a\n" + "long words here " * 40).input_ids) + 1
    assert (report.num_truncated, report.num_tokens_cut) == (1, whole - 16)


def test_a_record_whose_answer_is_cut_off_is_refused_by_name_or_counted() -> None:
    records = [PromptRecord("p.jsonl:7", "long words here " * 40, "b"), PromptRecord("p.jsonl:8", "a", "b")]
    with pytest.raises(DataError, match=r"p\.jsonl:7: no token to learn is left.*Set\s+data\.seq_length higher"):
        encode(records, tokenizer(), 16)
    problems = Problems("skip")
    dataset = encode(records, tokenizer(), 16, problems=problems)
    assert (len(dataset), problems.num_bad) == (1, 1)
    assert "p.jsonl:7" in str(problems.summary())
    with pytest.raises(DataError, match="no record has a token to learn"):
        encode(records[:1], tokenizer(), 16, on_error="skip")


# --- conversations


def expected_chat(made: Any, learn_line_end: bool) -> tuple[list[int], list[int]]:
    """Ids and labels of TALK, put together from its parts; the turn marks keep tokens from crossing."""
    ids: list[int] = []
    labels: list[int] = []
    for turn in TALK:
        head = made(f"<|im_start|>{turn['role']}\n", add_special_tokens=False).input_ids
        body = made(turn["content"] + "<|im_end|>", add_special_tokens=False).input_ids
        end = made("\n", add_special_tokens=False).input_ids
        learned = turn["role"] == "assistant"
        ids += head + body + end
        labels += [IGNORED_LABEL] * len(head) + (body if learned else [IGNORED_LABEL] * len(body))
        labels += end if learned and learn_line_end else [IGNORED_LABEL] * len(end)
    return ids, labels


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize(("template", "line_end"), [(CHATML, True), (CHATML_GENERATION, False)])
def test_only_the_assistant_is_learned_token_by_token(template: str, line_end: bool, trim_offsets: bool) -> None:
    made = chat_tokenizer(template, trim_offsets)
    sample = encode([MessagesRecord("m:1", TALK)], made, 256)[0]
    ids, labels = expected_chat(made, line_end)
    assert sample["input_ids"].tolist() == ids
    assert sample["labels"].tolist() == labels


def test_a_generation_block_that_ends_in_blanks_does_not_run_on() -> None:
    # With trimmed offsets the last character has no token by position, which must not mean "all the rest".
    template = CHATML_GENERATION.replace("<|im_end|>{% endgeneration %}", "<|im_end|> {% endgeneration %}")
    made = chat_tokenizer(template, trim_offsets=True)
    sample = encode([MessagesRecord("m:1", TALK)], made, 256)[0]
    learned = sample["input_ids"][sample["labels"] != IGNORED_LABEL]
    assert made.decode(learned) == "Paris<|im_end|> Lima, of course.<|im_end|> "


def test_a_tokenizer_without_offsets_gives_the_same_mask() -> None:
    made = chat_tokenizer()

    class Slow:
        is_fast = False

        def __getattr__(self, name: str) -> Any:
            return getattr(made, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            assert "return_offsets_mapping" not in kwargs
            return made(*args, **kwargs)

    fast = encode([MessagesRecord("m:1", TALK)], made, 256)
    slow = encode([MessagesRecord("m:1", TALK)], Slow(), 256)
    assert (ids_of(fast), labels_of(fast)) == (ids_of(slow), labels_of(slow))


def test_an_empty_span_marks_nothing() -> None:
    ids, mask = tokenise_spans("abcdef", [(1, 1), (6, 6)], builtin_tokenizer(300, ["abcdef"] * 9))
    assert len(ids) == 1
    assert not mask.any()


# Writes an answer's reasoning only where it is the last, as reasoning models' templates do.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_answers_are_found_where_the_template_writes_earlier_ones_another_way() -> None:
    made = chat_tokenizer(REASONING)
    sample = encode([MessagesRecord("m:1", TALK)], made, 256)[0]
    learned = made.decode(sample["input_ids"][sample["labels"] != IGNORED_LABEL])
    assert learned == "Paris<|im_end|>\n<think>\n\n</think>\n\nLima, of course.<|im_end|>\n"


def test_a_generation_prompt_with_more_than_the_header_is_not_learned_twice() -> None:
    made = chat_tokenizer(CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}"))
    sample = encode([MessagesRecord("m:1", TALK)], made, 256)[0]
    learned = made.decode(sample["input_ids"][sample["labels"] != IGNORED_LABEL])
    assert learned == "Paris<|im_end|>\nLima, of course.<|im_end|>\n"


def test_a_template_that_rewrites_or_refuses_is_said_with_the_record() -> None:
    shrinks = "{{ messages | length }} turns: {% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"m:1: messages\[2\].*rewrites what stands before.*generation"):
        encode([MessagesRecord("m:1", TALK)], chat_tokenizer(shrinks), 256)
    refuses = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="m:1: the tokenizer's chat template refuses.*roles must alternate"):
        encode([MessagesRecord("m:1", TALK)], chat_tokenizer(refuses), 256)


def test_conversations_need_a_chat_template() -> None:
    with pytest.raises(DataError, match="no chat template.*chat_template.jinja.*prompt"):
        encode([MessagesRecord("m:1", TALK)], tokenizer(), 256)


def test_a_conversation_without_a_learned_token_is_refused() -> None:
    silent = CHATML_GENERATION.replace("== 'assistant'", "== 'narrator'")
    with pytest.raises(DataError, match="m:1: no token to learn"):
        encode([MessagesRecord("m:1", TALK)], chat_tokenizer(silent), 256)


# --- limits of the model


def test_sequences_and_tokens_that_the_model_cannot_read_are_refused() -> None:
    with pytest.raises(DataError, match=r"seq_length = 4096.*at most 2048 positions; set data\.seq_length to 2048"):
        encode(texts("a b"), tokenizer(), 4096, model_max_positions=2048)
    with pytest.raises(DataError, match=r"seq_length = 2: allowed is 3 or more"):
        encode(texts("a b"), tokenizer(), 2)
    with pytest.raises(
        DataError, match=r"t:1: the tokenizer gives token id \d+ .*below 300 only.*512 tokens.*vocab_size"
    ):
        encode(texts(builtin_documents()[0]), tokenizer(), 64, vocab_size=300)
    highest = max(tokenizer()("some words").input_ids)
    encode(texts("some words"), tokenizer(), 64, vocab_size=highest + 1)
    with pytest.raises(DataError, match=f"token id {highest} .*below {highest} only"):
        encode(texts("some words"), tokenizer(), 64, vocab_size=highest)
    with pytest.raises(DataError, match="no record"):
        encode([], tokenizer(), 64)
    with pytest.raises(DataError, match="several kinds"):
        encode([TextRecord("t", "a b"), PromptRecord("p", "a", "b")], tokenizer(), 64)


# --- batches


@PROPERTY
@given(st.lists(st.lists(st.integers(5, 99), min_size=1, max_size=9), min_size=1, max_size=6), st.integers(0, 4))
def test_padding_is_neither_seen_nor_learned(rows: list[list[int]], pad: int) -> None:
    batch = Collator(pad)([{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows])
    assert {key: value.dtype for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.int64
    )
    assert all(value.shape == (len(rows), max(map(len, rows))) for value in batch.values())
    padding = batch["attention_mask"] == 0
    assert (batch["labels"][padding] == IGNORED_LABEL).all()
    assert (batch["input_ids"][padding] == pad).all()
    for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        assert ids[mask == 1].tolist() == row


def test_collator_refuses_what_does_not_fit_together() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Collator(0)([])
    with pytest.raises(ValueError, match="2 input_ids but 1 labels"):
        Collator(0)([{"input_ids": [1, 2], "labels": [1]}])


def test_the_pad_id_is_one_the_model_has() -> None:
    assert pad_id(tokenizer()) == 1
    made = builtin_tokenizer(512)
    made.add_special_tokens({"pad_token": "<new pad>"})
    assert pad_id(made) == 512
    assert pad_id(made, vocab_size=512) == EOS
    made.pad_token = made.eos_token = None
    assert pad_id(made) == 0


# --- what people see before training


def test_preview_shows_text_and_mask() -> None:
    sample = encode([PromptRecord("p:1", "Question?\n", "An answer")], tokenizer(), 64)[0]
    preview = describe_sample(sample, tokenizer())
    prompt = len(tokenizer()("Question?\n").input_ids)
    total = len(sample["input_ids"])
    assert preview.plain == (
        f"{total} tokens, {total - prompt} in the loss, {prompt} not\n[masked: </s>Question?\n]An answer</s>"
    )
    console = Console(force_terminal=True, color_system="standard", width=200, record=True)
    with console.capture() as capture:
        console.print(preview)
    assert "\x1b[32mAn answer</s>\x1b[0m" in capture.get()
    assert "\x1b[2m</s>Question?" in capture.get()


def test_preview_leaves_padding_out_cuts_long_samples_and_tames_control_characters() -> None:
    samples = [encode(texts(text), tokenizer(), 512)[0] for text in ("one two three four five six", "a\x1b[31mb")]
    batch = Collator(1)(samples)
    row = {key: value[1] for key, value in batch.items()}
    preview = describe_sample(row, tokenizer())
    assert "<pad>" not in preview.plain
    assert "\x1b" not in preview.plain
    short = describe_sample(samples[0], tokenizer(), max_tokens=2)
    assert f"... and {len(samples[0]['input_ids']) - 2} more tokens" in short.plain
    assert "six" not in short.plain
