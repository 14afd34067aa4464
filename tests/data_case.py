"""Small things that several data tests use: a config of plain attributes, tokenizers, chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, TypeVar

from hypothesis import settings
from tokenizers import pre_tokenizers

from zero.data.packing import TokenDataset
from zero.data.resumable import Batch
from zero.data.tokenizer import builtin_tokenizer

T = TypeVar("T")
# Without a deadline: the machine's other work is no failure of ours.
PROPERTY = settings(max_examples=40, deadline=None)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The same, and it says itself what the assistant's part is (here without the line end after it).
CHATML_GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TALK = (
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "And of Peru?"},
    {"role": "assistant", "content": "Lima, of course."},
)


@cache
def tokenizer() -> Any:
    """A small byte-level tokenizer. Shared: do not change it."""
    return builtin_tokenizer(512)


@cache
def chat_tokenizer(template: str | None = CHATML, trim_offsets: bool = False) -> Any:
    """One with the turn marks as special tokens, and a template. Shared: do not change it."""
    made = builtin_tokenizer(512)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if trim_offsets:
        from tokenizers import processors

        made.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True, add_prefix_space=False)
    made.chat_template = template
    return made


def ids_of(dataset: TokenDataset) -> list[list[int]]:
    """The token ids of each sequence."""
    return [dataset[i]["input_ids"].tolist() for i in range(len(dataset))]


def config(train: Any, *, batch: int = 4, seed: int = 0, **data: Any) -> Any:
    """What `build_dataloaders` reads of a config, with the schema's defaults."""
    fields = {
        "eval": None,
        "dataset_config": None,
        "train_split": "train",
        "eval_split": None,
        "format": "auto",
        "text_column": None,
        "seq_length": 64,
        "packing": True,
        "loss_on_prompt": False,
        "eval_fraction": 0.05,
        "max_samples": None,
        "shuffle": True,
        "shuffle_buffer": 1000,
        "on_error": "raise",
        "streaming": False,
        "num_workers": 0,
    }
    unknown = set(data) - set(fields)
    if unknown:
        raise KeyError(f"no such field of [data]: {unknown}")
    return SimpleNamespace(
        data=SimpleNamespace(train=train, **{**fields, **data}),
        train=SimpleNamespace(per_device_train_batch_size=batch, per_device_eval_batch_size=batch, seed=seed),
    )


def micro_steps(
    learned: Callable[[Batch], list[T]], loaders: Sequence[Any], num_steps: int
) -> list[tuple[list[list[T]], Any]]:
    """What each rank learns in each micro-step, over as many epochs as it takes, and the place after it.

    Args:
        learned: what counts in a batch.
        loaders: one for each rank.
        num_steps: how many.
    """
    steps: list[tuple[list[list[T]], Any]] = []
    while len(steps) < num_steps:
        for batches in zip(*loaders, strict=True):
            states = [loader.state_dict() for loader in loaders]
            assert all(state == states[0] for state in states)
            # As a checkpoint writes the place.
            steps.append(([learned(batch) for batch in batches], json.loads(json.dumps(states[0]))))
            if len(steps) == num_steps:
                break
    return steps
