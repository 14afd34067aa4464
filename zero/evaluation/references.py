"""Published numbers of the OPT sizes, to be shown beside a result.

They are data for comparison, not tests: prompts, precision and libraries differ, and a model fine-tuned by now has the
same shape as the published one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PYTHIA = "EleutherAI/pythia, evals/opt (lm-eval, zero shot)"
GPTQ = "Frantar et al. 2022 (GPTQ), table of OPT in fp16, WikiText-2 in windows of 2048"
OPT = "Zhang et al. 2022 (OPT), table 2, unsupervised, normalised to GPT-2's tokens"

_SHAPES = {
    "OPT-125M": (12, 12, 768),
    "OPT-350M": (24, 16, 1024),
    "OPT-1.3B": (24, 32, 2048),
    "OPT-2.7B": (32, 32, 2560),
    "OPT-6.7B": (32, 32, 4096),
    "OPT-13B": (40, 40, 5120),
    "OPT-30B": (48, 56, 7168),
    "OPT-66B": (64, 72, 9216),
    "OPT-175B": (96, 96, 12288),
}
"""Layers, heads and hidden size."""

_MEASURED = tuple(_SHAPES)[:8]
"""The sizes that lm-eval was published for: all but 175B."""

_ZERO_SHOT: dict[tuple[str, str], tuple[float, ...]] = {
    ("lambada_openai", "acc"): (37.9, 45.2, 57.9, 63.6, 67.7, 68.6, 71.5, 73.9),
    ("lambada_openai", "perplexity"): (26.0, 16.4, 6.6, 5.1, 4.3, 4.0, 3.6, 3.3),
    ("piqa", "acc"): (63.0, 64.4, 71.7, 73.9, 76.3, 76.0, 77.6, 78.8),
    ("winogrande", "acc"): (50.3, 52.3, 59.7, 61.0, 65.3, 65.2, 68.2, 68.7),
    ("arc_easy", "acc"): (43.5, 44.0, 57.0, 60.8, 65.6, 67.1, 70.0, 71.7),
    ("arc_challenge", "acc"): (18.9, 20.7, 23.1, 26.8, 30.5, 32.9, 34.6, 37.2),
    ("arc_challenge", "acc_norm"): (22.8, 23.9, 29.4, 31.2, 34.7, 35.8, 38.0, 40.1),
    ("sciq", "acc"): (75.1, 74.8, 84.5, 85.8, 90.1, 90.8, 91.1, 92.6),
}
"""Accuracy in percent, perplexity as it is; by lm-eval's names of task and metric."""

_WIKITEXT2 = (27.65, 22.00, 14.63, 12.47, 10.86, 10.13, 9.56, 9.34, 8.34)

_DIALOGUE = {
    "ConvAI2": (10.8, 0.185),
    "Wizard of Wikipedia": (13.3, 0.152),
    "Empathetic Dialogues": (10.3, 0.149),
    "Blended Skill Talk": (12.1, 0.162),
    "Wizard of Internet": (12.0, 0.147),
}
"""Perplexity and unigram F1 of OPT-175B."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A published number.

    Attributes:
        model: It is of.
        what: Data set and metric.
        value: In percent where it is an accuracy.
        source: Who published it.
    """

    model: str
    what: str
    value: float
    source: str

    @property
    def text(self) -> str:
        """For a table."""
        return f"{self.value:g} ({self.model}: {self.source})"


def recognise(config: Any) -> str | None:
    """The OPT size whose shape a transformers config has, such as "OPT-6.7B"; None for anything else."""
    if getattr(config, "model_type", None) != "opt" or getattr(config, "ffn_dim", 0) != 4 * config.hidden_size:
        return None
    if not 50265 <= config.vocab_size <= 50304 or config.do_layer_norm_before == (config.hidden_size == 1024):
        return None
    shape = (config.num_hidden_layers, config.num_attention_heads, config.hidden_size)
    return next((name for name, known in _SHAPES.items() if known == shape), None)


def of_wikitext2(model: str | None) -> Reference | None:
    """Perplexity per token on WikiText-2's test text."""
    if model is None:
        return None
    return Reference(model, "WikiText-2 test, perplexity", _WIKITEXT2[tuple(_SHAPES).index(model)], GPTQ)


def of_task(model: str | None, task: str, metric: str, num_shots: int) -> Reference | None:
    """One of lm-eval's tasks, zero shot; None where nothing was published."""
    values = _ZERO_SHOT.get((task, metric))
    if values is None or num_shots != 0 or model not in _MEASURED:
        return None
    return Reference(model, f"{task}, {metric}", values[_MEASURED.index(model)], PYTHIA)


def of_dialogue(model: str | None) -> list[Reference]:
    """Perplexities and F1 of the paper's dialogue sets, which are known of 175B alone.

    Shown for every OPT size, as what the largest reaches.
    """
    if model is None:
        return []
    found = []
    for name, (perplexity, f1) in _DIALOGUE.items():
        found.append(Reference("OPT-175B", f"{name}, perplexity", perplexity, OPT))
        found.append(Reference("OPT-175B", f"{name}, unigram F1", f1, OPT))
    return found
