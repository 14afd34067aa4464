"""What a model is worth: perplexity, tasks, dialogue, and what was published of models of its size.

- ``scoring``: log-likelihoods of tokens, in batches, through the engine.
- ``perplexity``: of text, in windows that overlap as far as wanted.
- ``dialogue``: perplexity and unigram F1 of answers in conversations.
- ``tasks`` and ``harness``: lm-eval's tasks, for who has the extra ``eval``.
- ``references``: published numbers of the OPT sizes.
"""

from __future__ import annotations

from zero.evaluation.dialogue import DialogueResult, evaluate_dialogues, read_dialogues, unigram_f1
from zero.evaluation.perplexity import PerplexityResult, text_perplexity
from zero.evaluation.scoring import Scorer, Sequence

__all__ = [
    "DialogueResult",
    "PerplexityResult",
    "Scorer",
    "Sequence",
    "evaluate_dialogues",
    "read_dialogues",
    "text_perplexity",
    "unigram_f1",
]
