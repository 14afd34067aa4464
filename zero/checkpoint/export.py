"""``zero export``: a checkpoint to a Hugging Face folder, without a model, a GPU or much memory."""

from __future__ import annotations

import contextlib
import json
import logging
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from zero.checkpoint.codec import dtype_of, dump
from zero.checkpoint.files import (
    active,
    length_bytes,
    make_directories,
    open_plain,
    read_exactly,
    remove_tree,
    write_file,
)
from zero.checkpoint.finding import STATE, choose, read_json
from zero.checkpoint.huggingface import FOLDER, may_be_kept
from zero.checkpoint.manifest import BUFFER, PARAMETER, Manifest, Slice, read_manifest
from zero.checkpoint.matching import contradictions
from zero.checkpoint.problems import CheckpointError, DamagedError
from zero.checkpoint.reading import TensorReader
from zero.checkpoint.state import BufferRecord, ParameterRecord, Saved, saved_from
from zero.checkpoint.tensorfile import Outgoing, write_tensor_file

logger = logging.getLogger("zero")

SHARD_BYTES = 2 << 30
"""Most bytes of one file of the folder, unless a single tensor has more."""

_ADAPTER = "adapter_config.json"
_WORDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(checkpoint: str | Path, target: str | Path, dtype: torch.dtype | str | None = None) -> None:
    """Makes the folder that ``from_pretrained`` loads.

    Host memory: a block of 16 MiB at a time. A tensor whose memory does not run in the order of its dimensions (no
    architecture of transformers is known to have one) is held whole.

    Args:
        checkpoint: a ``step-*`` folder, or one that holds some: the newest good one.
        target: the folder to make; it must not exist, or be empty.
        dtype: of floating-point tensors ("fp32", "bf16", "fp16" or a torch.dtype); None: that of the training, which
            gives the very values the model computed with. fp32 gives the master weights.

    Raises:
        CheckpointError: the checkpoint is not good, holds no weights to export, or ``target`` cannot be written.
    """
    choice, target = choose(Path(checkpoint)), Path(target)
    wanted = _dtype(dtype)
    if target.is_dir() and any(target.iterdir()) or target.is_file():
        raise CheckpointError(f"{target} is not empty; name a new folder, or remove it first")
    try:
        manifest = read_manifest(choice.path)
        saved = saved_from(read_json(choice.path, STATE))
        problems = contradictions(manifest, saved) + _not_stored(saved, choice.path)
        if problems:
            raise CheckpointError(f"checkpoint {choice.path} cannot be exported: {'; '.join(problems)}")
        _write(choice.path, manifest, saved, target, wanted)
    except (DamagedError, OSError) as error:
        raise CheckpointError(f"checkpoint {choice.path} could not be exported to {target}: {error}") from error
    logger.info("checkpoint %s written as a Hugging Face folder to %s", choice.path, target)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _WORDS:
        raise CheckpointError(f"dtype {dtype!r} is unknown; allowed are {', '.join(_WORDS)}")
    return _WORDS[dtype]


def _not_stored(saved: Saved, path: Path) -> list[str]:
    exported = [record for record in saved.parameters.values() if record.export is not None]
    missing = [record.name for record in exported if record.sha256 is not None]
    if missing:
        return [f"{len(missing)} frozen parameters are not in it (it was saved with include_frozen=False)"]
    return [] if exported else ["it names no weights for a Hugging Face folder; use engine.save_pretrained()"]


def _write(checkpoint: Path, manifest: Manifest, saved: Saved, target: Path, dtype: torch.dtype | None) -> None:
    temporary = target.parent / f".export-{uuid.uuid4().hex}"
    make_directories(target.parent)
    active().make_directory(temporary)
    try:
        is_adapter = any(record.path == f"{FOLDER}/{_ADAPTER}" for record in manifest.files)
        with TensorReader(checkpoint) as reader:
            _write_weights(_outgoing(manifest, saved, reader, dtype), temporary, is_adapter)
        for record in manifest.files:
            folder, _, name = record.path.rpartition("/")
            if folder == FOLDER and may_be_kept(name):
                data = _small(checkpoint, record.path)
                write_file(temporary / name, [_with_dtype(data, dtype) if name == "config.json" else data])
        active().sync_directory(temporary)
        if target.is_dir():
            active().remove_directory(target)
        active().rename(temporary, target)
        active().sync_directory(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            remove_tree(temporary)
        raise


def _small(checkpoint: Path, path: str) -> bytes:
    with open_plain(checkpoint, path) as handle:
        data = bytearray(length_bytes(handle))
        read_exactly(handle, memoryview(data))
    return bytes(data)


def _with_dtype(config: bytes, dtype: torch.dtype | None) -> bytes:
    if dtype is None:
        return config
    content = json.loads(config)
    content.pop("torch_dtype", None)
    content["dtype"] = str(dtype).removeprefix("torch.")
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("utf-8")


# -- weights ---------------------------------------------------------------------------------------------------------


def _outgoing(manifest: Manifest, saved: Saved, reader: TensorReader, dtype: torch.dtype | None) -> list[Outgoing]:
    stored = manifest.by_tensor()
    records: list[tuple[str, ParameterRecord | BufferRecord]] = [
        *((PARAMETER, record) for record in saved.parameters.values()),
        *((BUFFER, record) for record in saved.buffers.values()),
    ]
    tensors: dict[str, Outgoing] = {}
    for role, record in records:
        if record.export is None:
            continue
        if record.export in tensors:
            raise DamagedError(f"two tensors are to be exported as {record.export}")
        own = dtype_of(record.dtype)
        as_dtype = dtype if dtype is not None and own.is_floating_point else own
        blocks = partial(_blocks, reader, stored.get((role, record.name), []), as_dtype)
        tensors[record.export] = Outgoing(record.export, as_dtype, record.shape, blocks)
    return list(tensors.values())


def _blocks(reader: TensorReader, parts: list[Slice], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    if parts and parts[0].order is not None:
        yield reader.whole(parts).reshape(-1).to(dtype)
        return
    for part in parts:
        for _, block in reader.blocks(part):
            yield block.to(dtype)


def _write_weights(tensors: list[Outgoing], folder: Path, is_adapter: bool) -> None:
    """One file, or numbered ones and an index where one would pass :data:`SHARD_BYTES`."""
    shards: list[list[Outgoing]] = [[]]
    filled_bytes = 0
    for tensor in tensors:
        if shards[-1] and filled_bytes + tensor.num_bytes > SHARD_BYTES and not is_adapter:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(tensor)
        filled_bytes += tensor.num_bytes
    if len(shards) == 1:
        name = "adapter_model.safetensors" if is_adapter else "model.safetensors"
        write_tensor_file(folder / name, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensor_file(folder / name, shard)
        weight_map.update(dict.fromkeys((tensor.key for tensor in shard), name))
    total_bytes = sum(tensor.num_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_file(folder / "model.safetensors.index.json", [dump(index)])
