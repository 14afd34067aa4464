"""A file of prompts for ``zero generate``: read and checked whole, run together, answered in its order."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from zero.errors import DataError, UserError
from zero.generation import Choice, Generator, Job, Sampling

logger = logging.getLogger("zero")

_SETTINGS = tuple(entry.name for entry in dataclasses.fields(Sampling))
_AHEAD = 4
"""Times as many prompts as may run at a time are handed over before they are needed."""


class OutputError(RuntimeError):
    """Answers cannot be written where they should go: the disk is full, or whoever read has gone."""


@dataclass
class Prompt:
    """One prompt and its settings.

    Attributes:
        has_length: how many tokens to add was given; else as many as there is room for will do.
    """

    text: str
    sampling: Sampling
    n: int = 1
    tokens: list[int] = field(default_factory=list)
    has_length: bool = True


def read_prompts(path: Path, settings: dict[str, Any], n: int) -> list[Prompt]:
    """All prompts of a file: a line of text each, or of JSON if its name ends in .jsonl; empty lines are left out.

    Args:
        path: of the file.
        settings: of :class:`Sampling`, for prompts that do not give their own.
        n: likewise.

    Raises:
        DataError: the file cannot be read, or a line of it is wrong; says which.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"--prompts {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--prompts {path}: not UTF-8 at byte {error.start + 1}") from error
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if line.strip():
            try:
                given = _of_json(line) if path.suffix == ".jsonl" else {"prompt": line}
                prompts.append(_prompt(given, settings, n))
            except UserError as error:
                raise DataError(f"{path}, line {number}: {error}") from error
    if not prompts:
        raise DataError(f"--prompts {path}: no prompt is in it")
    return prompts


def _of_json(line: str) -> dict[str, Any]:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"no JSON ({error})") from error
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
        raise UserError('an object with "prompt" and a text is needed')
    allowed = ("prompt", "n", *_SETTINGS)
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise UserError(f"{unknown[0]!r} is unknown; allowed are {', '.join(allowed)}")
    return given


def _prompt(given: dict[str, Any], settings: dict[str, Any], n: int) -> Prompt:
    own = {name: value for name, value in given.items() if name in _SETTINGS}
    merged = settings | own
    num = given.get("n", n)
    if isinstance(num, bool) or not isinstance(num, int) or num < 1:
        raise UserError(f"n = {num!r}: must be a whole number, at least 1")
    require_utf8("prompt", given["prompt"])  # what JSON can say and no file can hold
    return Prompt(given["prompt"], Sampling(**merged), num, has_length="max_new_tokens" in merged)


def require_utf8(name: str, text: str) -> None:
    """Refuses a text with half of a surrogate pair.

    Raises:
        UserError: says where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: not UTF-8 at character {error.start + 1}") from error


@contextlib.contextmanager
def open_output(path: Path | None) -> Iterator[IO[str]]:
    """Where the answers go; a new file, which is gone again if nothing was written to it, or stdout.

    Raises:
        UserError: the file is there already, or cannot be made.
    """
    if path is None:
        yield sys.stdout
        return
    try:
        output = path.open("x", encoding="utf-8")
    except FileExistsError as error:
        raise UserError(f"--out {path}: is there already; name another file") from error
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror or error}") from error
    try:
        yield output
    finally:
        with contextlib.suppress(OSError):  # each line was written out; what could not be has been said
            output.close()
        with contextlib.suppress(OSError):
            if not path.stat().st_size:
                path.unlink()


def write_out(output: IO[str], text: str) -> None:
    """Writes to stdout or a file, at once.

    Raises:
        OutputError: it takes no more.
    """
    try:
        output.write(text)
        output.flush()
    except OSError as error:
        name = "stdout" if output is sys.stdout else f"--out {output.name}"
        raise OutputError(f"{name}: {error.strerror or error}") from error


def run_prompts(generator: Generator, prompts: Sequence[Prompt], output: IO[str]) -> int:
    """Answers all, as many at a time as there is room for; writes each once it and those before it are done.

    Returns:
        How many could not be answered; their lines say why.
    """
    waiting = deque(prompts)
    running: deque[tuple[Prompt, Job | UserError]] = deque()
    num_failed = 0
    with _progress() as progress:
        task = progress.add_task("prompts", total=len(prompts), speed="")
        while waiting or running:
            while waiting and len(running) < _AHEAD * generator.limits.max_rows:
                prompt = waiting.popleft()
                running.append((prompt, _submitted(generator, prompt)))
            generator.run_pass()
            while running and (isinstance(running[0][1], UserError) or running[0][1].done.is_set()):
                prompt, job = running.popleft()
                line = _line(prompt, job)
                num_failed += "error" in line
                write_out(output, json.dumps(line, ensure_ascii=False) + "\n")
                progress.advance(task)
            progress.update(task, speed=f"{generator.statistics.tokens_per_s:.1f} tokens/s")
    statistics = generator.statistics
    logger.info(
        "%d prompts, %d failed: %d new tokens in %d passes, %.1f tokens/s", len(prompts), num_failed,
        statistics.num_new_tokens, statistics.num_passes, statistics.tokens_per_s,
    )  # fmt: skip
    return num_failed


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _submitted(generator: Generator, prompt: Prompt) -> Job | UserError:
    try:
        tokens, sampling = generator.encode(prompt.text), prompt.sampling
        room = (generator.limits.max_tokens or 0) - len(tokens)
        if not prompt.has_length and room < sampling.max_new_tokens:
            sampling = dataclasses.replace(sampling, max_new_tokens=room)
        return generator.submit(tokens, sampling, prompt.n)
    except UserError as error:
        return error


def _line(prompt: Prompt, job: Job | UserError) -> dict[str, Any]:
    error = job if isinstance(job, UserError) else job.error
    if error is not None or isinstance(job, UserError):
        return {"prompt": prompt.text, "error": str(error)}
    choices = [_choice(choice, prompt.sampling.logprobs is not None) for choice in job.choices]
    return {"prompt": prompt.text, "num_prompt_tokens": job.num_prompt_tokens, "choices": choices}


def _choice(choice: Choice, with_logprobs: bool) -> dict[str, Any]:
    values: dict[str, Any] = {
        "index": choice.index, "text": choice.text, "num_tokens": len(choice.tokens),
        "finish_reason": choice.finish_reason,
    }  # fmt: skip
    if with_logprobs:
        values["logprobs"] = [dataclasses.asdict(said) for said in choice.logprobs]
    return values
