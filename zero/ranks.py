"""From the config to the ranks of a run, and to what they share."""

from __future__ import annotations

from typing import Any

import torch

from gemini.exchange import ALONE, Exchange
from zero import world
from zero.config.schema import Config
from zero.division import Division
from zero.errors import UserError
from zero.sharding import RankExchange
from zero.world import World


def join_ranks(config: Config) -> World | None:
    """The ranks that run, if there are several; the first call meets the others.

    Raises:
        UserError: ``[parallel]`` asks for another number of ranks, or for what this version does not do.
    """
    if config.parallel.model_ranks > 1:
        raise UserError("parallel: this version splits no layers over ranks; set pipeline and tensor.size to 1")
    joined = world.join(config.parallel.timeout, config.device.type)
    try:
        config.parallel.data_ranks(1 if joined is None else joined.size)
    except ValueError as error:
        raise UserError(str(error)) from error
    return joined


def make_exchange(config: Config, joined: World | None) -> Exchange:
    """How chunks are divided over these ranks."""
    if joined is None:
        return ALONE
    division = Division(joined.rank, joined.size, config.parallel.replicate)
    return RankExchange(joined, division, torch.bfloat16 if config.precision.reduce == "bf16" else None)


class Ranks:
    """The ranks as those see them who only send small messages: one or many.

    Args:
        joined: the others; None in a process by itself.

    Attributes:
        rank: of this process.
        size: number of all processes.
        num_local: number of those on this machine.
    """

    def __init__(self, joined: World | None) -> None:
        self._world = joined
        self.rank = 0 if joined is None else joined.rank
        self.size = 1 if joined is None else joined.size
        self.num_local = 1 if joined is None else joined.place.local_size

    @property
    def is_first(self) -> bool:
        """Whether this one speaks, and writes what is written once."""
        return self.rank == 0

    def gather(self, value: Any, what: str) -> list[Any]:
        """What every rank gives, in the order of ranks.

        Args:
            value: of numbers, texts, lists and dictionaries.
            what: is done, for messages.

        Raises:
            zero.world.PeerLostError: a rank does not take part.
        """
        if self._world is None:
            return [value]
        with self._world.operation(what):
            return self._world.all_gather_object(value)
