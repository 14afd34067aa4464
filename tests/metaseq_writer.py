"""Checkpoints as metaseq writes them: tensor-parallel parts, each cut into FSDP's shards, pickled with its options.

Written from what metaseq's and fairscale's public formats say, apart from the converter: the two must agree.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    "decoder.project_in.weight": "decoder.project_in_dim.weight",
    "decoder.project_out.weight": "decoder.project_out_dim.weight",
    "decoder.final_layer_norm.weight": "decoder.layer_norm.weight",
    "decoder.final_layer_norm.bias": "decoder.layer_norm.bias",
}
_LAYER_ORDER = ("self_attn.qkv_proj", "self_attn.out_proj", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")


def parts_of(state: dict[str, Tensor], num_parts: int, num_layers: int, fused: bool = True) -> list[dict[str, Tensor]]:
    """A model's weights by transformers' names as those of each tensor-parallel part, in the order of its modules."""
    model = {}
    for name, value in state.items():
        plain = name.removeprefix("model.")
        model[_NAMES.get(plain, plain)] = value
    parts = []
    for part in range(num_parts):
        mine: dict[str, Tensor] = OrderedDict()
        mine["decoder.embed_tokens.weight"] = _cut(model["decoder.embed_tokens.weight"], 0, part, num_parts)
        mine["decoder.embed_positions.weight"] = model["decoder.embed_positions.weight"]
        for name in ("decoder.project_in_dim.weight", "decoder.project_out_dim.weight"):
            mine |= {name: model[name]} if name in model else {}
        for index in range(num_layers):
            mine |= _layer(model, f"decoder.layers.{index}", part, num_parts, fused)
        for name in ("decoder.layer_norm.weight", "decoder.layer_norm.bias"):
            mine |= {name: model[name]} if name in model else {}
        parts.append(mine)
    return parts


def _layer(model: dict[str, Tensor], layer: str, part: int, num_parts: int, fused: bool) -> dict[str, Tensor]:
    mine = {}
    for module in _LAYER_ORDER:
        for kind in ("weight", "bias"):
            name = f"{layer}.{module}.{kind}"
            if module == "self_attn.qkv_proj":
                pieces = {
                    letter: _cut(model[f"{layer}.self_attn.{letter}_proj.{kind}"], 0, part, num_parts)
                    for letter in "kvq"
                    if f"{layer}.self_attn.{letter}_proj.{kind}" in model
                }
                if fused and pieces:
                    mine[name] = torch.cat([pieces["k"], pieces["v"], pieces["q"]])
                elif pieces:
                    mine |= {f"{layer}.self_attn.{letter}_proj.{kind}": value for letter, value in pieces.items()}
            elif name in model:
                dim = {"fc1": 0, "fc2": 1, "self_attn.out_proj": 1}.get(module)
                if kind == "bias" and module != "fc1":
                    dim = None
                mine[name] = model[name] if dim is None else _cut(model[name], dim, part, num_parts)
    return mine


def _cut(value: Tensor, dim: int, part: int, num_parts: int) -> Tensor:
    return value.chunk(num_parts, dim=dim)[part].clone()


def flatten(part: dict[str, Tensor], num_shards: int, tied: bool = True) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """One part as fairscale's FSDP cuts it: the model and the ``shard_metadata`` of each rank.

    Each layer is wrapped by itself, the rest by the outermost wrapper, as metaseq does.
    """
    instances: dict[str, list[str]] = {"": []}
    for name in part:
        words = name.split(".")
        path = ".".join(words[:3]) if words[1] == "layers" else ""
        instances.setdefault(path, []).append(name)
    models: list[dict[str, Any]] = [OrderedDict() for _ in range(num_shards)]
    metadata: list[dict[str, Any]] = [
        {"param_metadata": [], "buffer_names": ["decoder.version"]} for _ in range(num_shards)
    ]
    for path, names in instances.items():
        flat = torch.cat([part[name].flatten() for name in names])
        pieces = list(flat.chunk(num_shards))
        key = f"{path}.flat_param_0" if path else "flat_param_0"
        for rank, (model, info) in enumerate(zip(models, metadata, strict=True)):
            padding = pieces[0].numel() - pieces[rank].numel()
            model[key] = torch.nn.functional.pad(pieces[rank], (0, padding)).clone()
            info["param_metadata"].append(
                {
                    "fsdp_path": path,
                    "params": {
                        "flat_param_0": {
                            "names": [_wrapped(name[len(path) + 1 :] if path else name) for name in names],
                            "shapes": [part[name].shape for name in names],
                            "numels": [part[name].numel() for name in names],
                            "padding": padding,
                        }
                    },
                    "no_broadcast_optim_state": False,
                    "shared_param_info": []
                    if path or not tied
                    else [("decoder.embed_tokens.weight", "decoder.output_projection.weight")],
                }
            )
    for model in models:
        model["decoder.version"] = torch.tensor([3.0])
    return list(zip(models, metadata, strict=True))


def _wrapped(name: str) -> str:
    """Some versions leave the wrapper's name in."""
    return name.replace("decoder.", "decoder._fsdp_wrapped_module.", 1)


def options_of(config: Any, num_parts: int, **changes: Any) -> argparse.Namespace:
    """metaseq's options of a model with this ``OPTConfig``."""
    values = {
        "_name": "transformer_lm_megatron", "arch": "transformer_lm_megatron", "model_parallel_size": num_parts,
        "decoder_layers": config.num_hidden_layers, "decoder_embed_dim": config.hidden_size,
        "decoder_ffn_embed_dim": config.ffn_dim, "decoder_attention_heads": config.num_attention_heads,
        "decoder_input_dim": config.word_embed_proj_dim, "decoder_output_dim": config.word_embed_proj_dim,
        "decoder_normalize_before": config.do_layer_norm_before,
        "no_decoder_final_norm": config._remove_final_layer_norm,
        "share_decoder_input_output_embed": config.tie_word_embeddings, "decoder_learned_pos": True,
        "no_scale_embedding": True, "activation_fn": config.activation_function, "dropout": config.dropout,
        "attention_dropout": config.attention_dropout, "activation_dropout": 0.0, "no_emb_dropout": True,
        "max_target_positions": config.max_position_embeddings, "tokens_per_sample": "${task.tokens_per_sample}",
        "megatron_init_sigma": config.init_std, "alibi": False, "disable_bias": not config.enable_bias,
        "disable_affine_ln": not config.layer_norm_elementwise_affine,
    }  # fmt: skip
    return argparse.Namespace(**(values | changes))


def save(path: Path, model: dict[str, Any], metadata: dict[str, Any] | None, **more: Any) -> None:
    """One file, with what else metaseq puts in."""
    content = {
        "args": None,
        "criterion": None,
        "model": model,
        "optimizer_history": [{"num_updates": 7, "optimizer_name": "FP16Optimizer", "lr_scheduler_state": {}}],
        "extra_state": {"train_iterator": {"epoch": 1}, "val_loss": None, "previous_training_time": 3.5},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(5)}}},
    }
    if metadata is not None:
        content["shard_metadata"] = metadata
    torch.save(content | more, path)


def write(
    folder: Path, model: Any, num_parts: int = 2, num_shards: int = 2, name: str = "checkpoint_last", **changes: Any
) -> None:
    """A checkpoint of a transformers OPT: ``num_parts`` x ``num_shards`` files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    state = {key: value.clone() for key, value in model.state_dict().items() if key != "lm_head.weight"}
    config_of_run = {"model": options_of(config, num_parts, **changes), "task": {"tokens_per_sample": 17}}
    for number, part in enumerate(parts_of(state, num_parts, config.num_hidden_layers)):
        for rank, (weights, metadata) in enumerate(flatten(part, num_shards)):
            save(folder / f"{name}-model_part-{number}-shard{rank}.pt", weights, metadata, cfg=config_of_run)


@contextlib.contextmanager
def omegaconf_classes() -> Iterator[Any]:
    """Stand-ins for omegaconf's classes, importable for as long as something is pickled."""
    modules = {name: types.ModuleType(name) for name in ("omegaconf", "omegaconf.dictconfig", "omegaconf.nodes")}

    class DictConfig:
        def __init__(self, content: dict[str, Any]) -> None:
            self.__dict__.update(_metadata=argparse.Namespace(ref_type=dict), _parent=None, _content=content)

    class AnyNode:
        def __init__(self, value: Any, parent: Any = None) -> None:
            self.__dict__.update(_metadata=None, _parent=parent, _val=value)

    for cls, module in ((DictConfig, "omegaconf.dictconfig"), (AnyNode, "omegaconf.nodes")):
        cls.__module__, cls.__qualname__ = module, cls.__name__
        setattr(modules[module], cls.__name__, cls)
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield types.SimpleNamespace(DictConfig=DictConfig, AnyNode=AnyNode)
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
