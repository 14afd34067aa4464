"""``zero generate``: text from a model that may be larger than the device."""

from __future__ import annotations

import argparse
import logging
import math
from typing import Any

import torch

from zero.config.schema import Config
from zero.errors import UserError
from zero.initializer import initialize
from zero.models.build import build_model, build_tokenizer, max_positions, model_config

logger = logging.getLogger("zero")

_DEFAULT_NEW_TOKENS = 64
_TEMPERATURES = (1e-3, 1e3)


def continue_text(config: Config, arguments: argparse.Namespace) -> str:
    """Prompt and continuation.

    Raises:
        UserError: a number is out of range, the text is too long, or model or tokenizer cannot be had.
    """
    _check(arguments)
    tokenizer = build_tokenizer(config)
    inputs = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False)
    num_new = _num_new_tokens(arguments.max_new_tokens, inputs["input_ids"], max_positions(model_config(config)))
    model: Any = build_model(config, tokenizer)
    model.requires_grad_(False)
    model.eval()
    engine, *_ = initialize(model, config=config)
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
        tokens = model.generate(**inputs, max_new_tokens=num_new, pad_token_id=tokenizer.pad_token_id, **sampling)
    engine.close()
    text: str = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return text


def _check(arguments: argparse.Namespace) -> None:
    """Refuses numbers and texts that cannot be used, before anything is loaded."""
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens}: must be at least 1")
    least, most = _TEMPERATURES
    temperature = arguments.temperature
    if temperature != 0 and not least <= temperature <= most:  # nan is in no range
        raise UserError(f"--temperature {temperature}: must be 0 (the likeliest token), or from {least} to {most:g}")
    if not 0 < arguments.top_p <= 1 or arguments.top_k < 0:
        raise UserError("--top-p must be above 0 and at most 1, --top-k 0 or more")
    if not 0 <= arguments.seed < 1 << 63:
        raise UserError(f"--seed {arguments.seed}: must be from 0 to {(1 << 63) - 1}")
    if temperature == 0 and (arguments.top_k or not math.isclose(arguments.top_p, 1.0)):
        raise UserError("--top-k and --top-p choose among drawn tokens; give a --temperature above 0 with them")
    try:
        arguments.prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"--prompt: not UTF-8 at character {error.start + 1}") from error


def _num_new_tokens(wanted: int | None, prompt: torch.Tensor, num_positions: int | None) -> int:
    """How many tokens to add to a prompt of these token numbers.

    Raises:
        UserError: the model has no room for so many, or the prompt is empty.
    """
    num_given = prompt.numel()
    if num_given == 0:
        raise UserError("--prompt: the prompt has no tokens; give some text")
    num_new = _DEFAULT_NEW_TOKENS if wanted is None else wanted
    if num_positions is None or num_given + num_new <= num_positions:
        return num_new
    room = num_positions - num_given
    if room < 1:
        raise UserError(f"--prompt: {num_given} tokens, and the model reads at most {num_positions}; give less text")
    if wanted is not None:
        raise UserError(
            f"--max-new-tokens {wanted}: the prompt has {num_given} tokens and the model reads at most {num_positions} in "
            f"all; allowed is at most {room}"
        )
    logger.info("at most %d tokens are added: the model reads %d in all", room, num_positions)
    return room
