"""The header of a safetensors file, read strictly: what a hostile or damaged file says is never believed.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes without gaps.
Source: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zero.errors import UserError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_LENGTH_BYTES = 8
_MAX_DIMENSIONS = 64

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}
"""The format's names of dtypes."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor's bytes lie.

    Attributes:
        dtype: as stored.
        shape: as stored; elements lie in row-major order.
        start_byte: of its first byte, counted from the start of the file.
        num_bytes: length, equal to elements times bytes of the dtype.
    """

    dtype: torch.dtype
    shape: torch.Size
    start_byte: int
    num_bytes: int


def parse_header(path: Path, descriptor: int) -> dict[str, StoredTensor]:
    """Reads and checks the header of an open file.

    Args:
        path: for messages.
        descriptor: the open file.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    file_bytes = os.fstat(descriptor).st_size
    if file_bytes < _LENGTH_BYTES:
        raise damaged(path, f"it has {file_bytes} bytes, fewer than the {_LENGTH_BYTES} of the header's length")
    header_bytes = int.from_bytes(os.pread(descriptor, _LENGTH_BYTES, 0), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise damaged(path, f"it says that its header has {header_bytes} bytes; {MAX_HEADER_BYTES} are allowed")
    start_byte = _LENGTH_BYTES + header_bytes
    if start_byte > file_bytes:
        raise damaged(path, f"it says that its header has {header_bytes} bytes, the whole file has {file_bytes}")
    entries = _read_json(path, os.pread(descriptor, header_bytes, _LENGTH_BYTES))
    _check_metadata(path, entries.pop("__metadata__", None))
    tensors = {name: _stored(path, name, entry, start_byte) for name, entry in entries.items()}
    _check_cover(path, tensors, start_byte, file_bytes)
    return tensors


def damaged(path: Path, reason: str) -> UserError:
    """The error for a file that cannot be believed."""
    return UserError(f"{path} is not a sound safetensors file: {reason}. Download or save it again")


def _read_json(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise damaged(path, f"its header is not UTF-8 ({error})") from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its header is not the JSON it should be ({error})") from error
    if not isinstance(parsed, dict):
        raise damaged(path, f"its header is a JSON {type(parsed).__name__}, not an object")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"{_short(name)} appears twice")
        members[name] = value
    return members


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check_metadata(path: Path, metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, "its __metadata__ is not an object of strings")


def _stored(path: Path, name: str, entry: Any, data_byte: int) -> StoredTensor:
    """One entry of the header, checked by itself."""
    where = f"tensor {_short(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise damaged(path, f"{where} has the unknown dtype {_short(str(dtype))}; known are {', '.join(DTYPES)}")
    if not _is_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise damaged(path, f"{where} has the shape {_short(str(shape))}")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(path, f"{where} has the data_offsets {_short(str(offsets))}")
    num_bytes = offsets[1] - offsets[0]
    wanted_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if num_bytes != wanted_bytes:
        raise damaged(path, f"{where} takes {num_bytes} bytes, its shape {shape} of {dtype} needs {wanted_bytes}")
    return StoredTensor(DTYPES[dtype], torch.Size(shape), data_byte + offsets[0], num_bytes)


def _is_counts(value: Any) -> bool:
    """Whether this is a list of integers from 0 up to what fits a file offset (JSON's true is no integer)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_cover(path: Path, tensors: dict[str, StoredTensor], start_byte: int, file_bytes: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    at, before = start_byte, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start_byte, item[1].num_bytes)):
        if tensor.start_byte < at:
            raise damaged(path, f"tensor {_short(name)} overlaps {before}")
        if tensor.start_byte > at:
            raise damaged(
                path, f"{tensor.start_byte - at} bytes between {before} and tensor {_short(name)} are no one's"
            )
        at, before = at + tensor.num_bytes, f"tensor {_short(name)}"
    if at > file_bytes:
        raise damaged(path, f"{before} ends at byte {at}, the file at {file_bytes}: it was cut off")
    if at < file_bytes:
        raise damaged(path, f"{file_bytes - at} bytes after {before} are no one's")


def _short(text: str) -> str:
    """Names come from the file: never a screenful, never control characters."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
