"""The tensor-parallel parts of a metaseq checkpoint as one model with transformers' names."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence

import torch

from zero.errors import UserError
from zero.models.metaseq_part import FLAT, Layout, Part
from zero.models.unified import POSITION_OFFSETS, UnifiedConfig

logger = logging.getLogger("zero")

_RENAMED = {
    "decoder.project_in_dim.weight": "decoder.project_in.weight",
    "decoder.project_out_dim.weight": "decoder.project_out.weight",
    "decoder.layer_norm.weight": "decoder.final_layer_norm.weight",
    "decoder.layer_norm.bias": "decoder.final_layer_norm.bias",
    "decoder.output_projection.weight": "lm_head.weight",
}
_DROPPED = ("decoder.version",)
_FUSED = ".qkv_proj."
_FUSED_ORDER = ("k", "v", "q")
"""Keys come first in metaseq's fused matrix, whatever its name says; in each part by itself."""
_BY_ROWS = re.compile(r".*\.(embed_tokens\.weight|output_projection\.weight|(fc1|[kvq]_proj)\.(weight|bias))")
_BY_COLUMNS = re.compile(r".*\.(fc2|out_proj)\.weight")
_LAYER_FLAT = re.compile(r"decoder\.layers\.(\d+)\.flat_param(_\d+)?")


class MetaseqWeights:
    """All weights of a model, by transformers' names, each put together from all parts when it is read.

    Args:
        parts: in order.

    Raises:
        UserError: the parts do not hold the same parameters.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._sources: dict[str, tuple[str, int | None]] = {}
        names = parts[0].names()
        for part in parts[1:]:
            if sorted(part.names()) != sorted(names):
                other = sorted(set(part.names()) ^ set(names))[0]
                raise UserError(
                    f"the tensor-parallel parts hold different parameters, {other} for one: is one of another model?"
                )
        for name in names:
            if name in _DROPPED:
                continue
            if name.endswith("._float_tensor"):
                raise UserError(
                    f"{name} belongs to positions that are not learned (sinusoidal), which OPT's class has not"
                )
            for third, letter in enumerate(_FUSED_ORDER) if _FUSED in name else ((None, ""),):
                self._add(name, third, letter)

    def _add(self, name: str, third: int | None, letter: str) -> None:
        ours = _RENAMED.get(name, name)
        ours = ours.replace(_FUSED, f".{letter}_proj.") if third is not None else ours
        ours = "model." + ours if ours.startswith("decoder.") else ours
        if ours in self._sources:
            raise UserError(f"{name} and {self._sources[ours][0]} are both {ours}")
        self._sources[ours] = (name, third)

    def names(self) -> list[str]:
        """Names of all weights."""
        return list(self._sources)

    def shape(self, name: str) -> torch.Size:
        """Shape of a weight of the whole model."""
        source, third = self._sources[name]
        shapes = [part.shape(source) for part in self._parts]
        if third is not None:
            shapes = [torch.Size((shape[0] // 3, *shape[1:])) for shape in shapes]
        dim = _merged_dim(source)
        if dim is None:
            return shapes[0]
        merged = list(shapes[0])
        merged[dim] = sum(shape[dim] for shape in shapes)
        return torch.Size(merged)

    def dtype(self, name: str) -> torch.dtype:
        """dtype of a weight."""
        return self._parts[0].dtype(self._sources[name][0])

    def read(self, name: str) -> torch.Tensor:
        """A new tensor with a weight of the whole model.

        Raises:
            UserError: the parts' pieces do not fit together.
        """
        source, third = self._sources[name]
        if len({part.dtype(source) for part in self._parts}) > 1:
            raise UserError(f"{source} is not of one dtype in all tensor-parallel parts")
        dim = _merged_dim(source)
        pieces = (part.read(source, _rows(part.shape(source), third)) for part in self._parts)
        if dim is None:
            return _replicated(source, pieces)
        whole, at = torch.empty(self.shape(name), dtype=self.dtype(name)), 0
        for piece in pieces:  # one at a time, so that no second copy of the whole is ever there
            place = whole.narrow(dim, at, piece.shape[dim])
            if place.shape != piece.shape:
                raise UserError(
                    f"{source}: parts of shapes {tuple(place.shape)} and {tuple(piece.shape)} do not fit together"
                )
            place.copy_(piece)
            at += piece.shape[dim]
        return whole


def _rows(shape: torch.Size, third: int | None) -> slice | None:
    if third is None:
        return None
    length = shape[0] // 3
    return slice(third * length, (third + 1) * length)


def _merged_dim(source: str) -> int | None:
    """Along which dimension parts have pieces of a parameter; None: each has all of it."""
    if _FUSED in source or _BY_ROWS.fullmatch(source):
        return 0
    return 1 if _BY_COLUMNS.fullmatch(source) else None


def _replicated(source: str, pieces: Iterator[torch.Tensor]) -> torch.Tensor:
    """The first part's, as metaseq does; where others have drifted away it is worth a word."""
    first = next(pieces)
    for number, piece in enumerate(pieces, start=1):
        if piece.shape != first.shape:
            raise UserError(f"{source} has shape {tuple(piece.shape)} in part {number}, {tuple(first.shape)} in part 0")
        if not torch.equal(piece, first):
            apart = (piece.double() - first.double()).abs().max().item()
            logger.warning(
                "%s differs by up to %.3g between part 0, which is taken, and part %d", source, apart, number
            )
    return first


# -- flat parameters without a list ------------------------------------------------------------------------------------


def published_layout(model: UnifiedConfig, num_parts: int, flat: Sequence[str]) -> Layout:
    """What lies in the flat parameters of published files that do not say it: metaseq's modules, in their order.

    Args:
        model: the description.
        num_parts: tensor-parallel parts.
        flat: names of the flat parameters: one for the whole model, or one for each layer and one for the rest.

    Raises:
        UserError: the names are neither, or the model is one whose order is not known.
    """
    layers = sorted(int(match[1]) for match in map(_LAYER_FLAT.fullmatch, flat) if match)
    root = [name for name in flat if FLAT.fullmatch(name) and "." not in name]
    if len(root) != 1 or len(root) + len(layers) != len(flat) or layers not in ([], list(range(model.num_layers))):
        raise UserError(
            f"flat parameters {', '.join(flat[:4])}... come without shard_metadata, and are not those of a model of "
            f"{model.num_layers} layers"
        )
    if model.projection_size != model.hidden_size or model.norm_placement != "before":
        raise UserError("flat parameters without shard_metadata are only understood for OPTs that are not like 350m")
    width = model.hidden_size
    tables = [
        ("decoder.embed_tokens.weight", (model.vocab_size // num_parts, width)),
        ("decoder.embed_positions.weight", (model.max_positions + POSITION_OFFSETS["opt"], width)),
    ]
    norm = _norm("decoder.layer_norm", model) if model.final_norm else []
    contents = {index: _layer(model, num_parts, f"decoder.layers.{index}") for index in range(model.num_layers)}
    if not layers:
        return {root[0]: [*tables, *(each for index in contents for each in contents[index]), *norm]}
    by_layer = {int(match[1]): name for name in flat if (match := _LAYER_FLAT.fullmatch(name))}
    return {root[0]: [*tables, *norm]} | {by_layer[index]: contents[index] for index in layers}


def _layer(model: UnifiedConfig, num_parts: int, name: str) -> list[tuple[str, tuple[int, ...]]]:
    width, ffn = model.hidden_size, model.ffn_size // num_parts
    return [
        *_linear(f"{name}.self_attn.qkv_proj", (3 * width // num_parts, width), model),
        *_linear(f"{name}.self_attn.out_proj", (width, width // num_parts), model),
        *_norm(f"{name}.self_attn_layer_norm", model),
        *_linear(f"{name}.fc1", (ffn, width), model),
        *_linear(f"{name}.fc2", (width, ffn), model),
        *_norm(f"{name}.final_layer_norm", model),
    ]


def _linear(name: str, shape: tuple[int, int], model: UnifiedConfig) -> list[tuple[str, tuple[int, ...]]]:
    bias: list[tuple[str, tuple[int, ...]]] = [(f"{name}.bias", shape[:1])] if model.bias else []
    return [(f"{name}.weight", shape), *bias]


def _norm(name: str, model: UnifiedConfig) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"{name}.{part}", (model.hidden_size,)) for part in ("weight", "bias")] if model.norm_affine else []
