"""``zero generate``: text from a model that may be larger than the device."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from typing import Any

from zero.cli.prompts import Prompt, open_output, read_prompts, require_utf8, run_prompts, write_out
from zero.config.schema import Config
from zero.errors import UserError
from zero.generation import Generator, Piece, Sampling, open_generator
from zero.generation.sampling import LEAST_TEMPERATURE, MOST_SEED, MOST_TEMPERATURE
from zero.models.build import build_tokenizer, max_positions, model_config

logger = logging.getLogger("zero")

_DEFAULT_NEW_TOKENS = 64
EXIT_FAILED = 1


def generate_texts(config: Config, arguments: argparse.Namespace) -> int:
    """Prompt and continuation on stdout, or those of a file of prompts as JSON lines.

    Returns:
        The exit code: 1 if a prompt of a file failed.

    Raises:
        UserError: a number is out of range, a text is too long, or model or tokenizer cannot be had.
    """
    _check(arguments)
    given = None if arguments.prompts is None else read_prompts(arguments.prompts, _settings(arguments), arguments.n)
    tokenizer = build_tokenizer(config)
    num_positions = max_positions(model_config(config))
    if given is None:
        prompt = _one_prompt(arguments, tokenizer, num_positions)
        generator, _, outlook = open_generator(config, tokenizer=tokenizer)
        logger.info("%s", outlook.text)
        _continue(generator, prompt, tokenizer)
        failed = False
    else:
        with open_output(arguments.out) as output:
            generator, _, outlook = open_generator(config, tokenizer=tokenizer)
            logger.info("%s", outlook.text)
            failed = run_prompts(generator, given, output) > 0
    generator.engine.close(keep_values=False)
    return EXIT_FAILED if failed else 0


def _continue(generator: Generator, prompt: Prompt, tokenizer: Any) -> None:
    """One prompt: its text comes as it is made, where there is one answer."""

    def show(piece: Piece) -> None:
        write_out(sys.stdout, piece.text)

    start = tokenizer.decode(prompt.tokens, skip_special_tokens=True)
    job = generator.submit(prompt.tokens, prompt.sampling, prompt.n, show if prompt.n == 1 else None)
    if prompt.n == 1:
        write_out(sys.stdout, start)
    generator.run()
    for choice in job.result():
        write_out(sys.stdout, "\n" if prompt.n == 1 else f"[{choice.index + 1}] {start}{choice.text}\n")
        for said in choice.logprobs:
            others = "".join(f"  {text!r} {value:.4f}" for _, text, value in said.top)
            write_out(sys.stdout, f"{said.logprob:10.4f} {said.text!r}{'  of' if others else ''}{others}\n")


def _one_prompt(arguments: argparse.Namespace, tokenizer: Any, num_positions: int | None) -> Prompt:
    text = "The" if arguments.prompt is None else arguments.prompt
    tokens = list(tokenizer(text, return_token_type_ids=False)["input_ids"])
    num_new = _num_new_tokens(arguments.max_new_tokens, len(tokens), num_positions)
    return Prompt(text, Sampling(max_new_tokens=num_new, **_settings(arguments)), arguments.n, tokens)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of all prompts, as :class:`Sampling` names them."""
    given: dict[str, Any] = {
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "repetition_penalty": arguments.repetition_penalty,
        "stop": tuple(arguments.stop),
        "seed": arguments.seed,
        "logprobs": arguments.logprobs,
    }
    if arguments.prompts is not None and arguments.max_new_tokens is not None:
        given["max_new_tokens"] = arguments.max_new_tokens
    return given


def _check(arguments: argparse.Namespace) -> None:
    """Refuses numbers and texts that cannot be used, before anything is loaded."""
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens}: must be at least 1")
    temperature = arguments.temperature
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature <= MOST_TEMPERATURE:  # nan is in no range
        raise UserError(
            f"--temperature {temperature}: must be 0 (the likeliest token), or from {LEAST_TEMPERATURE} to "
            f"{MOST_TEMPERATURE:g}"
        )
    if not 0 < arguments.top_p <= 1 or arguments.top_k < 0:
        raise UserError("--top-p must be above 0 and at most 1, --top-k 0 or more")
    if not 0 <= arguments.seed <= MOST_SEED:
        raise UserError(f"--seed {arguments.seed}: must be from 0 to {MOST_SEED}")
    if temperature == 0 and (arguments.top_k or not math.isclose(arguments.top_p, 1.0)):
        raise UserError("--top-k and --top-p choose among drawn tokens; give a --temperature above 0 with them")
    if arguments.n < 1:
        raise UserError(f"-n {arguments.n}: must be at least 1")
    if arguments.prompts is not None and arguments.prompt is not None:
        raise UserError("--prompt and --prompts: give one of them")
    if arguments.prompts is None and arguments.out is not None:
        raise UserError("--out is for the answers to --prompts FILE; the answer to one --prompt goes to stdout")
    Sampling(**_settings(arguments))
    for text in (arguments.prompt or "", *arguments.stop):
        require_utf8("--prompt" if text == arguments.prompt else "--stop", text)


def _num_new_tokens(wanted: int | None, num_given: int, num_positions: int | None) -> int:
    """How many tokens to add to a prompt of so many.

    Raises:
        UserError: the model has no room for so many, or the prompt is empty.
    """
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
