"""Checks of ``model.config``, the transformers config given inline. The only part that imports transformers."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zero.config.words import name_text, nearest, show

_COUNTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "ffn_dim", "max_position_embeddings", "word_embed_proj_dim"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "n_embd", "n_layer", "n_head", "n_positions"),
)
# Where one of these is set, heads need not divide the hidden size.
_HEAD_WIDTHS = ("head_dim", "attention_head_size", "qk_head_dim", "qk_nope_head_dim", "v_head_dim", "d_kv")
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
# Keys that every saved config.json carries, and that no class declares.
_BOOKKEEPING = {
    "model_type",
    "architectures",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "_name_or_path",
    "auto_map",
}
_KINDS = {"bool": "true or false", "str": "a text", "int": "a whole number", "float": "a number"}


@dataclass
class Architecture:
    """What is known about an inline model config."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_positions: int | None = None
    """Longest sequence in tokens, ``None`` where the model has no limit or it is not known."""
    positions_key: str = ""
    """The key of model.config that sets it."""


def inspect_architecture(values: Mapping[str, Any]) -> Architecture:
    """Checks an inline transformers config by building its config class; builds no model.

    Args:
        values: The table `model.config`.

    Returns:
        Problems, notes, and the longest sequence the model takes.
    """
    found = Architecture()
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        given = "not given" if model_type is None else f"{show(model_type)} is not a text"
        found.problems.append(f'model.config.model_type: {given}; set it to an architecture such as "opt" or "llama"')
        return found
    try:
        config_class = _config_class(model_type, found)
    except ImportError as error:
        found.notes.append(f"model.config is not checked, transformers cannot be imported: {error}")
        return found
    if config_class is None:
        return found
    known = _known_keys(config_class)
    _check_keys(values, known, config_class.__name__, found)
    _check_counts(values, found)
    if not found.problems:
        _check_built(values, known, config_class, found)
    return found


def _config_class(model_type: str, found: Architecture) -> Any:
    """The config class of a causal language model, ``None`` with a problem line for any other name."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type in CONFIG_MAPPING_NAMES:
        return CONFIG_MAPPING[model_type]
    given = f"model.config.model_type = {show(model_type)}"
    meant = nearest(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if model_type in CONFIG_MAPPING_NAMES:
        why = 'is no causal language model in transformers; use one such as "opt", "gpt2" or "llama"'
    else:
        hint = f'did you mean "{meant}"?' if meant else 'known are "opt", "gpt2", "llama" and many more'
        why = f"is not known to the installed transformers; {hint}"
    found.problems.append(f"{given}: {why}")
    return None


def _known_keys(config_class: Any) -> set[str]:
    """Every key the class declares, aliases included."""
    fields = dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else ()
    parameters = inspect.signature(config_class).parameters
    return {item.name for item in fields} | {*parameters, *getattr(config_class, "attribute_map", {})} | _BOOKKEEPING


def _check_keys(values: Mapping[str, Any], known: set[str], class_name: str, found: Architecture) -> None:
    """Near misses are refused. Other strange keys may be old spellings that the class converts: they are only said."""
    for key, value in values.items():
        if key in known:
            continue
        meant = nearest(key, known, cutoff=0.85)
        line = f"model.config.{name_text(key)} = {show(value)}: not a key of transformers' {class_name}"
        if meant:
            found.problems.append(f"{line}; did you mean {meant}?")
        else:
            found.notes.append(f"{line}; passed on as it is")


def _check_counts(values: Mapping[str, Any], found: Architecture) -> None:
    for key in _COUNTS:
        value = values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            found.problems.append(f"model.config.{key} = {show(value)}: must be a whole number, 1 or more")


def _check_built(values: Mapping[str, Any], known: set[str], config_class: Any, found: Architecture) -> None:
    try:
        built = config_class(**{key: value for key, value in values.items() if key != "model_type"})
    except Exception as error:  # whatever 800 config classes may raise about a user's values
        found.problems.append(_refusal(values, error))
        return
    _check_heads(values, known, built, found)
    _check_key_value_heads(values, built, found)
    _check_names(values, found)
    for key in _POSITIONS:
        if key in known and (num := _number(built, key)):
            found.num_positions, found.positions_key = num, key
            return


def _number(built: Any, key: str) -> int | None:
    """A whole number above 0 of a built config; ``None`` where it has none, or a different one per layer."""
    try:
        value = getattr(built, key, None)
    except Exception:  # configs with a value per layer raise an error of their own kind
        return None
    return value if isinstance(value, int) and value > 0 else None


def _refusal(values: Mapping[str, Any], error: Exception) -> str:
    """transformers' own words on one line, with the key where it names one."""
    text = str(error).strip()
    reason = re.sub(r"^\w+Error: ", "", text.splitlines()[-1].strip()) if text else type(error).__name__
    named = re.search(r"for field '(\w+)'", text)
    if named is None or named.group(1) not in values:
        return f'model.config: refused for model_type = "{values["model_type"]}": {reason}'
    kinds = [_KINDS.get(kind, kind) for kind in re.findall(r"expected ([\w\[\], ]+?), got", reason)]
    key = named.group(1)
    return f"model.config.{key} = {show(values[key])}: {'must be ' + ' or '.join(kinds) if kinds else reason}"


def _check_heads(values: Mapping[str, Any], known: set[str], built: Any, found: Architecture) -> None:
    """Heads divide the hidden size in every model whose heads have no width of their own."""
    native: dict[str, str] = getattr(type(built), "attribute_map", {})
    names = {key: native.get(key, key) for key in ("hidden_size", "num_attention_heads")}
    asked = any(key in values or name in values for key, name in names.items())
    has_width = any(key in known or key in native.values() or key in values for key in _HEAD_WIDTHS)
    if not asked or has_width or not known.issuperset(names):
        return
    hidden, heads = (_number(built, key) for key in names)
    if hidden and heads and hidden % heads:
        shown = [key if key in values else name for key, name in names.items()]
        nearest_fits = sorted({max(hidden // heads, 1) * heads, (hidden // heads + 1) * heads})
        found.problems.append(
            f"model.config.{shown[0]} = {hidden}: must be a multiple of {shown[1]} = {heads}; nearest: "
            f"{', '.join(map(str, nearest_fits))}"
        )


def _check_key_value_heads(values: Mapping[str, Any], built: Any, found: Architecture) -> None:
    groups, heads = values.get("num_key_value_heads"), _number(built, "num_attention_heads")
    if isinstance(groups, int) and heads and heads % groups:
        found.problems.append(f"model.config.num_key_value_heads = {groups}: must divide num_attention_heads = {heads}")


def _check_names(values: Mapping[str, Any], found: Architecture) -> None:
    """Activation functions: the classes take any name, and the model fails on it while it is built."""
    from transformers.activations import ACT2FN

    for key in ("activation_function", "hidden_act", "hidden_activation"):
        value = values.get(key)
        if isinstance(value, str) and value not in ACT2FN:
            meant = nearest(value, ACT2FN)
            hint = f'; did you mean "{meant}"?' if meant else ""
            found.problems.append(
                f"model.config.{key} = {show(value)}: not an activation function of transformers, such as relu, gelu "
                f"or silu{hint}"
            )
