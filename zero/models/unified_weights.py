"""Weights of OPT as GPT-2's and back, tensor by tensor, strict about every name and shape.

Names are those of transformers. Between the two, queries, keys and values are one matrix or three, GPT-2's matrices
are transposed, and OPT's position table begins with two rows that no token reads (the second is read for padding).
Those two have no place in GPT-2's class, so they travel beside it, under :data:`UNREAD_ROWS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch

from zero.errors import UserError
from zero.models.unified import ARCHITECTURES, GPT2, OPT, POSITION_OFFSETS, UnifiedConfig

UNREAD_ROWS = "unread_position_rows"
"""Name of OPT's position rows before position 0 where they travel beside a GPT-2, if they are not zeros."""

_HEAD = "lm_head.weight"
_BASES = {OPT: ("model.decoder.", "decoder."), GPT2: ("transformer.", "")}
"""What names begin with: as the class with the output layer saves them, and as the bare model does."""
_TABLES = {OPT: "model.decoder.embed_tokens.weight", GPT2: "transformer.wte.weight"}
_POSITIONS = {OPT: "model.decoder.embed_positions.weight", GPT2: "transformer.wpe.weight"}
_OLD_MASKS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)$")
"""Constants that GPT-2's class once kept in its files."""


class Weights(Protocol):
    """Tensors by name, such as :class:`zero.weights_folder.ShardedWeights`."""

    def names(self) -> list[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor."""

    def read(self, name: str) -> torch.Tensor:
        """A tensor's values."""


class WeightsInMemory:
    """A state dict as :class:`Weights`."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor."""
        return self._tensors[name].shape

    def read(self, name: str) -> torch.Tensor:
        """The tensor itself, not a copy."""
        return self._tensors[name].detach()


def weight_shapes(model: UnifiedConfig, kind: str) -> dict[str, torch.Size]:
    """Names and shapes of the weights of a model in one of the two classes, as a folder of it holds them.

    Args:
        model: what the class must be able to express.
        kind: "opt" or "gpt2".
    """
    shapes = _opt_shapes(model) if kind == OPT else _gpt2_shapes(model)
    if not model.tied_head:
        shapes[_HEAD] = (model.vocab_size, model.projection_size)
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def _opt_shapes(model: UnifiedConfig) -> dict[str, tuple[int, ...]]:
    width, ffn, projection = model.hidden_size, model.ffn_size, model.projection_size
    base = _BASES[OPT][0]
    shapes: dict[str, tuple[int, ...]] = {
        f"{base}embed_tokens.weight": (model.vocab_size, projection),
        f"{base}embed_positions.weight": (model.max_positions + POSITION_OFFSETS[OPT], width),
    }
    if projection != width:
        shapes |= {f"{base}project_in.weight": (width, projection), f"{base}project_out.weight": (projection, width)}
    norms = [f"{base}final_layer_norm"] if model.final_norm else []
    linears: dict[str, tuple[int, int]] = {}
    for index in range(model.num_layers):
        layer = f"{base}layers.{index}"
        linears |= {f"{layer}.self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        linears |= {f"{layer}.fc1": (ffn, width), f"{layer}.fc2": (width, ffn)}
        norms += [f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm"]
    for name, (outputs, inputs) in linears.items():
        shapes[f"{name}.weight"] = (outputs, inputs)
        shapes |= {f"{name}.bias": (outputs,)} if model.bias else {}
    if model.norm_affine:
        shapes |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    return shapes


def _gpt2_shapes(model: UnifiedConfig) -> dict[str, tuple[int, ...]]:
    width, ffn = model.hidden_size, model.ffn_size
    base = _BASES[GPT2][0]
    shapes: dict[str, tuple[int, ...]] = {
        f"{base}wte.weight": (model.vocab_size, width),
        f"{base}wpe.weight": (model.max_positions, width),
    }
    norms = [f"{base}ln_f"]
    for index in range(model.num_layers):
        layer = f"{base}h.{index}"
        linears = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
        linears |= {"mlp.c_fc": (width, ffn), "mlp.c_proj": (ffn, width)}
        for name, (inputs, outputs) in linears.items():
            shapes[f"{layer}.{name}.weight"] = (inputs, outputs)
            shapes[f"{layer}.{name}.bias"] = (outputs,)
        norms += [f"{layer}.ln_1", f"{layer}.ln_2"]
    shapes |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    return shapes


# -- checking ----------------------------------------------------------------------------------------------------------


def match_weights(model: UnifiedConfig, kind: str, weights: Weights) -> dict[str, str]:
    """Where each weight of a model lies, every tensor there being accounted for.

    Args:
        model: the description.
        kind: the class that the weights are of.
        weights: what is there.

    Returns:
        Stored names by the names of :func:`weight_shapes`.

    Raises:
        UserError: a weight is missing, unknown, there twice or of another shape; names it.
    """
    wanted = weight_shapes(model, kind)
    found: dict[str, str] = {}
    unknown = []
    for stored in weights.names():
        if kind == GPT2 and _OLD_MASKS.match(stored):
            continue
        name = _full_name(stored, kind)
        if name in found:
            raise UserError(f"the weights hold {found[name]!r} and {stored!r}, which are the same one")
        if name in wanted or (name == _HEAD and model.tied_head):
            found[name] = stored
        else:
            unknown.append(stored)
    missing = [name for name in wanted if name not in found]
    if missing or unknown:
        raise UserError(_mismatch(kind, missing, unknown))
    _check_shapes(wanted, found, weights)
    if model.tied_head and _HEAD in found:
        _check_tied(weights, found[_HEAD], found.pop(_HEAD), found[_TABLES[kind]])
    return found


def _full_name(stored: str, kind: str) -> str:
    full, bare = _BASES[kind]
    if stored.startswith(full) or stored == _HEAD:
        return stored
    return full + stored.removeprefix(bare) if stored.startswith(bare) else stored


def _check_shapes(wanted: Mapping[str, torch.Size], found: Mapping[str, str], weights: Weights) -> None:
    for name, shape in wanted.items():
        given = weights.shape(found[name])
        if given != shape:
            raise UserError(f"weight {found[name]!r} has shape {tuple(given)}; the config makes it {tuple(shape)}")


def _check_tied(weights: Weights, head: str, stored: str, table: str) -> None:
    """A file may hold the tied output layer, too, but then it must be the token table."""
    if weights.shape(stored) != weights.shape(table) or not torch.equal(weights.read(stored), weights.read(table)):
        raise UserError(
            f"the config ties {head!r} to {table!r}, but the weights hold two that differ: set tie_word_embeddings to "
            "false in config.json if the model was trained so"
        )


def _mismatch(kind: str, missing: Sequence[str], unknown: Sequence[str]) -> str:
    """What to say of weights that are not those of the config."""
    norm = [f"{_BASES[OPT][0]}final_layer_norm.{part}" for part in ("weight", "bias")]
    if kind == OPT and list(missing) == norm and not unknown:
        return (
            "the weights have no final norm (decoder.final_layer_norm), which the config asks for. transformers before "
            "4.20.1 left it out of OPT by mistake. If these are a published OPT from then, they compute wrong numbers: "
            "download it again. If a model was fine-tuned without the norm, it needs to stay without: set "
            '"_remove_final_layer_norm": true in config.json'
        )
    if kind == OPT and not missing and set(unknown) <= set(norm) | {name.removeprefix("model.") for name in norm}:
        return (
            f"the weights have a final norm ({unknown[0]}), but the config takes it away: set _remove_final_layer_norm to "
            "false in config.json, or do_layer_norm_before to true if this is no 350m"
        )
    lines = [f"  - {what}: {_listed(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
    return f"the weights are not those of {ARCHITECTURES[kind]} with this config:\n" + "\n".join(lines)


def _listed(names: Sequence[str], limit: int = 6) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


# -- converting --------------------------------------------------------------------------------------------------------

_LAYER_PARTS = {
    "self_attn_layer_norm": "ln_1",
    "self_attn.out_proj": "attn.c_proj",
    "final_layer_norm": "ln_2",
    "fc1": "mlp.c_fc",
    "fc2": "mlp.c_proj",
}
"""OPT's names of a layer's parts and GPT-2's; the query, key and value matrices are apart."""
_FUSED = "attn.c_attn"
_FUSED_ORDER = ("q", "k", "v")


def to_gpt2_weights(model: UnifiedConfig, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of an OPT as those of a GPT-2, one at a time.

    Everything is checked before the first is given.

    Args:
        model: description of the OPT.
        weights: of the OPT.

    Yields:
        Names and values. The last is :data:`UNREAD_ROWS`, where OPT's two unread position rows are not zeros.

    Raises:
        UserError: GPT-2 cannot express the model, or a weight is missing, unknown or of another shape.
    """
    model.to_config(GPT2)
    found = match_weights(model, OPT, weights)
    return _as_gpt2(model, weights, found)


def to_opt_weights(
    model: UnifiedConfig, weights: Weights, unread_rows: torch.Tensor | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a GPT-2 as those of an OPT, one at a time.

    Everything is checked before the first is given.

    Args:
        model: description of the GPT-2.
        weights: of the GPT-2.
        unread_rows: what :func:`to_gpt2_weights` gave under :data:`UNREAD_ROWS`; None: zeros.

    Raises:
        UserError: OPT cannot express the model, or a weight is missing, unknown or of another shape.
    """
    model.to_config(OPT)
    found = match_weights(model, GPT2, weights)
    wanted = (POSITION_OFFSETS[OPT], model.hidden_size)
    if unread_rows is not None and tuple(unread_rows.shape) != wanted:
        raise UserError(f"{UNREAD_ROWS} has shape {tuple(unread_rows.shape)}; the config makes it {wanted}")
    return _as_opt(model, weights, found, unread_rows)


def _as_gpt2(model: UnifiedConfig, weights: Weights, found: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    opt, gpt2 = _BASES[OPT][0], _BASES[GPT2][0]
    yield _TABLES[GPT2], weights.read(found[_TABLES[OPT]])
    positions = weights.read(found[_POSITIONS[OPT]])
    offset = POSITION_OFFSETS[OPT]
    yield _POSITIONS[GPT2], positions[offset:].clone()
    unread = positions[:offset].clone()
    del positions
    for index in range(model.num_layers):
        source, target = f"{opt}layers.{index}", f"{gpt2}h.{index}"
        for part in ("weight", "bias"):
            names = [found[f"{source}.self_attn.{name}_proj.{part}"] for name in _FUSED_ORDER]
            yield f"{target}.{_FUSED}.{part}", _joined(weights, names)
            for theirs, ours in _LAYER_PARTS.items():
                value = weights.read(found[f"{source}.{theirs}.{part}"])
                yield f"{target}.{ours}.{part}", value.t().contiguous() if value.dim() == 2 else value
    for part in ("weight", "bias"):
        yield f"{gpt2}ln_f.{part}", weights.read(found[f"{opt}final_layer_norm.{part}"])
    if not model.tied_head:
        yield _HEAD, weights.read(found[_HEAD])
    if unread.view(torch.uint8).any():
        yield UNREAD_ROWS, unread


def _as_opt(
    model: UnifiedConfig, weights: Weights, found: Mapping[str, str], unread_rows: torch.Tensor | None
) -> Iterator[tuple[str, torch.Tensor]]:
    opt, gpt2 = _BASES[OPT][0], _BASES[GPT2][0]
    yield _TABLES[OPT], weights.read(found[_TABLES[GPT2]])
    positions = weights.read(found[_POSITIONS[GPT2]])
    if unread_rows is None:
        unread_rows = positions.new_zeros(POSITION_OFFSETS[OPT], model.hidden_size)
    yield _POSITIONS[OPT], torch.cat([_same_dtype(unread_rows, positions, UNREAD_ROWS), positions])
    del positions
    for index in range(model.num_layers):
        source, target = f"{gpt2}h.{index}", f"{opt}layers.{index}"
        for part in ("weight", "bias"):
            fused = weights.read(found[f"{source}.{_FUSED}.{part}"])
            for name, value in zip(_FUSED_ORDER, fused.chunk(3, dim=-1), strict=True):
                yield f"{target}.self_attn.{name}_proj.{part}", value.t().clone(memory_format=torch.contiguous_format)
            del fused
            for theirs, ours in _LAYER_PARTS.items():
                value = weights.read(found[f"{source}.{ours}.{part}"])
                yield f"{target}.{theirs}.{part}", value.t().contiguous() if value.dim() == 2 else value
    for part in ("weight", "bias"):
        yield f"{opt}final_layer_norm.{part}", weights.read(found[f"{gpt2}ln_f.{part}"])
    if not model.tied_head:
        yield _HEAD, weights.read(found[_HEAD])


def _joined(weights: Weights, names: Sequence[str]) -> torch.Tensor:
    """Query, key and value side by side, transposed as GPT-2 has its matrices."""
    first, *others = (weights.read(name) for name in names)
    values = [first, *(_same_dtype(other, first, name) for name, other in zip(names[1:], others, strict=True))]
    return torch.cat([value.t() for value in values], dim=-1)


def _same_dtype(value: torch.Tensor, like: torch.Tensor, name: str) -> torch.Tensor:
    """A tensor that is joined with another, which must not change its values."""
    if value.dtype != like.dtype:
        raise UserError(
            f"{name!r} is {value.dtype}, what it is joined with {like.dtype}: save the weights in one dtype"
        )
    return value
