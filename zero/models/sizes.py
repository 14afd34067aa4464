"""The published OPT sizes as data: shapes, exact parameter counts, bytes, names, reference numbers.

Source of the shapes: Zhang et al. 2022, "OPT: Open Pre-trained Transformer Language Models", table 1; the other fields
are those of the models' ``config.json`` on the Hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zero.config.words import nearest
from zero.errors import UserError

VOCAB_SIZE = 50272
"""Rows of the token table; the tokenizer's own tokens are 50265, the rest pads to a multiple of 8."""
MAX_POSITIONS = 2048
"""Most tokens that any of the models reads at once."""
_FP16_BYTES = 2


@dataclass(frozen=True)
class OPTSize:
    """One published model.

    Attributes:
        name: such as ``opt-125m``.
        num_layers: transformer layers.
        num_heads: attention heads of a layer.
        hidden_size: width between layers, elements.
        parameter_numel: parameters, the token table counted once although it is the output layer, too.
        num_metaseq_parts: tensor-parallel parts of the published metaseq files.
        projection_size: width of the token table; None: ``hidden_size``.
        norms_first: layers normalise what they read (all but 350m), and a norm follows the last one; else they
            normalise what they wrote, and none follows.
    """

    name: str
    num_layers: int
    num_heads: int
    hidden_size: int
    parameter_numel: int
    num_metaseq_parts: int
    projection_size: int | None = None
    norms_first: bool = True

    @property
    def hub_name(self) -> str | None:
        """Name on the Hugging Face Hub; None for 175b, which is not there."""
        return None if self.name == "opt-175b" else f"facebook/{self.name}"

    @property
    def fp16_bytes(self) -> int:
        """Of all parameters in fp16."""
        return self.parameter_numel * _FP16_BYTES

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token over all layers, in fp16."""
        return 2 * self.num_layers * self.hidden_size * _FP16_BYTES

    def config(self, **changes: Any) -> Any:
        """A new transformers ``OPTConfig``.

        Args:
            changes: fields that differ from the published ones.
        """
        from transformers import OPTConfig

        fields: dict[str, Any] = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "ffn_dim": 4 * self.hidden_size,
            "max_position_embeddings": MAX_POSITIONS,
            "do_layer_norm_before": self.norms_first,
            "word_embed_proj_dim": self.projection_size or self.hidden_size,
            "num_attention_heads": self.num_heads,
            "dropout": 0.1,
            "attention_dropout": 0.0,
            "activation_function": "relu",
            "init_std": 0.02,
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 2,
        }
        return OPTConfig(**(fields | changes))


OPT_SIZES: dict[str, OPTSize] = {
    size.name: size
    for size in (
        OPTSize("opt-125m", 12, 12, 768, 125_239_296, 2),
        OPTSize("opt-350m", 24, 16, 1024, 331_196_416, 1, projection_size=512, norms_first=False),
        OPTSize("opt-1.3b", 24, 32, 2048, 1_315_758_080, 2),
        OPTSize("opt-2.7b", 32, 32, 2560, 2_651_596_800, 4),
        OPTSize("opt-6.7b", 32, 32, 4096, 6_658_473_984, 2),
        OPTSize("opt-13b", 40, 40, 5120, 12_853_473_280, 2),
        OPTSize("opt-30b", 48, 56, 7168, 29_974_540_288, 2),
        OPTSize("opt-66b", 64, 72, 9216, 65_719_701_504, 8),
        OPTSize("opt-175b", 96, 96, 12288, 174_604_468_224, 8),
    )
}
"""By name, smallest first."""

WIKITEXT2_PERPLEXITY: dict[str, float] = {
    "opt-125m": 27.65,
    "opt-350m": 22.00,
    "opt-1.3b": 14.63,
    "opt-2.7b": 12.47,
    "opt-6.7b": 10.86,
    "opt-13b": 10.13,
    "opt-30b": 9.56,
    "opt-66b": 9.34,
    "opt-175b": 8.34,
}
"""Perplexity on the test part of WikiText-2 in fp16. Source: Frantar et al. 2023, GPTQ, table 3."""


def find_size(name: str) -> OPTSize | None:
    """The published size of this name, however it is written ("opt-125m", "OPT-125M", "facebook/opt-125m").

    Returns:
        None where the name is of no OPT, such as a folder's or another model's.
    """
    return OPT_SIZES.get(name.lower().removeprefix("facebook/"))


def opt_size(name: str) -> OPTSize:
    """As :func:`find_size`, where it must be one.

    Raises:
        UserError: there is no such size; says which there are.
    """
    found = find_size(name)
    if found is None:
        close = nearest(name.lower().removeprefix("facebook/"), OPT_SIZES)
        meant = f"; did you mean {close!r}?" if close else ""
        raise UserError(f"there is no OPT {name!r}{meant} Published are {', '.join(OPT_SIZES)}")
    return found
