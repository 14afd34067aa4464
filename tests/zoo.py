"""Tiny random models: one for every causal language model architecture of transformers.

Configurations are made generically: the architecture's own default, each known size cut down by field name, sub-configs
alike, one layer of every kind kept. What that cannot know is in `tests.zoo_table`. Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.zoo_table import FIRST_SPECIAL_ID, NOT_BUILT, OVERRIDES, TINY

__all__ = ["ARCHITECTURES", "BUILT", "NOT_BUILT", "Facts", "batch", "build", "describe", "make_config"]

ARCHITECTURES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
BUILT: tuple[str, ...] = tuple(name for name in ARCHITECTURES if name not in NOT_BUILT)

_FIRST_TEXT_ID = 8  # smaller ids are padding, start, end of text in most defaults
_NUM_PADDING = 3  # tokens without attention and label at the end of the last row


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a tiny model looks like to somebody who places its parameters.

    Attributes:
        class_name: The model class.
        num_params: Different parameters; tied ones count once.
        params_bytes: Their bytes, fp32.
        num_frozen: Parameters that do not require gradients as built.
        tied: Names of one parameter each, for each that has more than one name.
        blocks: Outermost module lists by path, with their numbers of children.
        unused: Names of parameters that require gradients and get none from `batch`.
        draws_random: Whether a forward draws from the random generator of torch (dropout, jitter).
    """

    class_name: str
    num_params: int
    params_bytes: int
    num_frozen: int
    tied: tuple[tuple[str, ...], ...]
    blocks: dict[str, int]
    unused: tuple[str, ...]
    draws_random: bool

    @property
    def num_blocks(self) -> int:
        """Children of the outermost module lists, all together."""
        return sum(self.blocks.values())


def build(model_type: str, seed: int = 0) -> nn.Module:
    """Builds the tiny model of an architecture, fp32 and in train mode, with the library's default attention.

    Args:
        model_type: One of `BUILT`.
        seed: Seed of the random weights. The caller's random generator is left as it was.

    Raises:
        KeyError: For a name that is in `NOT_BUILT` or unknown, with the reason.
    """
    if model_type not in BUILT:
        raise KeyError(f"{model_type}: {NOT_BUILT.get(model_type, 'not a causal language model of transformers')}")
    config = make_config(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(config, _DECODER_ONLY):  # the mapping names a class for the decoder's config
            model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(config.decoder)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.train()


def batch(model_type: str, model: nn.Module, seed: int = 0, batch_size: int = 2, tokens: int = 16) -> dict[str, Tensor]:
    """Makes inputs for which `model(**batch).loss` is a finite scalar that requires gradients.

    The last row ends in three padding tokens. Works with 5 to 64 tokens, except that reformer takes just 16.

    Args:
        model_type: The name that `model` was built from.
        model: The model, asked for sizes only.
        seed: Seed of the random ids.
        batch_size: Rows.
        tokens: Tokens of each row, more than three.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, tokens)
    mask = torch.ones(shape, dtype=torch.long)
    mask[-1, -_NUM_PADDING:] = 0
    ids = _random_ids(shape, generator)
    inputs = {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    if model_type in _EXTRA_INPUTS:
        inputs |= _EXTRA_INPUTS[model_type](model, mask, generator)
    return inputs


@functools.cache
def describe(model_type: str) -> Facts:
    """Builds the architecture once, runs one forward and backward, and returns facts about it."""
    model = build(model_type)
    names: dict[Tensor, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    draws_random = _forward_backward(model, batch(model_type, model))
    return Facts(
        class_name=type(model).__name__,
        num_params=len(names),
        params_bytes=sum(param.nbytes for param in names),
        num_frozen=sum(not param.requires_grad for param in names),
        tied=tuple(tuple(group) for group in names.values() if len(group) > 1),
        blocks={path: len(blocks) for path, blocks in _outermost_lists(model)},
        unused=tuple(group[0] for param, group in names.items() if param.requires_grad and param.grad is None),
        draws_random=draws_random,
    )


def make_config(model_type: str) -> PreTrainedConfig:
    """Returns the tiny configuration of an architecture, composite where the architecture's is."""
    cls = CONFIG_MAPPING[model_type]
    config = cls(**_tiny_fields(cls, OVERRIDES.get(model_type, {})))
    if model_type == "gemma3n":
        _replace_timm_tower(config)
    return config


def _tiny_fields(cls: type[PreTrainedConfig], overrides: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a configuration class that make it tiny, sub-configs as nested dictionaries."""
    default = cls()
    default.allow_global_per_layer_attribute_access = True  # of a config that is only read here
    fields = {field.name: getattr(default, field.name, None) for field in dataclasses.fields(cls)}
    values = {name: min(TINY[name], value) for name, value in fields.items() if name in TINY and _is_int(value)}
    values |= _special_ids(fields) | _per_layer_fields(fields, default)
    if "kv_lora_rank" in fields and "num_key_value_heads" in values:  # latent attention: as many as query heads
        values["num_key_value_heads"] = TINY["num_attention_heads"]
    if "is_decoder" in fields:  # encoders in the mapping attend causally only as decoders
        values["is_decoder"] = True
    subs = _sub_configs(cls)
    for key, sub in subs.items():
        values[key] = _tiny_fields(sub, overrides.get(key, {})) | {"model_type": sub.model_type}
    return values | {name: value for name, value in overrides.items() if name not in subs}


def _special_ids(fields: dict[str, Any]) -> dict[str, Any]:
    """Moves ids of special tokens into the tiny vocabulary, above all ids of text."""
    ids: dict[str, Any] = {}
    for name, value in fields.items():
        if not name.endswith(("_token_id", "_token_index")):
            continue
        if isinstance(value, (list, tuple)):
            ids[name] = [FIRST_SPECIAL_ID]
        elif _is_int(value) and value >= FIRST_SPECIAL_ID:
            ids[name] = FIRST_SPECIAL_ID + 1 + len(ids)
    return ids


def _per_layer_fields(fields: dict[str, Any], default: PreTrainedConfig) -> dict[str, Any]:
    """Keeps the first layer of each kind, and at least two layers, of fields that list something per layer."""
    num_layers = getattr(default, "num_hidden_layers", None)
    lists = {name: value for name, value in fields.items() if _is_per_layer(value, num_layers)}
    if not lists:
        return {}
    first_of_kind: dict[str, int] = {}
    for index, kind in enumerate(zip(*lists.values(), strict=True)):
        first_of_kind.setdefault(repr(kind), index)
    kept = list(first_of_kind.values())
    kept = kept * 2 if len(kept) == 1 else kept
    count_name = default.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return {name: [value[i] for i in kept] for name, value in lists.items()} | {count_name: len(kept)}


def _is_per_layer(value: object, num_layers: int | None) -> bool:
    """Tells a list with one entry per layer from a list of layer numbers."""
    return isinstance(value, (list, tuple)) and len(value) == num_layers and list(value) != list(range(len(value)))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sub_configs(cls: type[PreTrainedConfig]) -> dict[str, type[PreTrainedConfig]]:
    """Returns the classes of the sub-configs by field, the default one where the field takes any."""
    found = {}
    for key, sub in cls.sub_configs.items():
        found[key] = (
            sub if issubclass(sub, PreTrainedConfig) else CONFIG_MAPPING[cls.sub_configs_defaults[key].model_type]
        )
    return found


def _replace_timm_tower(config: PreTrainedConfig) -> None:
    """Gives gemma3n a vision tower of transformers: its own needs timm, and text alone never runs it."""
    tower = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=8, patch_size=4
    )
    for name in ("vocab_size", "vocab_offset", "rms_norm_eps"):
        setattr(tower, name, getattr(config.vision_config, name))
    vars(config)["vision_config"] = tower  # past the type check of the field


def _outermost_lists(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield path + name, child
        else:
            yield from _outermost_lists(child, f"{path}{name}.")


def _forward_backward(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Fills the gradients and tells whether the forward drew random numbers."""
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        loss = model(**inputs).loss
        drew = not torch.equal(before, torch.get_rng_state())
        loss.backward()
    return drew


def _random_ids(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randint(_FIRST_TEXT_ID, FIRST_SPECIAL_ID, tuple(shape), generator=generator)


def _codebook_inputs(model: nn.Module, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Audio codes: rows of all codebooks stacked as ids, codebooks last as labels."""
    labels = _random_ids((*mask.shape, model.num_codebooks), generator)
    ids = labels.transpose(1, 2).reshape(-1, mask.shape[1])
    return {"input_ids": ids, "labels": labels.masked_fill(mask[..., None] == 0, -100)}


def _image_inputs(model: nn.Module, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Pixels: the loss of git takes as many logits off the front as an image has."""
    vision = model.config.vision_config
    shape = (mask.shape[0], vision.num_channels, vision.image_size, vision.image_size)
    return {"pixel_values": torch.randn(shape, generator=generator)}


def _cross_attention_inputs(model: nn.Module, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """States of four image patches, without which cross-attention layers are passed over."""
    return {"cross_attention_states": torch.randn(mask.shape[0], 4, model.config.hidden_size, generator=generator)}


_DECODER_ONLY = (transformers.MusicgenConfig, transformers.MusicgenMelodyConfig)
_EXTRA_INPUTS: dict[str, Callable[[nn.Module, Tensor, torch.Generator], dict[str, Tensor]]] = {
    "git": _image_inputs,
    "mllama": _cross_attention_inputs,
    "musicgen": _codebook_inputs,
    "musicgen_melody": _codebook_inputs,
}
