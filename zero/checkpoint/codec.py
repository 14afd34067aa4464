"""Python values as JSON and back, exactly: what is not JSON is tagged, what cannot be tagged is refused.

=============== =================================================
value           JSON
=============== =================================================
tuple           ``{"$tuple": [...]}``
inf, nan        ``{"$float": "inf"}``
dict, any key   ``{"$dict": [[key, value], ...]}``
Counter         ``{"$counter": [[key, count], ...]}``
small tensor    ``{"$tensor": [dtype, shape, base64 of its bytes]}``
=============== =================================================

No pickle: reading makes nothing but these.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from zero.checkpoint.problems import CheckpointError, DamagedError

JSON = Any
"""None, bool, int, float, str, list and dict of the like. Tuples, infinities and small tensors are carried too."""

_MOST_TENSOR_BYTES = 1 << 20
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def encode(value: Any, where: str) -> JSON:
    """A value as JSON.

    Args:
        value: made of None, bool, int, float, str, list, tuple, dict and small tensors.
        where: what it belongs to, for the message.

    Raises:
        CheckpointError: something in it is none of these.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):  # numpy's float64 too
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if type(value) is list:
        return [encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if type(value) in (tuple, torch.Size):
        return {"$tuple": [encode(item, f"{where}[{index}]") for index, item in enumerate(value)]}
    if type(value) is Counter:
        return {"$counter": _pairs(value, where)}
    if type(value) is dict:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: encode(item, f"{where}.{key}") for key, item in value.items()}
        return {"$dict": _pairs(value, where)}
    if isinstance(value, torch.Tensor) and value.nbytes <= _MOST_TENSOR_BYTES:
        return {"$tensor": _encode_tensor(value)}
    raise CheckpointError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold: allowed "
        "are None, numbers, texts, lists, tuples, dictionaries and small tensors (nothing is pickled). Store it "
        "yourself, or turn it into these"
    )


def _pairs(value: dict[Any, Any], where: str) -> JSON:
    return [[encode(key, f"{where} key"), encode(item, f"{where}[{key!r}]")] for key, item in value.items()]


def _encode_tensor(value: torch.Tensor) -> JSON:
    flat = value.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return [dtype_name(value.dtype), list(value.shape), base64.b64encode(data).decode("ascii")]


def decode(value: JSON) -> Any:
    """The value that :func:`encode` was given.

    Raises:
        DamagedError: it is not what ``encode`` writes.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (tag, content), *_ = value.items()
        if tag.startswith("$"):
            return _untag(tag, content)
    return {key: decode(item) for key, item in value.items()}


def _untag(tag: str, content: JSON) -> Any:
    reader = _READERS.get(tag)
    if reader is None:
        raise DamagedError(f"unknown tag {tag!r}")
    try:
        return reader(content)
    except (TypeError, ValueError, KeyError, RuntimeError, binascii.Error) as error:
        raise DamagedError(f"broken {tag} value: {error}") from error


def _decode_tensor(content: JSON) -> torch.Tensor:
    name, shape, text = content
    data = bytearray(base64.b64decode(text, validate=True))
    dtype = dtype_of(name)
    flat = torch.frombuffer(data, dtype=dtype).clone() if data else torch.empty(0, dtype=dtype)
    return flat.reshape([int(length) for length in shape])


_READERS: dict[str, Callable[[JSON], Any]] = {
    "$tuple": lambda content: tuple(decode(item) for item in content),
    "$float": lambda content: _FLOATS[content],
    "$dict": lambda content: {decode(key): decode(item) for key, item in content},
    "$counter": lambda content: Counter({decode(key): decode(item) for key, item in content}),
    "$tensor": _decode_tensor,
}


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` and so on."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        DamagedError: there is none.
    """
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise DamagedError(f"unknown dtype {name!r}")
    return dtype


_compact = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(", ", ": ")).encode


def dump(value: JSON) -> bytes:
    """JSON text that the same value always gives, byte for byte.

    For people: a line for each key of a dictionary, and for each item of a list in it.
    """
    if not isinstance(value, dict):
        return (_compact(value) + "\n").encode("ascii")
    lines = [f"{_compact(key)}: {_lines(item)}" for key, item in value.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("ascii")


def _lines(value: JSON) -> str:
    if not isinstance(value, list | tuple) or not value:
        return _compact(value)
    return "[\n " + ",\n ".join(map(_compact, value)) + "\n]"


def parse(data: bytes) -> JSON:
    """Reads JSON.

    Raises:
        DamagedError: it is not JSON.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"not JSON: {error}") from error
