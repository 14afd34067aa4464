"""Bytes of data files: opened, unpacked and decoded, with messages that say what to do where that fails."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from zero.data.records import BadRecord
from zero.errors import DataError

UTF8_BOM = b"\xef\xbb\xbf"
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)
# What the first bytes of a file that is no UTF-8 text say about it.
_SIGNATURES = (
    (b"\x1f\x8b", "It is gzip-compressed: add .gz to its name."),
    (b"PK\x03\x04", "It is a zip archive: unpack it first."),
    (b"\xff\xfe", "It is UTF-16: convert it, for example with iconv -f UTF-16 -t UTF-8."),
    (b"\xfe\xff", "It is UTF-16: convert it, for example with iconv -f UTF-16 -t UTF-8."),
    (b"PAR1", "It is a Parquet file: name it .parquet."),
    (b"(\xb5/\xfd", "It is zstd-compressed: unpack it first."),
)


class BadFile(BadRecord):
    """A file's bytes are damaged; what could be read before is lost with it."""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file open for reading its bytes, unpacked where its name ends in .gz.

    Raises:
        DataError: It cannot be opened or read.
        BadFile: Its compressed data are damaged or end early.
    """
    opener: Callable[..., Any] = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rb") as handle:
            yield handle
    except _DAMAGED as error:
        raise BadFile(f"damaged or incomplete gzip data ({error}); copy or download the file again") from error
    except PermissionError as error:
        raise DataError(
            f"{path}: cannot be read: permission denied. Make it readable (chmod u+r), or name another file"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_all(path: Path) -> bytes:
    """All bytes of a file, unpacked, without a UTF-8 byte order mark. Raises as ``opened`` does."""
    with opened(path) as handle:
        return handle.read().removeprefix(UTF8_BOM)


def decode(data: bytes, first_byte: int = 0) -> str:
    """UTF-8 bytes as text.

    Args:
        data: The bytes.
        first_byte: Where in the file they begin, for the message.

    Raises:
        BadRecord: They are not UTF-8 (says byte and offset), or hold NUL bytes as only binary files do.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = first_byte + error.start
        hint = next((hint for mark, hint in _SIGNATURES if first_byte == 0 and data.startswith(mark)), None)
        hint = hint or "Save it as UTF-8, for example with iconv -f LATIN1 -t UTF-8."
        raise BadRecord(f"not UTF-8: byte 0x{data[error.start]:02x} at offset {at} of the file. {hint}") from error
    nul = data.find(b"\0")
    if nul >= 0:
        raise BadRecord(f"NUL byte at offset {first_byte + nul} of the file: it looks binary, not text")
    return text


def line_of_bad_byte(data: bytes) -> int:
    """Number of the line, from 1, with the first byte that ``decode`` refuses; 1 where there is none."""
    try:
        data.decode("utf-8")
        return data.count(b"\n", 0, max(data.find(b"\0"), 0)) + 1
    except UnicodeDecodeError as error:
        return data.count(b"\n", 0, error.start) + 1
