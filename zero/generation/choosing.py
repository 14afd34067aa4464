"""The next token of each row, from the logits of a pass.

Settings of different rows never meet: each row's are a row of a tensor (temperature, top-k, top-p), or a list of its own
(tokens to penalise), and each row draws from its own generator, one number per token. So rows of any settings share a
pass; nothing is put into buckets by settings, and which rows run beside a row cannot change what it draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from zero.generation.sampling import Sampling


class Chooser(Protocol):
    """What choosing asks of a row."""

    sampling: Sampling

    @property
    def seen(self) -> set[int]:
        """Tokens of the prompt and of the text so far."""

    def draw(self) -> float:
        """A number from [0, 1) for the next token, from the row's own generator; the same until that token is taken."""


@dataclass(frozen=True)
class Chosen:
    """A token, and log-probabilities where they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@torch.no_grad()
def choose(logits: torch.Tensor, rows: Sequence[Chooser]) -> list[Chosen | None]:
    """The next token of each row; None for a row whose logits are not numbers.

    In transformers' order: penalty, temperature, top-k, top-p.

    Args:
        logits: [rows, vocabulary], of the last position.
        rows: whose they are.
    """
    raw = logits.float()
    scores = _penalised(raw, rows)
    tokens = scores.argmax(-1)
    drawing = [index for index, row in enumerate(rows) if row.sampling.draws]
    if drawing:
        tokens[drawing] = _draw(scores[drawing], [rows[index] for index in drawing])
    unusable = (raw.isnan().any(-1) | (raw == torch.inf).any(-1)).tolist()
    logprobs = _logprobs(raw, tokens, rows)
    numbers: list[int] = tokens.tolist()
    return [
        None if unusable[index] else Chosen(numbers[index], *logprobs.get(index, (None, ())))
        for index in range(len(rows))
    ]


def _penalised(scores: torch.Tensor, rows: Sequence[Chooser]) -> torch.Tensor:
    """Scores of tokens seen before, made worse for the rows that ask for it."""
    penalties = [row.sampling.repetition_penalty for row in rows]
    where: list[int] = []
    which: list[int] = []
    for index, row in enumerate(rows):
        if penalties[index] != 1.0:
            seen = sorted(token for token in row.seen if token < scores.shape[-1])
            where += [index] * len(seen)
            which += seen
    if not where:
        return scores
    pairs = torch.tensor([where, which], device=scores.device)
    by = torch.tensor(penalties, dtype=scores.dtype, device=scores.device)[pairs[0]]
    found = scores[pairs[0], pairs[1]]
    scores = scores.clone()
    scores[pairs[0], pairs[1]] = torch.where(found < 0, found * by, found / by)
    return scores


def _draw(scores: torch.Tensor, rows: Sequence[Chooser]) -> torch.Tensor:
    """One token per row by chance; [rows] numbers."""
    device = scores.device
    temperatures = torch.tensor([row.sampling.temperature for row in rows], dtype=torch.float32, device=device)
    scaled = scores / temperatures.unsqueeze(-1)
    draws = torch.tensor([row.draw() for row in rows], dtype=torch.float64, device=device)
    # Which of two ways a row takes depends on its own settings alone: sums in another order end in other last bits.
    cut = [index for index, row in enumerate(rows) if _cuts(row.sampling, scores.shape[-1])]
    whole = [index for index in range(len(rows)) if index not in set(cut)]
    tokens = torch.empty(len(rows), dtype=torch.long, device=device)
    if whole:
        tokens[whole] = _at(scaled[whole].double().softmax(-1), draws[whole])
    if cut:
        ordered, order = scaled[cut].sort(dim=-1, descending=True, stable=True)
        shares = kept_shares(ordered, [rows[index].sampling for index in cut])
        tokens[cut] = order.gather(-1, _at(shares, draws[cut]).unsqueeze(-1)).squeeze(-1)
    return tokens


def _cuts(sampling: Sampling, num_tokens: int) -> bool:
    return 0 < sampling.top_k < num_tokens or sampling.top_p < 1


def kept_shares(ordered: torch.Tensor, settings: Sequence[Sampling]) -> torch.Tensor:
    """Probabilities after top-k and top-p, 0 for what was cut; not summing up to 1.

    Args:
        ordered: [rows, vocabulary] logits, best first.
        settings: of each row.
    """
    num_tokens = ordered.shape[-1]
    ks = [sampling.top_k if 0 < sampling.top_k < num_tokens else num_tokens for sampling in settings]
    last = ordered.gather(-1, torch.tensor(ks, device=ordered.device).unsqueeze(-1) - 1)
    shares = ordered.masked_fill(ordered < last, -torch.inf).double().softmax(-1)
    most = torch.tensor([sampling.top_p for sampling in settings], dtype=torch.float64, device=ordered.device)
    before = shares.cumsum(-1) - shares
    outside = before >= most.unsqueeze(-1)
    outside[:, 0] = False
    outside &= (most < 1).unsqueeze(-1)
    return shares.masked_fill(outside, 0.0)


def _at(shares: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Where the sum of the shares passes this part of their whole."""
    sums = shares.cumsum(-1)
    found = torch.searchsorted(sums, (draws * sums[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    # Rounding may put the very last draw behind everything.
    last = (shares > 0).long().mul(torch.arange(shares.shape[-1], device=shares.device)).amax(-1)
    return torch.minimum(found, last)


def _logprobs(
    raw: torch.Tensor, tokens: torch.Tensor, rows: Sequence[Chooser]
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """Of the rows that ask for them: of the chosen token, and of the likeliest."""
    asking = [index for index, row in enumerate(rows) if row.sampling.logprobs is not None]
    if not asking:
        return {}
    values = raw[asking].log_softmax(-1)
    own = values.gather(-1, tokens[asking].unsqueeze(-1)).squeeze(-1).tolist()
    wanted = [rows[index].sampling.logprobs or 0 for index in asking]
    best, which = values.topk(min(max(wanted), values.shape[-1]), dim=-1)
    pairs = zip(which.tolist(), best.tolist(), strict=True)
    tops = [tuple(zip(ids, logs, strict=True)) for ids, logs in pairs]
    return {index: (own[place], tops[place][: wanted[place]]) for place, index in enumerate(asking)}
