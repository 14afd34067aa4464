"""metaseq's files read without running what is in them.

They are pickles: instructions that can name any function and call it. torch's ``weights_only`` reader follows none but
those that rebuild tensors. What else the files name (``argparse.Namespace`` and omegaconf's classes, which hold the
training's options) is replaced here by :class:`Inert`, which keeps what it is given and does nothing. Names outside of
the list are refused before anything is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zero.errors import UserError

_DATA_PACKAGES = frozenset(
    {"argparse", "omegaconf", "metaseq", "fairseq", "fairscale", "typing", "enum", "numpy", "pathlib"}
)
"""Whose objects may stand in a file: they become :class:`Inert`, whatever they are."""
_BUILTINS = ("int", "float", "str", "bool", "bytes", "dict", "list", "tuple", "set", "frozenset", "object", "complex")
_DATA_NAMES = frozenset(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILTINS)
_MAPPINGS = frozenset({"collections.defaultdict"})


class Inert:
    """What stands where a file has an object of a class that is not loaded.

    Attributes:
        kind: full name of the class.
        arguments: what it would have been called with.
        state: what it would have been given afterwards; None if nothing.
    """

    kind = ""
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *arguments: Any) -> Inert:
        """Keeps the arguments."""
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __init__(self, *arguments: Any) -> None:
        """Nothing is left to do."""

    def __setstate__(self, state: Any) -> None:
        """Keeps the state."""
        self.state = state


def load_inert(path: Path) -> dict[str, Any]:
    """What is in a file of metaseq, its tensors mapped from the file and not read yet.

    Args:
        path: written by ``torch.save`` of torch 1.6 or later.

    Returns:
        The outermost dictionary.

    Raises:
        UserError: the file names something else than data, is damaged, or is no such file.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        refused = sorted(name for name in named if not _is_data(name))
        if refused:
            raise UserError(
                f"{path} asks for {', '.join(refused[:5])} to be called when it is loaded, which metaseq's checkpoints do "
                "not: nothing was loaded, and nothing was run. Do not open this file with other tools either"
            )
        with torch.serialization.safe_globals([(_stand_in(name), name) for name in named]):
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes the reader stumble over
        line = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} cannot be read as a torch checkpoint ({type(error).__name__}: {line}). It may be damaged: compare its "
            "checksum with the published one; files of torch before 1.6 are not read"
        ) from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}; a metaseq checkpoint is a dictionary")
    return loaded


def fields_of(value: Any) -> dict[str, Any]:
    """Names and values of a dictionary, a namespace or an omegaconf config; nothing of anything else."""
    if isinstance(value, Inert) and isinstance(value.state, dict):
        content = value.state.get("_content")
        value = content if isinstance(content, dict) else value.state
    return {name: each for name, each in value.items() if isinstance(name, str)} if isinstance(value, dict) else {}


def scalar_of(value: Any) -> Any:
    """A plain value, also of an omegaconf node or an enumeration; None for anything else, and for references."""
    if isinstance(value, Inert):
        if isinstance(value.state, dict) and "_val" in value.state:
            value = value.state["_val"]
        elif len(value.arguments) == 1:
            value = value.arguments[0]
    if isinstance(value, str) and "${" in value:
        return None
    return value if isinstance(value, bool | int | float | str) else None


def _is_data(name: str) -> bool:
    return name.partition(".")[0] in _DATA_PACKAGES or name in _DATA_NAMES or name in _MAPPINGS


def _stand_in(name: str) -> Any:
    return _dictionary if name in _MAPPINGS else type(name.rpartition(".")[2], (Inert,), {"kind": name})


def _dictionary(*_: Any) -> dict[Any, Any]:
    return {}
