"""The manifest: what a checkpoint holds, written last, sealed with its own hash.

A tensor of the training state may be cut into slices, over files and ranks. A slice counts elements of the flattened
tensor, in C order unless the tensor says otherwise (``order``, for parameters whose memory runs over the dimensions in
another order). So any number of ranks can read what any other number wrote: by intersecting slices.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zero.checkpoint.codec import JSON, dtype_name, dtype_of, dump, parse
from zero.checkpoint.files import is_plain_name, length_bytes, open_plain, read_exactly
from zero.checkpoint.problems import DamagedError

MANIFEST = "manifest.json"
FORMAT = "gemini-zero checkpoint"
VERSION = 1

_MOST_MANIFEST_BYTES = 1 << 30
_HASH = re.compile(r"[0-9a-f]{64}")
_SEAL = "manifest_sha256"

PARAMETER = "parameter"
"""Role of a parameter's values: the fp32 master where it is trained, the values themselves where it is frozen."""
GRADIENT = "gradient"
"""Role of gradients summed so far in an open accumulation window, over all ranks."""
BUFFER = "buffer"
"""Role of a module's buffer."""
OPTIMIZER = "optimizer/"
"""Prefix of the roles of an optimizer's elementwise states, such as ``optimizer/exp_avg``."""


def rank_gradient(rank: int) -> str:
    """Role of the gradients that one rank of several has summed by itself."""
    return f"{GRADIENT}/{rank:05d}"


@dataclass(frozen=True)
class FileRecord:
    """A file of the checkpoint: its path inside the folder, its length and hash, and the rank that wrote it."""

    path: str
    num_bytes: int
    sha256: str
    rank: int


@dataclass(frozen=True)
class Slice:
    """Elements ``[start, stop)`` of one flattened tensor, and where they are stored.

    Attributes:
        name: parameter or buffer.
        role: which tensor of it: see the constants above.
        dtype: of the elements.
        shape: of the whole tensor.
        order: dimensions from slowest to fastest in the flattened order; None is C order.
        start: first element.
        stop: first element after.
        file: path inside the folder.
        key: in that safetensors file.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...] | None
    start: int
    stop: int
    file: str
    key: str

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        run_id: the run that wrote it; a resumed run keeps it.
        sequence: higher than that of every checkpoint that lay in the folder when this one was written.
        step: optimizer steps taken.
        world: ranks in total and along each direction.
        config_sha256: of the resolved config.
        software: versions that wrote it.
        files: all files but the manifest.
        tensors: all slices.
    """

    run_id: str
    sequence: int
    step: int
    world: dict[str, int]
    config_sha256: str
    software: dict[str, str]
    files: tuple[FileRecord, ...]
    tensors: tuple[Slice, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(record.num_bytes for record in self.files)

    def by_tensor(self) -> dict[tuple[str, str], list[Slice]]:
        """Slices of each tensor in order of elements, by ``(role, name)``."""
        groups: dict[tuple[str, str], list[Slice]] = {}
        for part in self.tensors:
            groups.setdefault((part.role, part.name), []).append(part)
        return {key: sorted(parts, key=lambda part: part.start) for key, parts in groups.items()}


def config_sha256(config: JSON) -> str:
    """Hash of a resolved config given as JSON."""
    return hashlib.sha256(dump(config)).hexdigest()


# -- writing ---------------------------------------------------------------------------------------------------------


def to_bytes(manifest: Manifest) -> bytes:
    """The file's contents."""
    return dump({**_body(manifest), _SEAL: seal_of(manifest)})


def seal_of(manifest: Manifest) -> str:
    """The hash that the file carries: two manifests with the same one say the same."""
    return hashlib.sha256(dump(_body(manifest))).hexdigest()


def _body(manifest: Manifest) -> dict[str, JSON]:
    return {"format": FORMAT, "version": VERSION, **asdict(manifest)}


# -- reading ---------------------------------------------------------------------------------------------------------


def read_manifest(checkpoint: Path) -> Manifest:
    """Reads and checks the manifest itself; the files it names are not opened.

    Raises:
        DamagedError: it is missing, changed in any byte, of another version, or contradicts itself.
    """
    try:
        with open_plain(checkpoint, MANIFEST) as handle:
            num_bytes = length_bytes(handle)
            if num_bytes > _MOST_MANIFEST_BYTES:
                raise DamagedError(f"{num_bytes} bytes are too many")
            data = bytearray(num_bytes)
            read_exactly(handle, memoryview(data))
        return _from_body(_unsealed(bytes(data)))
    except DamagedError as error:
        text = str(error)
        raise DamagedError(text if text.startswith(MANIFEST) else f"{MANIFEST}: {text}") from error


def _unsealed(data: bytes) -> dict[str, JSON]:
    """The body, if every byte of the file is what was written."""
    body = parse(data)
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise DamagedError(f"not a {FORMAT}")
    if body.get("version") != VERSION:
        raise DamagedError(f"format version {body.get('version')}; this program reads {VERSION}")
    seal = body.pop(_SEAL, None)
    try:
        intact = seal == hashlib.sha256(dump(body)).hexdigest() and dump({**body, _SEAL: seal}) == data
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise DamagedError("its contents have changed since it was written")
    return body


def _from_body(body: dict[str, Any]) -> Manifest:
    try:
        manifest = Manifest(
            run_id=_text(body["run_id"]),
            sequence=_count(body["sequence"]),
            step=_count(body["step"]),
            world={_text(key): _count(value) for key, value in body["world"].items()},
            config_sha256=_hash(body["config_sha256"]),
            software={_text(key): _text(value) for key, value in body["software"].items()},
            files=tuple(file_from(entry) for entry in body["files"]),
            tensors=tuple(slice_from(entry) for entry in body["tensors"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"not what format version {VERSION} holds ({error!r})") from error
    _check_paths(manifest)
    for (role, name), parts in manifest.by_tensor().items():
        _check_slices(f"{role} of {name}", parts)
    return manifest


def _check_paths(manifest: Manifest) -> None:
    paths = [record.path for record in manifest.files]
    for path in paths:
        if not is_plain_name(path) or path == MANIFEST:
            raise DamagedError(f"the path {path!r} is not allowed in a checkpoint")
    if len(set(paths)) != len(paths):
        raise DamagedError("a file is listed twice")
    unknown = {part.file for part in manifest.tensors} - set(paths)
    if unknown:
        raise DamagedError(f"tensors lie in files that are not listed: {', '.join(sorted(unknown))}")


def _check_slices(what: str, parts: Sequence[Slice]) -> None:
    """Slices of a tensor must agree on it, and cover it without gap or overlap."""
    first, at = parts[0], 0
    for part in parts:
        if (part.dtype, part.shape, part.order) != (first.dtype, first.shape, first.order):
            raise DamagedError(f"slices of the {what} disagree on dtype or shape")
        if part.start != at or part.stop < part.start:
            raise DamagedError(f"slices of the {what} overlap or leave a gap at element {at}")
        at = part.stop
    if at != first.numel:
        raise DamagedError(f"slices of the {what} end at element {at} of {first.numel}")
    if first.order is not None and sorted(first.order) != list(range(len(first.shape))):
        raise DamagedError(f"the {what} has the order {first.order}, which is none of its dimensions")


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"{value!r} should be a text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} should be a whole number")
    return value


def _counts(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(_count(value) for value in values)


def _hash(value: Any) -> str:
    if not _HASH.fullmatch(_text(value)):
        raise ValueError(f"{value!r} should be a SHA-256 in hexadecimal")
    return str(value)


def file_from(entry: dict[str, Any]) -> FileRecord:
    """A file's record out of JSON.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    return FileRecord(_text(entry["path"]), _count(entry["num_bytes"]), _hash(entry["sha256"]), _count(entry["rank"]))


def slice_from(entry: dict[str, Any]) -> Slice:
    """A slice out of JSON.

    Raises:
        DamagedError, KeyError, TypeError, ValueError: it is none.
    """
    return Slice(
        name=_text(entry["name"]),
        role=_text(entry["role"]),
        dtype=dtype_name(dtype_of(entry["dtype"])),
        shape=_counts(entry["shape"]),
        order=None if entry["order"] is None else _counts(entry["order"]),
        start=_count(entry["start"]),
        stop=_count(entry["stop"]),
        file=_text(entry["file"]),
        key=_text(entry["key"]),
    )
