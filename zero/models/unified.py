"""One description of OPT and of GPT-2, to and from the configs of both.

The two differ less than their classes do. What a class cannot express is refused by name instead of being dropped, so
a description, and a model converted by it, never means something else on the other side.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from zero.config.words import nearest
from zero.errors import UserError
from zero.models.unified_fields import CARRIED, GPT2_FIELDS, GPT2_FIXED, OPT_FIELDS, shared_defaults

OPT, GPT2 = "opt", "gpt2"
KINDS = (OPT, GPT2)
"""The ``model_type`` of the two classes."""
ARCHITECTURES = {OPT: "OPTForCausalLM", GPT2: "GPT2LMHeadModel"}
POSITION_OFFSETS = {OPT: 2, GPT2: 0}
"""Rows of the position table that lie before position 0; OPT reads the second of them for padding."""
NORM_EPS = 1e-5
"""What OPT's class adds to a variance; it cannot be told otherwise."""


@dataclass(frozen=True)
class UnifiedConfig:
    """A decoder-only transformer with learned positions, as OPT and GPT-2 are.

    Attributes:
        vocab_size: rows of the token table.
        max_positions: most tokens read at once, without the rows of ``position_offset``.
        position_offset: rows of the position table before position 0.
        num_layers: transformer layers.
        num_heads: attention heads of a layer.
        hidden_size: width between layers, elements.
        ffn_size: width inside of the feed-forward part, elements.
        projection_size: width of the token table; layers from and to it where it is not ``hidden_size``.
        norm_placement: "before" attention and feed-forward part (pre-norm) or "after" them (post-norm).
        final_norm: a norm after the last layer.
        norm_affine: norms have weights and biases.
        norm_eps: added to a norm's variance.
        bias: the linear layers have biases.
        tied_head: the output layer's weight is the token table.
        activation: of the feed-forward part, by transformers' name.
        scale_by_head_size: attention scores are divided by the square root of a head's width. OPT divides the query
            before the product, GPT-2 the product: equal but for rounding.
        scale_by_layer: they are also divided by the number of the layer, from 1.
        upcast_attention: scores are computed in fp32 where attention is eager.
        dropout: of what attention and feed-forward part add, a share, as are those below.
        embedding_dropout: of the embeddings' sum.
        attention_dropout: of attention's weights.
        activation_dropout: inside of the feed-forward part.
        layerdrop: of whole layers.
        init_std: standard deviation of new weights.
        pad_token_id: None where there is none, as with the two below.
        bos_token_id: begins a text.
        eos_token_id: ends a text.
        extra: fields of a transformers config that say nothing about the model, carried as they are.
    """

    vocab_size: int
    max_positions: int
    position_offset: int
    num_layers: int
    num_heads: int
    hidden_size: int
    ffn_size: int
    projection_size: int
    norm_placement: str
    final_norm: bool
    norm_affine: bool
    norm_eps: float
    bias: bool
    tied_head: bool
    activation: str
    scale_by_head_size: bool
    scale_by_layer: bool
    upcast_attention: bool
    dropout: float
    embedding_dropout: float
    attention_dropout: float
    activation_dropout: float
    layerdrop: float
    init_std: float
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks types and what must fit together.

        Raises:
            UserError: names the field.
        """
        for name, kind in _TYPES.items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), kind))
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        for token in ends:
            _checked("eos_token_id", token, int | None)
        if self.norm_placement not in ("before", "after"):
            raise UserError(f'norm_placement is {self.norm_placement!r}; allowed are "before" and "after"')
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise UserError(f"hidden_size {self.hidden_size} cannot be divided among {self.num_heads} heads")

    # -- to and from plain data ----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UnifiedConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            UserError: a field is unknown, missing or of a wrong type; names it.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in names:
                close = nearest(name, names)
                meant = f"; did you mean {close!r}?" if close else ""
                raise UserError(f"{name!r} is no field of the description{meant}")
        missing = sorted(names - set(values) - {"extra"})
        if missing:
            raise UserError(f"the description lacks {', '.join(missing)}")
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Writes the description as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> UnifiedConfig:
        """Reads what :meth:`save` wrote.

        Raises:
            UserError: the file cannot be read, or is no description.
        """
        return cls.from_dict(read_json_object(Path(path)))

    def changed(self, changes: dict[str, Any]) -> UnifiedConfig:
        """A copy with other values for fields that the weights do not depend on.

        Raises:
            UserError: there is no such field, or it belongs to the weights.
        """
        for name in changes:
            if name not in _CHANGEABLE:
                raise UserError(f"{name!r} cannot be changed here; allowed are {', '.join(_CHANGEABLE)}")
        return dataclasses.replace(self, **changes)

    # -- to and from transformers' configs -----------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Any) -> UnifiedConfig:
        """The description of a model by its transformers config.

        Args:
            config: an ``OPTConfig`` or a ``GPT2Config``.

        Raises:
            UserError: it is another model's, or has a field that is not known here.
        """
        kind = getattr(config, "model_type", None)
        if kind not in KINDS:
            raise UserError(f"the config is of model_type {kind!r}; only {' and '.join(KINDS)} are described here")
        values = config.to_dict()
        known = OPT_FIELDS if kind == OPT else GPT2_FIELDS
        shared = {ours: values.pop(theirs) for ours, theirs in known.items()}
        _check_architecture(values.pop("architectures"), kind)
        del values["model_type"], values["_name_or_path"]  # where it came from is not what it is
        own = _own_of_opt(values) if kind == OPT else _own_of_gpt2(values, shared["hidden_size"])
        return cls(**shared, **own, position_offset=POSITION_OFFSETS[kind], extra=_extra(values))

    def to_config(self, kind: str) -> Any:
        """The transformers config of one of the two classes.

        Args:
            kind: "opt" or "gpt2".

        Returns:
            The config, without ``architectures``: which class holds the weights is for their folder to say.

        Raises:
            UserError: the class cannot express this model; names each field and says why.
        """
        problems = self.problems(kind)
        if problems:
            lines = "\n".join(f"  - {problem}" for problem in problems)
            raise UserError(f"{ARCHITECTURES[kind]} cannot express this model:\n{lines}")
        from transformers import GPT2Config, OPTConfig

        fields = {theirs: getattr(self, ours) for ours, theirs in (OPT_FIELDS if kind == OPT else GPT2_FIELDS).items()}
        fields |= self.extra
        if kind == OPT:
            before = self.norm_placement == "before"
            return OPTConfig(
                **fields, do_layer_norm_before=before, _remove_final_layer_norm=before and not self.final_norm
            )
        inner = None if self.ffn_size == 4 * self.hidden_size else self.ffn_size
        return GPT2Config(**fields, n_inner=inner)

    def problems(self, kind: str) -> list[str]:
        """What one of the two classes cannot express of this model, a line for each field."""
        if kind not in KINDS:
            raise UserError(f"there is no kind {kind!r}; allowed are {' and '.join(KINDS)}")
        return _opt_problems(self) if kind == OPT else _gpt2_problems(self)


_TYPES: dict[str, Any] = {k: v for k, v in get_type_hints(UnifiedConfig).items() if k not in ("eos_token_id", "extra")}
_CHANGEABLE = tuple(
    name
    for name in _TYPES
    if "dropout" in name or "token_id" in name or name in ("layerdrop", "init_std", "upcast_attention")
)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not the JSON it should be ({error})") from error
    if not isinstance(parsed, dict):
        raise UserError(f"{path} holds a JSON {type(parsed).__name__}; an object is needed")
    return parsed


def _checked(name: str, value: Any, kind: Any) -> Any:
    """A value of a field's type; whole numbers are taken for fractions."""
    if kind is float and type(value) is int:
        return float(value)
    allowed = (int, type(None)) if kind == int | None else (kind,)
    if type(value) not in allowed:
        raise UserError(f"{name} is {value!r}; it must be {' or '.join(each.__name__ for each in allowed)}")
    if kind is int and value < 0:
        raise UserError(f"{name} is {value}; it cannot be negative")
    if kind is float and not 0 <= value < float("inf"):
        raise UserError(f"{name} is {value}; it must be a number from 0 on")
    return value


# -- reading configs ---------------------------------------------------------------------------------------------------


def _check_architecture(given: Any, kind: str) -> None:
    """A folder's ``architectures`` may be absent, the bare model or the one with the output layer."""
    allowed = {ARCHITECTURES[kind], "OPTModel" if kind == OPT else "GPT2Model"}
    if given and (len(given) != 1 or given[0] not in allowed):
        raise UserError(f"architectures is {given}; only {ARCHITECTURES[kind]} can be converted")


def _own_of_opt(values: dict[str, Any]) -> dict[str, Any]:
    """Fields that OPT's config has its own way to say, or cannot say at all; takes them out of ``values``."""
    before = values.pop("do_layer_norm_before")
    removed = values.pop("_remove_final_layer_norm")
    return {
        "norm_placement": "before" if before else "after",
        "final_norm": before and not removed,
        "norm_eps": NORM_EPS,
        "scale_by_head_size": True,
        "scale_by_layer": False,
        "upcast_attention": False,
        "embedding_dropout": 0.0,
        # The class never reads it, but the published configs have it.
        "activation_dropout": values.get("activation_dropout", 0.0),
    }


def _own_of_gpt2(values: dict[str, Any], hidden_size: int) -> dict[str, Any]:
    """Fields that GPT-2's config has its own way to say, or cannot say at all; takes them out of ``values``."""
    for name, needed in GPT2_FIXED.items():
        if values.pop(name) != needed:
            raise UserError(f"{name} is not {needed!r}: only GPT-2 as a plain language model can be described")
    inner = values.pop("n_inner")
    return {
        "ffn_size": 4 * hidden_size if inner is None else inner,
        "projection_size": hidden_size,
        "norm_placement": "before",
        "final_norm": True,
        "norm_affine": True,
        "bias": True,
        "activation_dropout": values.get("activation_dropout", 0.0),
        "layerdrop": values.get("layerdrop", 0.0),
    }


def _extra(values: dict[str, Any]) -> dict[str, Any]:
    """Of the fields that are left, those that are carried.

    Raises:
        UserError: one is not known, so nobody can say whether it may be left out.
    """
    defaults, carried = shared_defaults(), {}
    for name, value in values.items():
        if name in defaults:
            if value != defaults[name]:
                carried[name] = value
        elif name in CARRIED:
            carried[name] = value
        else:
            raise UserError(
                f"config field {name!r} ({value!r}) is not known: nobody can say what the other class would need for it. "
                "Remove it from config.json if it does not matter"
            )
    return carried


# -- what the classes cannot express -----------------------------------------------------------------------------------


def _opt_problems(model: UnifiedConfig) -> list[str]:
    wanted = {
        "norm_eps": (NORM_EPS, "OPT's norms have no other"),
        "scale_by_head_size": (True, "OPT always scales the query (GPT-2: scale_attn_weights)"),
        "scale_by_layer": (False, "OPT does not scale by layer (GPT-2: scale_attn_by_inverse_layer_idx)"),
        "upcast_attention": (
            False,
            "OPT does not upcast scores (GPT-2: reorder_and_upcast_attn); only rounding differs",
        ),
        "embedding_dropout": (0.0, "OPT has no dropout there (GPT-2: embd_pdrop); it matters for training only"),
        "activation_dropout": (0.0, "OPT's class ignores it; it matters for training only"),
    }
    return _differences(model, wanted)


def _gpt2_problems(model: UnifiedConfig) -> list[str]:
    wanted = {
        "norm_placement": ("before", "GPT-2 is pre-norm, as every OPT but 350m (do_layer_norm_before)"),
        "final_norm": (True, "GPT-2 always has one"),
        "projection_size": (model.hidden_size, "GPT-2's token table is as wide as its layers (word_embed_proj_dim)"),
        "norm_affine": (True, "GPT-2's norms always have weights (layer_norm_elementwise_affine)"),
        "bias": (True, "GPT-2's linear layers always have biases (enable_bias)"),
        "activation_dropout": (0.0, "GPT-2 has no dropout there; it matters for training only"),
        "layerdrop": (0.0, "GPT-2 drops no layers; it matters for training only"),
    }
    return _differences(model, wanted)


def _differences(model: UnifiedConfig, wanted: dict[str, tuple[Any, str]]) -> list[str]:
    problems = []
    for name, (needed, reason) in wanted.items():
        value = getattr(model, name)
        if value != needed:
            change = f"; set {name} to {needed!r} to convert without it" if name in _CHANGEABLE else ""
            problems.append(f"{name} is {value!r}, {needed!r} is possible: {reason}{change}")
    return problems
