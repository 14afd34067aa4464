"""The model and the tokenizer that ``[model]`` names."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemini.device import Device
from zero.config.loading import load_config
from zero.config.schema import Config
from zero.data.hub import hub_has_address
from zero.data.tokenizer import builtin_tokenizer
from zero.errors import UserError
from zero.models.sizes import find_size

logger = logging.getLogger("zero")

BUILTIN = "builtin"
_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

_TOKENIZER_NAMES = ("tokeniz", "vocab", "merges", "spiece", "sentencepiece", "bpe", "sentence.bpe", "source", "dict")
"""How the names of tokenizers' files begin, code of their own among them."""


def build_tokenizer(config: Config) -> Any:
    """The tokenizer of the run, with a padding token.

    Raises:
        UserError: it cannot be had; says what to check.
    """
    source = _source(config.model.tokenizer_source)
    if source == BUILTIN:
        vocab_size = (config.model.config or {}).get("vocab_size")
        return builtin_tokenizer(int(vocab_size)) if vocab_size else builtin_tokenizer()
    from transformers import AutoTokenizer

    key = "model.tokenizer" if config.model.tokenizer else "model.name_or_path"
    _require_model_folder(key, source)
    with _explained(key, source):
        folder, options = _files_of(source)
        if not options:
            _require_tokenizer_files(source)
        tokenizer = AutoTokenizer.from_pretrained(
            folder,
            **options,
            revision=_revision(config, source),
            trust_remote_code=config.model.trust_remote_code,
            **_network(source),
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"model.tokenizer: {source} has neither a padding nor an end token; set one and save it")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_config(config: Config, tokenizer: Any = None) -> Any:
    """The transformers config of the run's model, inline or of a folder or Hub name.

    An inline config takes the special token numbers of the run's tokenizer where it does not give its own.
    """
    from transformers import AutoConfig

    if config.model.config is None:
        name = _name(config)
        _require_model_folder("model.name_or_path", name)
        with _explained("model.name_or_path", name):
            folder, options = _files_of(name)
            return AutoConfig.from_pretrained(
                folder,
                **options,
                revision=config.model.revision,
                trust_remote_code=config.model.trust_remote_code,
                **_network(name),
            )
    fields = dict(config.model.config)
    model_type = fields.pop("model_type")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if tokenizer is not None and getattr(tokenizer, key, None) is not None:
            fields.setdefault(key, getattr(tokenizer, key))
    return AutoConfig.for_model(model_type, **fields)


def build_model(config: Config, tokenizer: Any = None) -> nn.Module:
    """The model, with adapters and activation checkpointing as the config has it.

    A model with random weights is built under ``train.seed``; one from a folder or the Hub is streamed from its
    safetensors files into the engine's chunks later.
    """
    from transformers import AutoModelForCausalLM

    section = config.model
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
    if section.attn_implementation:
        options["attn_implementation"] = section.attn_implementation
    if section.config is not None:
        torch.manual_seed(config.train.seed)
        with _explained("model.config", section.config["model_type"]):
            model = AutoModelForCausalLM.from_config(model_config(config, tokenizer), dtype=torch.float32, **options)
    else:
        from zero.context import ZeroInitContext

        name = _name(config)
        options |= _network(name)
        with _explained("model.name_or_path", name), ZeroInitContext():
            folder, files = _files_of(name)
            if files:
                options |= files | {"quantization_config": _unpacked()}
            # "main" and not None: only then does transformers look for the safetensors copy that the Hub's bot makes
            # of a model whose main branch holds pickles (facebook/opt-* are such models).
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, revision=section.revision or "main", output_loading_info=True, **options
            )
        _require_whole(name, info)
    return dress(model, config)


def _source(text: str) -> str:
    """A folder is itself, whatever it is called; else the short name of a published size is that of the Hub.

    Raises:
        UserError: a published size that is not on the Hub.
    """
    if Path(text).exists():
        return text
    size = find_size(text)
    if size is None:
        return text
    if size.hub_name is None:
        raise UserError(
            f"{text} is not on the Hub: ask Meta for its metaseq files, convert them with "
            "`python -m zero.models.metaseq SOURCE TARGET`, and give that folder"
        )
    return size.hub_name


def _files_of(name: str) -> tuple[str, dict[str, Any]]:
    """What transformers is to load for a name or a path, and its options: a GGUF file holds all in one.

    Raises:
        UserError: it is such a file, and the package that reads it is missing.
    """
    path = Path(name)
    if path.suffix != ".gguf" or not path.is_file():
        return name, {}
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f'{name} is a GGUF file, which needs the package gguf: pip install -c constraints.txt -e ".[gguf]" in the '
            "folder of this project"
        )
    return str(path.parent), {"gguf_file": path.name}


def _unpacked() -> Any:
    """The values of a GGUF file as ordinary weights: packed ones cannot be trained, nor cut into chunks."""
    import transformers

    kind = getattr(transformers, "GgufConfig", None)  # older versions unpack without being asked
    return None if kind is None else kind(dequantize=True)


def _require_whole(name: str, info: Any) -> None:
    """Refuses weights that lack some of the model's parameters, which transformers would start at random."""
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"model.name_or_path = {name!r}: the weights lack the parameter {missing[0]}{more}, which would start at "
            "random; is the folder complete, and is it of a causal language model?"
        )


def _require_model_folder(key: str, source: str) -> None:
    """Refuses a folder that holds adapters alone."""
    path = Path(source)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise UserError(
            f"{key} = {source!r} holds adapters (LoRA) without the model that they adapt: load that one and then "
            f'peft.PeftModel.from_pretrained(model, "{source}"); merge_and_unload() makes one model of both'
        )


def _require_tokenizer_files(source: str) -> None:
    """transformers makes a tokenizer without a vocabulary of a folder without one."""
    folder = Path(source)
    if folder.is_dir() and not any(
        file.name.startswith(_TOKENIZER_NAMES) or file.suffix in (".model", ".spm", ".tiktoken")
        for file in folder.iterdir()
    ):
        inner = folder / "model"
        hint = f"did you mean {inner}?" if (inner / "config.json").is_file() else "is the folder complete?"
        raise UserError(f"{source!r} holds no tokenizer; {hint}")


def dress(model: Any, config: Config) -> nn.Module:
    """Adds adapters and turns activation checkpointing on."""
    kind = config.train.checkpointing
    if kind != "off":
        set_checkpointing(model, kind)
    if config.model.lora is not None:
        if kind != "off":
            model.enable_input_require_grads()
        model = _with_adapters(model, config)
    dressed: nn.Module = model
    return dressed


def set_checkpointing(model: Any, kind: str) -> None:
    """Turns activation checkpointing on ("reentrant" or "non_reentrant"), or "off"."""
    # transformers 5.23 renamed it and warns about the old name, which is all that 5.0 has.
    name = "disable" if kind == "off" else "enable"
    switch = getattr(model, f"activation_checkpointing_{name}", None) or getattr(
        model, f"gradient_checkpointing_{name}"
    )
    if kind == "off":
        switch()
        return
    switch({"use_reentrant": kind == "reentrant"})
    model.config.use_cache = False


def _with_adapters(model: Any, config: Config) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("model.lora needs the package peft: pip install peft") from error
    lora = config.model.lora
    if lora is None:
        return model
    targets = list(lora.target_modules) if isinstance(lora.target_modules, tuple) else lora.target_modules
    options = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    try:
        return get_peft_model(model, options)
    except ValueError as error:
        raise UserError(f"model.lora: {error}") from error


def in_stored_dtype(config: Config, model: Any, device: Device) -> Config:
    """The config with the dtype that a model's weights are stored in, for passes without gradients, unless it says one.

    fp16 becomes fp32 on the host, whose cores have no products in fp16.
    """
    if config.is_set("precision.dtype"):
        return config
    stored = _DTYPE_NAMES.get(model.dtype, "fp32")
    return load_config(config, {"precision": {"dtype": "fp32" if device.is_host and stored == "fp16" else stored}})


def max_positions(config: Any) -> int | None:
    """Most tokens a model of this transformers config reads at once; None where it has no limit."""
    for key in ("max_position_embeddings", "n_positions", "seq_length"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _name(config: Config) -> str:
    config.require_model()
    return _source(str(config.model.name_or_path))


def _revision(config: Config, source: str) -> str | None:
    return config.model.revision if config.model.tokenizer is None else None


def _network(name: str) -> dict[str, bool]:
    """Without a network the Hub's client retries for half a minute: then only its cache is asked, at once."""
    return {} if Path(name).exists() or hub_has_address() else {"local_files_only": True}


@contextlib.contextmanager
def _explained(key: str, value: str) -> Any:
    """Turns what transformers raises for a wrong name, no network or a damaged folder into a user's error."""
    try:
        yield
    except UserError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can make transformers fail anywhere
        if isinstance(error, RuntimeError) and not Path(value).exists():
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        first = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or [""])[0]
        if not isinstance(error, (OSError, ValueError, ImportError)):  # 'added_tokens', say, tells nobody anything
            first = f"{type(error).__name__}: {first}"
        hint = (
            "is the folder complete?"
            if Path(value).exists()
            else "no such folder here; is the name right, and is the Hub reachable?"
        )
        raise UserError(f"{key} = {value!r}: {first} ({hint})") from error
