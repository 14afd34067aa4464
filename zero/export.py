"""Plain safetensors out: a Hugging Face folder that loads without this project, written piece by piece."""

from __future__ import annotations

import json
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from gemini.manager import Manager
from gemini.tensor import ChunkTensor

SHARD_BYTES = 2 << 30
"""Most bytes of one file, and so of host memory that writing takes."""


class StateDictHook:
    """Makes ``model.state_dict()`` return real values (host copies), tied names sharing one tensor.

    Without it a user's own ``torch.save(model.state_dict())`` would write the NaN placeholders of released parameters.
    """

    def __init__(self, root: nn.Module, tensors: dict[int, ChunkTensor], manager: Manager) -> None:
        self._tensors = tensors
        self._manager = manager
        # Of the state_dict that is being made: a tied parameter is copied once, whichever module comes first.
        self._copies: tuple[weakref.ref[Any] | None, dict[int, torch.Tensor]] = (None, {})
        # Plain functions: torch marks hooks with an attribute, which a bound method cannot carry.
        self._handles = [root.register_load_state_dict_pre_hook(lambda *args: self._refuse_assignment(*args))]
        for module in root.modules():
            if module._parameters:
                self._handles.append(module.register_state_dict_post_hook(lambda *args: self._fill(*args)))

    def remove(self) -> None:
        """Leaves ``state_dict`` as it was."""
        for handle in self._handles:
            handle.remove()

    def _fill(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """Each module puts in its own parameters; torch calls this for every module of a state_dict."""
        del metadata
        if self._manager.all_shown:
            return
        self._manager.settle_idle_reads()
        copies = self._copies_for(state)
        for own, parameter in module._parameters.items():
            tensor = self._tensors.get(id(parameter))
            name = prefix + own
            if name in state and tensor is not None:
                if id(tensor) not in copies:
                    copies[id(tensor)] = tensor.chunk.values_of(tensor)
                state[name] = copies[id(tensor)]

    def _copies_for(self, state: dict[str, Any]) -> dict[int, torch.Tensor]:
        known, copies = self._copies
        if known is None or known() is not state:
            reference = weakref.ref(state, lambda _: self._forget_copies()) if isinstance(state, OrderedDict) else None
            self._copies = reference, {}
        return self._copies[1]

    def _forget_copies(self) -> None:
        self._copies = None, {}

    def _refuse_assignment(self, _: Any, __: Any, ___: Any, metadata: dict[str, Any], *____: Any) -> None:
        if metadata.get("assign_to_params_buffers", False):
            raise RuntimeError(
                "load_state_dict(assign=True) would replace parameters that an engine manages: leave assign out, or load "
                "before zero.initialize()"
            )


def tensors_to_save(module: nn.Module, tensors: dict[int, ChunkTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values for a folder, one at a time: each tied parameter once, then persistent buffers."""
    names: dict[int, list[str]] = {}
    owners: dict[int, nn.Parameter] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        owners[id(parameter)] = parameter
    targets = _tied_targets(module)
    for key, group in names.items():
        name = next((n for n in group if n not in targets), group[0])
        tensor = tensors.get(key)
        yield name, tensor.chunk.values_of(tensor) if tensor is not None else owners[key].detach().cpu()
    persistent = {
        f"{prefix}.{name}" if prefix else name
        for prefix, child in module.named_modules()
        for name in child._buffers
        if name not in child._non_persistent_buffers_set
    }
    for name, buffer in module.named_buffers():
        if name in persistent:
            yield name, buffer.detach().cpu()


def _tied_targets(module: nn.Module) -> set[str]:
    """Names that a Hugging Face model leaves out of its files because loading ties them."""
    tied = getattr(module, "all_tied_weights_keys", None) or getattr(module, "_tied_weights_keys", None) or ()
    return set(tied)


def write_safetensors(tensors: Iterator[tuple[str, torch.Tensor]], directory: Path) -> None:
    """Writes ``model.safetensors``, or numbered shards and an index where one file would pass :data:`SHARD_BYTES`."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        file = directory / f"shard-{len(shards):05d}.tmp"
        try:
            save_file(pending, file, metadata={"format": "pt"})
        except SafetensorError as error:  # which is no OSError, whatever the file system said
            raise OSError(f"{file} could not be written: {error}") from error
        file.chmod(0o666 & directory.stat().st_mode)  # it comes readable by nobody else
        shards.append(list(pending))
        pending, pending_bytes = {}, 0

    for name, value in tensors:
        if pending and pending_bytes + value.nbytes > SHARD_BYTES:
            flush()
        pending[name] = value.contiguous()
        pending_bytes += value.nbytes
        total_bytes += value.nbytes
    flush()
    if len(shards) == 1:
        (directory / "shard-00000.tmp").rename(directory / "model.safetensors")
        return
    index = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{number:05d}.tmp").rename(directory / file)
        index.update(dict.fromkeys(shard, file))
    text = json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": index}, indent=2)
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def save_pretrained(module: nn.Module, tensors: dict[int, ChunkTensor], directory: Path) -> None:
    """Writes config, generation config and weights.

    A PEFT model writes its adapter, as it would by itself. A module that is no Hugging Face model writes weights only.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if hasattr(module, "peft_config"):
        adapters: Any = module
        adapters.save_pretrained(directory)  # small: reads through state_dict(), which the hook fills
        return
    config = getattr(module, "config", None)
    if config is not None and hasattr(config, "save_pretrained"):
        dtype = next((t.chunk.layout.dtype for t in tensors.values()), torch.float32)
        before = getattr(config, "dtype", None), config.architectures
        config.dtype, config.architectures = dtype, [type(module).__name__]
        config.save_pretrained(directory)
        config.dtype, config.architectures = before
    generation = getattr(module, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)
    write_safetensors(tensors_to_save(module, tensors), directory)
