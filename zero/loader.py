"""The user's data loaders: divided among the ranks, and seen so that the last batch is known as such."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from zero.errors import UserError
from zero.world import World

logger = logging.getLogger("zero")

# What a loader does beside choosing samples, as its constructor calls it.
_KEPT = (
    *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator"),
    *("prefetch_factor", "persistent_workers", "in_order"),
)


def shard_loader(loader: Any, world: World | None) -> Any:
    """This rank's part of a loader that every rank has built in the same way.

    Of each ``world.size`` batches that follow each other, a rank gets the one of its number, so all ranks have the same
    number of batches. Where the last ones are too few, or the last is too short, they are made up with the first
    samples of the epoch: so many samples come twice. With ``drop_last`` they are left out instead. Samplers with a
    ``generator`` (those of ``shuffle=True`` among them) draw the same order on all ranks, that of rank 0.

    Used as it is: a loader that is divided already (by a ``DistributedSampler``, by accelerate or by
    ``split_dataset_by_node``), a ``DataLoader`` of a class that iterates in its own way (those of ``zero.data`` do),
    and an iterable that is no ``DataLoader``.

    Args:
        loader: What the user gave; None for none.
        world: The ranks, all of which must call this; None for one process.

    Returns:
        A new loader, or the same one.

    Raises:
        UserError: The loaders of two ranks have different lengths.
    """
    if world is None or world.size == 1 or not isinstance(loader, DataLoader) or _is_divided(loader):
        return loader
    if type(loader).__iter__ is not DataLoader.__iter__:
        logger.info("%s iterates in its own way and is not divided among the ranks", type(loader).__name__)
        return loader
    _agree(loader, world)
    kept = {name: getattr(loader, name) for name in _KEPT if hasattr(loader, name)}
    return DataLoader(**_divided(loader, world), **kept)


def _samplers(loader: DataLoader[Any]) -> list[Any]:
    """Whatever takes part in choosing a loader's samples."""
    if isinstance(loader.dataset, IterableDataset):
        return []
    batches = loader.batch_sampler
    found = [loader.sampler, batches, getattr(batches, "sampler", None)]
    return [sampler for sampler in found if sampler is not None]


def _is_divided(loader: DataLoader[Any]) -> bool:
    from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard

    if isinstance(loader.dataset, IterableDatasetShard) or getattr(loader.dataset, "_distributed", None) is not None:
        return True
    return any(hasattr(one, "num_replicas") or isinstance(one, BatchSamplerShard) for one in _samplers(loader))


def _agree(loader: DataLoader[Any], world: World) -> None:
    """All ranks draw rank 0's random orders, over as many samples."""
    drawing: list[Any] = []
    for sampler in _samplers(loader):
        if hasattr(sampler, "generator") and not any(sampler is other for other in drawing):
            drawing.append(sampler)
            if sampler.generator is None:
                seed = int(torch.empty((), dtype=torch.int64).random_())
                sampler.generator = torch.Generator().manual_seed(seed)
    states = [sampler.generator.get_state().tolist() for sampler in drawing] if world.rank == 0 else []
    with world.operation("dividing a data loader"):
        said = world.all_gather_object({"length": _length(loader), "states": states})
    odd = [rank for rank, word in enumerate(said) if word["length"] != said[0]["length"]]
    if odd:
        raise UserError(
            f"the data loaders of the ranks differ: rank 0 has {said[0]['length']} batches, rank {odd[0]} has "
            f"{said[odd[0]]['length']}; build the same loader on every rank, or divide the data with a "
            "DistributedSampler"
        )
    for sampler, state in zip(drawing, said[0]["states"], strict=True):
        sampler.generator.set_state(torch.tensor(state, dtype=torch.uint8))


def _length(loader: DataLoader[Any]) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _divided(loader: DataLoader[Any], world: World) -> dict[str, Any]:
    """The arguments of a loader that say which samples it reads."""
    from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard

    ranks = {"num_processes": world.size, "process_index": world.rank}
    if isinstance(loader.dataset, IterableDataset):
        batch_size, drop_last = loader.batch_size, loader.drop_last
        shard = IterableDatasetShard(loader.dataset, batch_size=batch_size or 1, drop_last=drop_last, **ranks)
        return {"dataset": shard, "batch_size": batch_size, "drop_last": drop_last}
    if loader.batch_sampler is None:  # batch_size=None: an item of the dataset is a batch
        single = BatchSampler(loader.sampler, batch_size=1, drop_last=False)
        sampler = _Singles(BatchSamplerShard(single, **ranks))
        return {"dataset": loader.dataset, "sampler": sampler, "batch_size": None}
    batches: Any = loader.batch_sampler
    if type(batches) is not BatchSampler:
        batches = _AnyBatches(batches)
    return {"dataset": loader.dataset, "batch_sampler": BatchSamplerShard(batches, **ranks)}


class _Singles(Sampler[Any]):
    """The indices of batches of one."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return (index for (index,) in self._batches)

    def __len__(self) -> int:
        return len(self._batches)


class _AnyBatches:
    """Batches of a sampler of the user's own, of which nothing is known: they may be of any length."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


class LoaderView:
    """Iterates as the loader does, and knows the last batch of an epoch as such.

    An accumulation window that the epoch's end cuts short is then stepped, not dropped.

    Args:
        loader: any iterable of batches.
        on_batch: called before each batch is handed out, with whether it is the last; and with False after the end.
        look_ahead: read one batch ahead to know. Without it batches are read when asked for, as by a plain loop, and
            none is called the last.
    """

    def __init__(self, loader: Any, on_batch: Callable[[bool], None], look_ahead: bool) -> None:
        self._loader = loader
        self._on_batch = on_batch
        self._look_ahead = look_ahead

    def __iter__(self) -> Iterator[Any]:
        """Batches in the loader's order."""
        if not self._look_ahead:
            yield from self._loader
            return
        iterator = iter(self._loader)
        missing = object()
        batch = next(iterator, missing)
        while batch is not missing:
            following = next(iterator, missing)
            self._on_batch(following is missing)
            yield batch
            batch = following
        # A loop that read the data without training must not leave the mark behind.
        self._on_batch(False)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
