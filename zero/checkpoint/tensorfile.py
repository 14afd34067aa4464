"""safetensors files, written and read in blocks, so that neither side ever holds a file in memory.

The layout is that of the safetensors format: eight bytes with the header's length, a JSON header, the tensors' bytes
without gaps. Reading trusts nothing in the header: lengths, offsets, overlaps and gaps are checked against the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from zero.checkpoint.files import Written, length_bytes, read_exactly, write_file
from zero.checkpoint.problems import DamagedError

BLOCK_BYTES = 16 << 20
"""Most bytes of one block: what writing and reading take of host memory."""

_MOST_HEADER_BYTES = 100_000_000
_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_TAGS = {dtype: tag for tag, dtype in _DTYPES.items()}

Blocks = Callable[[], Iterator[torch.Tensor]]
"""Makes 1-D host tensors, one after another, that together are a tensor's elements in order."""


@dataclass(frozen=True)
class Outgoing:
    """A tensor on its way into a file."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Blocks

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Incoming:
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return self.numel * self.dtype.itemsize


def storable(dtype: torch.dtype) -> bool:
    """Whether the format has this dtype."""
    return dtype in _TAGS


# -- writing ---------------------------------------------------------------------------------------------------------


def in_file_order(tensors: Sequence[Outgoing]) -> list[Outgoing]:
    """Wide dtypes first, so that every tensor starts at a multiple of its item's bytes."""
    return sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)


def header_of(tensors: Sequence[Outgoing]) -> bytes:
    """Length and header of a file that holds these tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.num_bytes]
        header[tensor.key] = {"dtype": _TAGS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_bytes(tensors: Sequence[Outgoing]) -> int:
    """Bytes of the file, before it is written."""
    return len(header_of(tensors)) + sum(tensor.num_bytes for tensor in tensors)


def write_tensor_file(path: Path, tensors: Sequence[Outgoing]) -> Written:
    """Writes and syncs a new file, block by block.

    Raises:
        OSError: the file system refused.
    """
    ordered = in_file_order(tensors)

    def parts() -> Iterator[bytes | memoryview]:
        yield header_of(ordered)
        for tensor in ordered:
            num_bytes = 0
            for block in tensor.blocks():
                view = as_bytes(block)
                num_bytes += view.nbytes
                yield view
            if num_bytes != tensor.num_bytes:
                raise RuntimeError(f"{tensor.key}: {num_bytes} bytes came, {tensor.num_bytes} were announced")

    return write_file(path, parts())


def as_bytes(block: torch.Tensor) -> memoryview:
    """The bytes of a contiguous 1-D host tensor, without a copy."""
    if block.numel() == 0:
        return memoryview(b"")
    return block.detach().view(torch.uint8).numpy().data


def in_blocks(flat: torch.Tensor) -> Iterator[torch.Tensor]:
    """A 1-D tensor on any device as host blocks; on the host they are views."""
    step = max(1, BLOCK_BYTES // flat.dtype.itemsize)
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].cpu()


# -- reading ---------------------------------------------------------------------------------------------------------


def read_header(handle: FileIO) -> dict[str, Incoming]:
    """What a file holds, by key.

    Raises:
        DamagedError: the header is not that of a safetensors file, or does not fit the file.
    """
    total_bytes = length_bytes(handle)
    prefix = bytearray(8)
    read_exactly(handle, memoryview(prefix))
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > min(_MOST_HEADER_BYTES, total_bytes - 8):
        raise DamagedError(f"not a safetensors file: it announces a header of {header_bytes} bytes")
    text = bytearray(header_bytes)
    read_exactly(handle, memoryview(text))
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        tensors = {key: _incoming(entry, 8 + header_bytes) for key, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"not a safetensors file: bad header ({error})") from error
    _check_cover(tensors, 8 + header_bytes, total_bytes)
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a key appears twice")
    return dict(pairs)


def _incoming(entry: dict[str, Any], data_start: int) -> Incoming:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise ValueError("shapes and offsets must be whole numbers")
    tensor = Incoming(_DTYPES[entry["dtype"]], shape, data_start + start)
    if tensor.num_bytes != stop - start:
        raise ValueError(f"a tensor of {tensor.num_bytes} bytes is given {stop - start}")
    return tensor


def _check_cover(tensors: dict[str, Incoming], start: int, total_bytes: int) -> None:
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != start:
            raise DamagedError("bad safetensors header: tensors overlap or leave gaps")
        start += tensor.num_bytes
    if start != total_bytes:
        raise DamagedError(f"bad safetensors header: tensors end at byte {start}, the file at {total_bytes}")


def read_blocks(
    handle: FileIO, tensor: Incoming, first: int = 0, stop: int | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """A tensor's elements in order: ``(first element, 1-D host tensor)``. The tensor is used again for the next block.

    Args:
        handle: the file.
        tensor: where in it.
        first: first element that is wanted.
        stop: first element after; None for all.

    Raises:
        DamagedError: the file is shorter than its header says.
    """
    stop = tensor.numel if stop is None else stop
    step = max(1, BLOCK_BYTES // tensor.dtype.itemsize)
    buffer = torch.empty(min(step, stop - first), dtype=tensor.dtype)
    handle.seek(tensor.offset + first * tensor.dtype.itemsize)
    for start in range(first, stop, step):
        block = buffer[: min(step, stop - start)]
        read_exactly(handle, as_bytes(block))
        yield start, block
