"""What a model is worth: perplexity, tasks, dialogue, and what was published of models of its size.

- ``scoring``: log-likelihoods of tokens, in batches, through the engine.
- ``writing``: answers to prompts, through :class:`zero.generation.Generator`.
- ``shares``: both divided over ranks.
- ``perplexity``: of text, in windows that overlap as far as wanted.
- ``dialogue``: perplexity and unigram F1 of answers in conversations.
- ``tasks`` and ``harness``: lm-eval's tasks, for who has the extra ``eval``.
- ``references``: published numbers of the OPT sizes.
"""

from __future__ import annotations

from zero.evaluation.dialogue import (
    DialogueResult,
    evaluate_dialogues,
    prepare_dialogues,
    read_dialogues,
    unigram_f1,
)
from zero.evaluation.perplexity import PerplexityResult, text_perplexity, text_windows
from zero.evaluation.scoring import BatchLimits, Scorer, Sequence
from zero.evaluation.writing import Prompt, Writer

__all__ = [
    "BatchLimits",
    "DialogueResult",
    "PerplexityResult",
    "Prompt",
    "Scorer",
    "Sequence",
    "Writer",
    "evaluate_dialogues",
    "prepare_dialogues",
    "read_dialogues",
    "text_perplexity",
    "text_windows",
    "unigram_f1",
]
