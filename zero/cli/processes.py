"""``--nprocs`` and ``--max-restarts``: whether a command starts ranks or is one."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from zero.errors import UserError
from zero.launching.place import Place, find_place, given_place, is_ours

if TYPE_CHECKING:
    from zero.config.schema import Config

_RANKED = ("train", "run", "eval")


def add_process_options(verb: argparse.ArgumentParser) -> None:
    """The options of a command that may run as several processes."""
    verb.add_argument(
        "--nprocs",
        "-nprocs",  # what the README of the system re-created here promised
        type=_whole_number(1),
        metavar="N",
        help="processes of this machine, each with its own accelerator and its share of the cores (default: 1)",
    )
    verb.add_argument(
        "--max-restarts",
        type=_whole_number(0),
        default=0,
        metavar="K",
        help="after a process has failed, start all again and resume, at most K times (default: 0)",
    )


class _whole_number:
    """argparse's type of numbers from some least one on; its name is in argparse's messages."""

    def __init__(self, least: int) -> None:
        self._least = least

    def __call__(self, text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = self._least - 1
        if number < self._least:
            raise argparse.ArgumentTypeError(f"{text}: a whole number, at least {self._least}, is needed")
        return number


def place_of_rank(words: Sequence[str]) -> Place | None:
    """The place of this process if a command is to run as a rank, be it the only one.

    Raises:
        UserError: the environment contradicts itself.
    """
    if not words or words[0] not in _RANKED:
        return None
    place = find_place(os.environ)
    return given_place(os.environ) if place is None and is_ours(os.environ) else place


def start_ranks(arguments: argparse.Namespace) -> bool:
    """Whether this process is to start ranks and wait for them.

    Raises:
        UserError: it is a rank itself, of another number.
    """
    place = given_place(os.environ) or find_place(os.environ)
    asked = arguments.nprocs
    if place is None:
        return (asked or 1) > 1 or arguments.max_restarts > 0
    if asked is not None and asked != place.local_size:
        raise UserError(
            f"--nprocs {asked}: this process is rank {place.rank} of {place.size} already, started by {_starter()} with "
            f"{place.local_size} on this machine; leave --nprocs out, or give {place.local_size}"
        )
    if arguments.max_restarts and not is_ours(os.environ):
        raise UserError(f"--max-restarts: {_starter()} has started the processes, and it alone can start them again")
    return False


def _starter() -> str:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "SLURM" if given_place(os.environ) is None else "what set RANK and WORLD_SIZE"


def launch(arguments: argparse.Namespace, config: Config | None) -> int:
    """Starts the ranks of this command and waits for them; returns the exit code.

    Args:
        arguments: of the command; ``words`` are what it was called with.
        config: of the run; None where only the script knows it.

    Raises:
        UserError: this machine cannot run so many, or ``[parallel]`` asks for another number.
    """
    from zero import binding
    from zero.launching.agent import check_num_processes, launch_ranks

    num_processes = arguments.nprocs or 1
    check_num_processes(num_processes)
    if config is not None:
        binding.check_accelerators(config.device.type, num_processes, binding.num_accelerators())
        try:
            config.parallel.data_ranks(num_processes)
        except ValueError as error:
            raise UserError(str(error)) from error
    return launch_ranks(arguments.words, num_processes, arguments.max_restarts)
