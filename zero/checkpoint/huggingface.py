"""What a checkpoint keeps for an export without the model: config files, tokenizer, names in a Hugging Face folder."""

from __future__ import annotations

import copy
import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zero.checkpoint.files import is_plain_name
from zero.checkpoint.problems import CheckpointError
from zero.checkpoint.state import BufferRecord, ParameterRecord

if TYPE_CHECKING:
    from zero.engine import Engine

logger = logging.getLogger("zero")

FOLDER = "model"
"""Folder of a checkpoint whose files an export takes over as they are."""

_ALLOWED = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe"})
_MOST_FILE_BYTES = 256 << 20


def may_be_kept(name: str) -> bool:
    """Whether a file of this name may stand in a checkpoint's model folder: texts and vocabularies, no code."""
    return is_plain_name(name) and "/" not in name and Path(name).suffix in _ALLOWED


def model_files(engine: Engine, tokenizer: Any) -> dict[str, bytes]:
    """Config, generation config, adapter config and tokenizer, by path inside the checkpoint.

    Args:
        engine: whose module's configs are kept.
        tokenizer: a tokenizer, a folder with its files, or None.

    Raises:
        CheckpointError: ``tokenizer`` is neither.
    """
    module = engine.module
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = adapter_config(module)
        if adapter is not None:
            adapter.save_pretrained(folder)
        elif hasattr(getattr(module, "config", None), "save_pretrained"):
            _model_config(engine).save_pretrained(folder)
            generation = getattr(module, "generation_config", None)
            if generation is not None:
                generation.save_pretrained(folder)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(folder)
        files = _read(folder)
    if isinstance(tokenizer, str | Path):
        if not Path(tokenizer).is_dir():
            raise CheckpointError(f"tokenizer: {tokenizer} is no folder")
        files = {**_read(Path(tokenizer)), **files}
    elif tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise CheckpointError(f"tokenizer: a tokenizer or a folder is needed, {type(tokenizer).__name__} was given")
    return {f"{FOLDER}/{name}": data for name, data in sorted(files.items())}


def _model_config(engine: Engine) -> Any:
    module: Any = engine.module
    config = copy.deepcopy(module.config)
    dtypes = [tensor.chunk.layout.dtype for tensor in engine._tensors.values()]
    config.dtype = dtypes[0] if dtypes else torch.float32
    config.architectures = [type(module).__name__]
    return config


def _read(folder: Path) -> dict[str, bytes]:
    files = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.is_symlink():
            continue
        if may_be_kept(path.name) and path.stat().st_size <= _MOST_FILE_BYTES:
            files[path.name] = path.read_bytes()
    return files


# -- names -----------------------------------------------------------------------------------------------------------


def with_export_names(
    module: torch.nn.Module, parameters: list[ParameterRecord], buffers: list[BufferRecord]
) -> tuple[list[ParameterRecord], list[BufferRecord]]:
    """The records with the names that their tensors have in a Hugging Face folder."""
    if adapter_config(module) is not None:
        names = _adapter_names(module)
        return [replace(r, export=_first(names, r.aliases)) for r in parameters], [
            replace(b, export=names.get(b.name)) for b in buffers
        ]
    # What loading ties again is left out of the files.
    tied = set(getattr(module, "all_tied_weights_keys", None) or getattr(module, "_tied_weights_keys", None) or ())
    return [replace(r, export=next((a for a in r.aliases if a not in tied), r.aliases[0])) for r in parameters], [
        replace(b, export=b.name if b.persistent else None) for b in buffers
    ]


def _first(names: dict[str, str], aliases: tuple[str, ...]) -> str | None:
    return next((names[alias] for alias in aliases if alias in names), None)


def adapter_config(module: torch.nn.Module) -> Any:
    """The config of a peft model's active adapter, as it is saved; None for any other model."""
    configs = getattr(module, "peft_config", None)
    active = getattr(module, "active_adapter", None)
    if not isinstance(configs, dict) or not isinstance(active, str) or active not in configs:
        return None
    config = copy.deepcopy(configs[active])
    config.inference_mode = True
    return config


def _adapter_names(module: torch.nn.Module) -> dict[str, str]:
    """Names in the model to names in ``adapter_model.safetensors``, asked of peft with stand-ins for the tensors."""
    from peft import get_peft_model_state_dict

    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in module.named_buffers(remove_duplicate=False)]
    stand_ins = {name: torch.empty(0) for name in names}
    by_id = {id(tensor): name for name, tensor in stand_ins.items()}
    try:
        kept = get_peft_model_state_dict(
            module, stand_ins, adapter_name=str(module.active_adapter), save_embedding_layers=False
        )
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # A tuner that computes with the tensors: only its export from a checkpoint is lost.
        logger.warning("this adapter can only be exported with engine.save_pretrained(): %s", error)
        return {}
    return {by_id[id(tensor)]: name for name, tensor in kept.items() if id(tensor) in by_id}
