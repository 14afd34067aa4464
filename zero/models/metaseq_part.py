"""One tensor-parallel part of a metaseq checkpoint: parameters found inside of the flat ones of its shards.

FSDP of fairscale joins the parameters of a module into one flat vector, cuts it into as many pieces as there are
ranks, all of one length, and writes down (``shard_metadata``) what lies in it. The published ``reshard`` files have no
such list where they were made by ``reshard_mp``; there the order of metaseq's modules takes its place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zero.errors import UserError

FLAT = re.compile(r"(?:.*\.)?flat_param(?:_\d+)?")
"""Names of flat parameters."""
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"})

Layout = Mapping[str, Sequence[tuple[str, tuple[int, ...]]]]
"""What lies in each flat parameter, in order: names and shapes."""


@dataclass(frozen=True)
class Shard:
    """What one file holds of a model.

    Attributes:
        path: of the file.
        tensors: by name, mapped from the file.
        metadata: fairscale's list of what lies in flat parameters; None where the file has none.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any] | None


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies: in these 1-D pieces one after the other, from an element on."""

    pieces: list[torch.Tensor]
    start: int
    shape: torch.Size


def shard_of(path: Path, checkpoint: Mapping[str, Any]) -> Shard:
    """The model in a loaded file.

    Raises:
        UserError: there is none.
    """
    model = checkpoint.get("model")
    if not isinstance(model, dict) or not model:
        raise UserError(f'{path} holds no model (a dictionary "model"); only {", ".join(map(str, checkpoint))}')
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {name!r} in the model is a {type(value).__name__}, not a tensor")
        tensors[_clean(name)] = value
    metadata = checkpoint.get("shard_metadata")
    return Shard(path, tensors, metadata if isinstance(metadata, dict) and metadata else None)


class Part:
    """The parameters of one tensor-parallel part, read from its shards on demand.

    Args:
        shards: in the order of their ranks.
        layout: called where flat parameters come without a list of what lies in them; given their names, returns it.

    Raises:
        UserError: the shards do not fit together.
    """

    def __init__(self, shards: Sequence[Shard], layout: Callable[[Sequence[str]], Layout]) -> None:
        self._path = shards[0].path
        self._places: dict[str, _Place] = {}
        self._shared: dict[str, str] = {}
        names = sorted(shards[0].tensors)
        for shard in shards[1:]:
            if sorted(shard.tensors) != names:
                raise UserError(f"{shard.path} holds other tensors than {self._path}: they are not of one checkpoint")
        flat = [name for name in names if FLAT.fullmatch(name)]
        metadata = [shard.metadata for shard in shards if shard.metadata is not None]
        if metadata and len(metadata) == len(shards):
            self._read_metadata(shards, metadata)
        elif flat:
            self._read_layout(shards, layout(flat))
        self._read_whole(shards, [name for name in names if name not in flat])

    def names(self) -> list[str]:
        """Names of all parameters and buffers, in metaseq's words."""
        return [*self._places, *self._shared]

    def shape(self, name: str) -> torch.Size:
        """Shape of one of them in this part."""
        return self._place(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """dtype of one of them."""
        return self._place(name).pieces[0].dtype

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A new tensor with the values of one of them.

        Args:
            name: of the parameter.
            rows: only these of its first dimension.
        """
        place = self._place(name)
        shape, start = place.shape, place.start
        if rows is not None:
            first, stop, _ = rows.indices(shape[0])
            start += first * shape[1:].numel()
            shape = torch.Size((stop - first, *shape[1:]))
        values = torch.empty(shape, dtype=self.dtype(name))
        flat, at = values.view(-1), 0
        for piece in _overlaps(place.pieces, start, shape.numel()):
            flat[at : at + piece.numel()] = piece
            at += piece.numel()
        return values

    def _place(self, name: str) -> _Place:
        return self._places[self._shared.get(name, name)]

    # -- what lies where -----------------------------------------------------------------------------------------------

    def _read_metadata(self, shards: Sequence[Shard], metadata: Sequence[dict[str, Any]]) -> None:
        try:
            for index, instance in enumerate(metadata[0]["param_metadata"]):
                if instance.get("no_broadcast_optim_state"):
                    raise UserError(
                        f"{self._path}: {instance['fsdp_path']} is an expert of a mixture, which OPT is not"
                    )
                base = _clean(instance["fsdp_path"])
                for flat, info in instance["params"].items():
                    paddings = [each["param_metadata"][index]["params"][flat]["padding"] for each in metadata]
                    contents = list(zip(info["names"], info["shapes"], info["numels"], strict=True))
                    pieces = self._pieces(shards, _join(base, _clean(flat)), paddings)
                    self._put(pieces, [(_join(base, _clean(name)), tuple(shape)) for name, shape, _ in contents])
                for source, alias in instance.get("shared_param_info") or ():
                    self._shared[_join(base, _clean(alias))] = _join(base, _clean(source))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self._path}: its shard_metadata is not what fairscale writes ({error!r})") from error
        lost = sorted(source for source in self._shared.values() if source not in self._places)
        if lost:
            raise UserError(f"{self._path}: {lost[0]} is shared by other parameters, but is not there")

    def _read_layout(self, shards: Sequence[Shard], layout: Layout) -> None:
        for flat, contents in layout.items():
            wanted = sum(math.prod(shape) for _, shape in contents)
            whole = self._pieces(shards, flat, [0] * len(shards))
            padding = sum(piece.numel() for piece in whole) - wanted
            # Ranks have pieces of one length, so the last one may end in fewer zeros than there are ranks.
            if not 0 <= padding < len(shards) or (padding and whole[-1][-padding:].any()):
                raise UserError(
                    f"{self._path}: {flat} has {wanted + padding} elements, this model's would have {wanted}. Is the size "
                    "right, and is this a checkpoint of OPT?"
                )
            self._put(self._pieces(shards, flat, [0] * (len(shards) - 1) + [padding]), contents)

    def _read_whole(self, shards: Sequence[Shard], names: Sequence[str]) -> None:
        """Parameters that are not flat, and buffers: alike on all ranks, or else there is only one rank."""
        for name in names:
            value = shards[0].tensors[name]
            known = name in self._places or FLAT.fullmatch(name)
            if known or not value.is_contiguous():
                raise UserError(f"{self._path}: {name} is there twice, or not as metaseq writes it")
            if any(shard.tensors[name].shape != value.shape for shard in shards[1:]):
                raise UserError(f"{self._path}: {name} is cut among shards, but no shard_metadata says how")
            if len(shards) > 1 and name.endswith((".weight", ".bias")):
                raise UserError(
                    f"{self._path}: {name} is not flat, though there are {len(shards)} shards, and no shard_metadata "
                    "says how they fit together"
                )
            self._places[name] = _Place([value.reshape(-1)], 0, value.shape)

    def _pieces(self, shards: Sequence[Shard], flat: str, paddings: Sequence[int]) -> list[torch.Tensor]:
        """The vector's pieces on all ranks, without padding."""
        pieces = []
        for shard, padding in zip(shards, paddings, strict=True):
            piece = shard.tensors.get(flat)
            if piece is None:
                raise UserError(f"{shard.path}: {flat} is not there, though its shard_metadata has it")
            if piece.dim() != 1 or not 0 <= padding <= piece.numel():
                raise UserError(f"{shard.path}: {flat} has shape {tuple(piece.shape)} with a padding of {padding}")
            pieces.append(piece[: piece.numel() - padding])
        if len({piece.dtype for piece in pieces}) > 1:
            raise UserError(f"{self._path}: {flat} is not of one dtype in all shards")
        return pieces

    def _put(self, pieces: list[torch.Tensor], contents: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        start = 0
        for name, shape in contents:
            if any(type(length) is not int or length < 0 for length in shape) or name in self._places:
                raise UserError(f"{self._path}: {name} with shape {shape} is there twice, or has no such shape")
            self._places[name] = _Place(pieces, start, torch.Size(shape))
            start += math.prod(shape)
        num_there = sum(piece.numel() for piece in pieces)
        if start != num_there:
            raise UserError(
                f"{self._path}: the shards hold {num_there} elements from {contents[0][0] if contents else 'nothing'} on, "
                f"the list of them says {start}: are shards missing?"
            )


def _overlaps(pieces: Sequence[torch.Tensor], start: int, numel: int) -> Iterator[torch.Tensor]:
    """Views of what a range of a vector covers of its pieces."""
    at = 0
    for piece in pieces:
        first, stop = max(start - at, 0), min(start + numel - at, piece.numel())
        if first < stop:
            yield piece[first:stop]
        at += piece.numel()


def _clean(path: str) -> str:
    """A module's path without the wrappers that FSDP puts in."""
    return ".".join(word for word in path.split(".") if word not in _WRAPPERS)


def _join(base: str, name: str) -> str:
    return f"{base}.{name}" if base else name
