"""What the tests of generation share: tiny models, a tokenizer of bytes, generators on the host and on a small device."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import nn

import zero
from tests.engine_models import MODELS, VOCAB
from zero.config.loading import load_config
from zero.dryrun import Generation
from zero.generation import Generator, Job, Limits, Sampling
from zero.inference import make_inference_engine

KINDS = ("opt-pre-norm", "opt-post-norm", "gpt2", "llama", "mixtral")
SMALL = {"type": "simulated", "memory": "400KiB"}
HOST = {"type": "cpu"}


class Letters:
    """A tokenizer without a vocabulary: each of 96 tokens is a character, four are special."""

    eos_token_id = 2
    pad_token_id = 1

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 28 for letter in text]}

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        return "".join(chr(token + 28) for token in tokens if token >= 4)


class Bytes:
    """A tokenizer whose tokens are bytes, four after the special ones."""

    eos_token_id = 2
    pad_token_id = 1

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [byte + 4 for byte in text.encode()]}

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        return bytes(token - 4 for token in tokens if token >= 4).decode(errors="replace")


def model_of(kind: str) -> Any:
    """One of the tiny models, ready to generate."""
    model: Any = MODELS[kind]().eval()
    model.generation_config.eos_token_id = 2
    return model


class Scripted(nn.Module):
    """A causal model that says what a function of all tokens so far tells it; it has one block and keeps no values."""

    def __init__(self, say: Callable[[list[int]], int], num_tokens: int = 300) -> None:
        super().__init__()
        self.config = transformers.LlamaConfig(
            vocab_size=num_tokens, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
            max_position_embeddings=256, eos_token_id=2, bos_token_id=0,
        )  # fmt: skip
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.say = say
        self.num_tokens = num_tokens

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past_key_values: Any, use_cache: bool = True
    ) -> Any:
        states = input_ids.float()[:, None, :, None].expand(-1, 1, -1, 4)
        keys, _ = past_key_values.update(states, states, 0)
        self.layers[0](states.reshape(-1, 4))
        logits = torch.zeros(len(input_ids), 1, self.num_tokens)
        for row, (tokens, mask) in enumerate(zip(keys[:, 0, :, 0].tolist(), attention_mask.tolist(), strict=True)):
            logits[row, 0, self.say([int(t) for t, m in zip(tokens, mask, strict=True) if m])] = 9.0
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


@contextlib.contextmanager
def generating(
    model: nn.Module,
    device: dict[str, Any] = HOST,
    tokenizer: Any = None,
    planned: Generation | None = None,
    **limits: Any,
) -> Iterator[Generator]:
    """A generator on an engine of its own; what it leaves behind is checked.

    Args:
        model: that generates.
        device: as the config names it.
        tokenizer: one letter a token where there is none.
        planned: passes that are planned for; None: an engine for training, whose passes without gradients are not.
        limits: of the generator.
    """
    if planned is None:
        engine, *_ = zero.initialize(model, config={"device": device})
    else:
        config, cache_bytes = load_config({"device": device}), limits.get("max_cache_bytes")
        engine, _ = make_inference_engine(model, config, expected=planned, fewer=True, cache_bytes=cache_bytes)
    generator = Generator(engine, tokenizer or Letters(), Limits(**limits))
    # What a model keeps beside its parameters is counted from the first pass on that looks at it.
    before_bytes = engine.device.memory().non_model_bytes + sum(buffer.nbytes for buffer in model.buffers())
    yield generator
    generator.close()
    statistics = generator.statistics
    assert (statistics.num_rows, statistics.num_waiting, statistics.cache_bytes) == (0, 0, 0)
    assert engine.device.memory().non_model_bytes <= before_bytes, "something is left on the device"
    engine.check_integrity()
    engine.close()


def prompts(num: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Random ones, of all lengths."""
    source = random.Random(seed)
    return [[source.randrange(4, VOCAB) for _ in range(source.randint(1, longest))] for _ in range(num)]


def tokens_of(job: Job, choice: int = 0) -> list[int]:
    """What it was given."""
    return job.result(0)[choice].tokens


def settings(num: int, seed: int = 0) -> list[Sampling]:
    """Random ones, all different."""
    source = random.Random(seed)
    return [
        Sampling(
            max_new_tokens=source.randint(1, 20),
            temperature=source.choice([0.0, 0.3, 1.0, 3.0]),
            top_k=source.choice([0, 0, 1, 5, 30]),
            top_p=source.choice([1.0, 0.9, 0.3]),
            repetition_penalty=source.choice([1.0, 1.0, 1.3, 0.8]),
            seed=source.randrange(1 << 30),
            logprobs=source.choice([None, None, 0, 3]),
            stop=source.choice([(), (), ("a",), ("K", "zz")]),
        )
        for _ in range(num)
    ]
