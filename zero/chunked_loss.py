"""The cross entropy of a linear head, piece by piece: the logits of a batch are never there as a whole.

Forward goes through rows: of each it keeps log(sum(exp(logits))), one number. Backward goes through the vocabulary and
computes the logits of one slice of it again: the slice's part of the weight's gradient is then complete, rounded once,
as in plain PyTorch. That costs one more product with the head's weight, a few percent of a large model's step.

The arithmetic is that of ``cross_entropy(chain(linear(hidden)))`` up to rounding; where the logits of a batch are few
enough, it is that to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class Pointwise:
    """An elementwise operation on logits, and the dtype of what comes out."""

    operation: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype


Chain = tuple[Pointwise, ...]


@dataclass(frozen=True)
class Head:
    """A linear layer over a vocabulary.

    Args:
        module: the layer.
        most_logits: elements of logits that may be there at a time.
        begins_backward: called when backward comes to it: no module's output tells, since it has none.
    """

    module: nn.Linear
    most_logits: int
    begins_backward: Callable[[], None]

    @property
    def num_tokens(self) -> int:
        """Of the vocabulary."""
        return self.module.out_features

    def logits(self, hidden: torch.Tensor, chain: Chain) -> torch.Tensor:
        """All logits of these rows."""
        return _apply(chain, functional.linear(hidden, self.module.weight, self.module.bias))


def _apply(chain: Chain, logits: torch.Tensor) -> torch.Tensor:
    for step in chain:
        logits = step.operation(logits)
    return logits


def cross_entropy(
    head: Head, hidden: torch.Tensor, chain: Chain, target: torch.Tensor, ignore_index: int, mean: bool
) -> torch.Tensor | None:
    """``torch.nn.functional.cross_entropy`` of the head's logits.

    Args:
        head: of a model.
        hidden: [rows, hidden size].
        chain: what is done to the logits first.
        target: [rows], int64.
        ignore_index: target of rows that do not count.
        mean: over the rows that count; else their sum.

    Returns:
        The loss, a scalar in the dtype of the logits; None where they are so few that the plain way is the better one.
    """
    if len(hidden) * head.num_tokens <= head.most_logits:
        return None
    dtype = chain[-1].dtype if chain else hidden.dtype
    total: torch.Tensor = _ChunkedCrossEntropy.apply(
        hidden, head.module.weight, head.module.bias, target, ignore_index, head, chain
    )
    if total.requires_grad:
        total.register_hook(lambda gradient: head.begins_backward())
    if mean:
        total = total / (target != ignore_index).sum()
    return total.to(dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the rows' losses in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        ignore_index: int,
        head: Head,
        chain: Chain,
    ) -> torch.Tensor:
        """Goes through rows."""
        counts = target != ignore_index
        wanted = torch.where(counts, target, 0)
        log_sums = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        chosen = torch.empty_like(log_sums)
        num_rows = max(1, head.most_logits // len(weight))
        for start in range(0, len(hidden), num_rows):
            rows = slice(start, start + num_rows)
            logits = _apply(chain, functional.linear(hidden[rows], weight, bias)).float()
            log_sums[rows] = torch.logsumexp(logits, dim=-1)
            chosen[rows] = logits.gather(1, wanted[rows, None])[:, 0]
            del logits
        ctx.head, ctx.chain = head, chain
        ctx.save_for_backward(hidden, weight, bias, wanted, counts, log_sums)
        return torch.where(counts, log_sums - chosen, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Goes through the vocabulary."""
        hidden, weight, bias, wanted, counts, log_sums = ctx.saved_tensors
        per_row = torch.where(counts, gradient, 0.0)[:, None]
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        for_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if need_hidden else None
        for_weight = torch.empty_like(weight) if need_weight else None
        for_bias = torch.empty_like(bias) if need_bias else None
        num_tokens = max(1, ctx.head.most_logits // len(hidden))
        for start in range(0, len(weight), num_tokens):
            tokens = slice(start, start + num_tokens)
            part = weight[tokens]
            plain = functional.linear(hidden, part, None if bias is None else bias[tokens])
            for_logits = _gradient_of_slice(ctx.chain, plain, log_sums, wanted, start, per_row)
            if for_weight is not None:
                torch.mm(for_logits.t(), hidden, out=for_weight[tokens])
            if for_bias is not None:
                for_bias[tokens] = for_logits.sum(0)
            if for_hidden is not None:
                for_hidden += for_logits @ part
            del plain, for_logits, part
        return (for_hidden.to(hidden.dtype) if for_hidden is not None else None), for_weight, for_bias, *(None,) * 4


def _gradient_of_slice(
    chain: Chain,
    plain: torch.Tensor,
    log_sums: torch.Tensor,
    wanted: torch.Tensor,
    first_token: int,
    per_row: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the linear layer's output for the tokens from ``first_token`` on, in its dtype: [rows, tokens]."""
    with torch.enable_grad():
        plain = plain.detach().requires_grad_()
        logits = _apply(chain, plain).float()
    with torch.no_grad():
        softmax = torch.exp(logits - log_sums[:, None])
        column = wanted - first_token
        inside = (column >= 0) & (column < plain.shape[1])
        taken = torch.where(inside, 1.0, 0.0)[:, None]
        softmax.scatter_add_(1, column.clamp(0, plain.shape[1] - 1)[:, None], -taken)
        softmax *= per_row
    if logits is plain:
        return softmax
    return torch.autograd.grad(logits, plain, softmax)[0]
