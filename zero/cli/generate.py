"""``zero generate``: text from a model that may be larger than the device."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from zero.config.schema import Config
from zero.errors import UserError
from zero.initializer import initialize
from zero.models.build import build_model, build_tokenizer


def continue_text(config: Config, arguments: argparse.Namespace) -> str:
    """Prompt and continuation.

    Raises:
        UserError: a number is out of range, or model or tokenizer cannot be had.
    """
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens}: must be at least 1")
    if arguments.temperature < 0 or not 0 < arguments.top_p <= 1 or arguments.top_k < 0:
        raise UserError("--temperature must be 0 or more, --top-p above 0 and at most 1, --top-k 0 or more")
    tokenizer = build_tokenizer(config)
    model: Any = build_model(config, tokenizer)
    model.requires_grad_(False)
    model.eval()
    engine, *_ = initialize(model, config=config)
    inputs = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].numel() == 0:
        raise UserError("--prompt: the prompt has no tokens; give some text")
    sampling: dict[str, Any] = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": arguments.temperature,
            "top_k": arguments.top_k,
            "top_p": arguments.top_p,
        }
    torch.manual_seed(arguments.seed)
    with torch.no_grad():
        tokens = model.generate(
            **inputs, max_new_tokens=arguments.max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
        )
    engine.close()
    text: str = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return text
