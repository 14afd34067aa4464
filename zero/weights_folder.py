"""A model folder to the safetensors files in it: one file, or shards with an index.

What an index names is opened only below the folder: ``../``, absolute paths and symbolic links that lead out are
refused. Pickles (``pytorch_model.bin`` and the like) can run code when they are loaded, so they never are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from zero.errors import UserError
from zero.safetensors_reader import SafetensorsFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FOREIGN = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
_MAX_INDEX_BYTES = 100_000_000


class ShardedWeights:
    """All tensors of a model, whichever file they lie in.

    Args:
        folder: holds ``model.safetensors``, or ``model.safetensors.index.json`` and the shards it names.
        files: take these files instead of what the folder's names say; the same rules hold for where they lie.

    Raises:
        UserError: there are no safetensors weights, or something about them is wrong.
    """

    def __init__(self, folder: str | Path, files: Sequence[str | Path] | None = None) -> None:
        self.folder = Path(folder)
        weight_map: dict[str, str] = {}
        if files is None:
            files, weight_map = _find(self.folder)
        self.files = [Path(file) for file in files]
        self._file_of: dict[str, SafetensorsFile] = {}
        root = _root(self.folder)
        for file in self.files:
            opened = SafetensorsFile(_contained(file, root, self.folder))
            # A name in two shards: the later one counts, as in transformers.
            self._file_of.update(dict.fromkeys(opened.names(), opened))
        missing = next((name for name in weight_map if name not in self._file_of), None)
        if missing is not None:
            raise UserError(
                f"{self.folder / INDEX} says that tensor {missing!r} is in {weight_map[missing]}, where it is not; "
                "download or save the weights again"
            )

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._file_of)

    def file_of(self, name: str) -> SafetensorsFile:
        """The file that holds a tensor.

        Raises:
            KeyError: there is no such tensor. So do the methods below.
        """
        return self._file_of[name]

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor."""
        return self._file_of[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """dtype of a tensor as stored."""
        return self._file_of[name].dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """A new tensor with the stored values."""
        return self._file_of[name].read(name)

    def read_into(
        self, name: str, target: torch.Tensor, *more: torch.Tensor, through: torch.dtype | None = None
    ) -> None:
        """See :meth:`zero.safetensors_reader.SafetensorsFile.read_into`."""
        self._file_of[name].read_into(name, target, *more, through=through)

    def jobs(
        self,
        name: str,
        target: torch.Tensor,
        *more: torch.Tensor,
        through: torch.dtype | None = None,
        first: int | None = None,
    ) -> list[Callable[[], None]]:
        """See :meth:`zero.safetensors_reader.SafetensorsFile.jobs`."""
        return self._file_of[name].jobs(name, target, *more, through=through, first=first)

    def blocks(self, name: str, dtype: torch.dtype | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """See :meth:`zero.safetensors_reader.SafetensorsFile.blocks`."""
        return self._file_of[name].blocks(name, dtype)


def _find(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Files by the names that ``save_pretrained`` gives them, and what an index says of them."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that holds {SINGLE}")
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        return [folder / SINGLE], {}
    if (folder / INDEX).exists():
        weight_map = _read_index(folder / INDEX)
        return [folder / name for name in sorted(set(weight_map.values()))], weight_map
    if others := pickles_in(folder):
        raise UserError(f"{folder} holds {', '.join(others)} but no safetensors weights. {how_to_convert(folder)}")
    raise UserError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX} is there")


def pickles_in(folder: Path) -> list[str]:
    """Names of weight files in other formats than safetensors, at most three."""
    return sorted(path.name for pattern in _FOREIGN for path in folder.glob(pattern))[:3]


def how_to_convert(source: str | Path) -> str:
    """What to do with weights that are pickles, as sentences for a message."""
    return (
        "Pickled weights can run code when they are loaded, so they are not loaded here. If you trust their source, "
        "convert them once, outside ZeroInitContext: "
        f"transformers.AutoModelForCausalLM.from_pretrained({str(source)!r}, use_safetensors=False)"
        '.save_pretrained("converted"), and load "converted". Many Hub models keep a converted copy as a pull request: '
        'from_pretrained(name, revision="refs/pr/NUMBER")'
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise UserError(f"{path} has {path.stat().st_size} bytes; {_MAX_INDEX_BYTES} are allowed")
        parsed: Any = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not the JSON it should be ({error}); download or save it again") from error
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f'{path} has no "weight_map" from tensors to files; download or save it again')
    for name, file in weight_map.items():
        _check_shard_name(path, name, file)
    return weight_map


def _check_shard_name(index: Path, name: str, file: Any) -> None:
    parts = PurePosixPath(file).parts if isinstance(file, str) else ()
    if not parts or ".." in parts or file.startswith("/") or "\\" in file or ":" in file or "\0" in file:
        raise UserError(f"{index} sends tensor {name!r} to {file!r}; only files inside the folder are read")
    if not file.endswith(".safetensors"):
        raise UserError(f"{index} sends tensor {name!r} to {file!r}, which is not a safetensors file")


def _root(folder: Path) -> Path:
    """Where files may really lie: the folder, or for a snapshot in the Hub's cache that repository's cache folder.

    The Hub's cache keeps ``models--owner--name/snapshots/<commit>/file`` as links to
    ``models--owner--name/blobs/<hash>``.
    """
    resolved = folder.resolve()
    for parent in (resolved, *resolved.parents):
        repository = parent.parent.parent
        if parent.parent.name == "snapshots" and repository.name.startswith("models--"):
            return repository
    return resolved


def _contained(file: Path, root: Path, folder: Path) -> Path:
    """The real path of a file, refused where it lies outside."""
    try:
        resolved = file.resolve(strict=True)
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing, though it belongs to the weights in {folder}") from error
    except (OSError, RuntimeError) as error:  # a circle of links
        raise UserError(f"{file} cannot be opened: {error}") from error
    if not resolved.is_relative_to(root):
        raise UserError(
            f"{file} leads to {resolved}, outside {root}; only files inside the folder are read: copy the file there, "
            "or give the folder it is in"
        )
    return resolved
