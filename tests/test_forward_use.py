"""Modules that write parameters in their forward, or find them other than by attribute, train as in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.direct_case import Build, Net, Play, assert_as_plain, each_placement, named


class MaxNorm(nn.Module):
    """A stock embedding whose forward renormalises its own weight in place."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8, max_norm=1.0, padding_idx=0)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.table((x.abs() * 10).long().clamp(max=19)[:, :4])
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class Renormalised(Net):
    """Writes its head's weight before it is used."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = self.head.weight
            weight.div_(weight.norm(dim=1, keepdim=True))
        return super().forward(x)


class ClampedByHook(Net):
    """As many a recipe for weight clipping has it."""

    def __init__(self) -> None:
        super().__init__()
        self.head.register_forward_pre_hook(self._clamp)

    @staticmethod
    def _clamp(module: nn.Module, args: object) -> None:
        del args
        with torch.no_grad():
            module.weight.clamp_(-0.1, 0.1)


class Teacher(Net):
    """A frozen average of the embedding, moved on in each forward, as MoCo and BYOL do."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(8, 16).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher.weight.mul_(0.9).add_(self.emb.weight, alpha=0.1)
            target = self.teacher(x)
        return super().forward(x) + target.mean()


class InList(Net):
    """Keeps weights in a plain list, where no module finds them."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [block[0].weight for block in self.blocks]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.emb(x)
        for weight in self.kept:
            hidden = hidden + hidden @ weight
        return self.head(self.norm(hidden))


class WalksOverItself(Net):
    """A penalty in the model's own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + sum(p.abs().mean() for n, p in self.named_parameters() if "weight" in n)


class Functional(Net):
    """Calls a child with that child's own parameters, by hand."""

    def forward(self, x: Tensor) -> Tensor:
        again = torch.func.functional_call(self.head, dict(self.head.named_parameters()), (self.norm(self.emb(x)),))
        return super().forward(x) + again


@pytest.mark.parametrize(
    "build", named(MaxNorm, Renormalised, ClampedByHook, Teacher, InList, WalksOverItself, Functional)
)
@each_placement
def test_a_forward_that_writes_or_finds_parameters_its_own_way(build: Build, placed: str) -> None:
    def train(play: Play) -> None:
        play.train(2)
        play.note(play.eval(1))
        play.train(2, first=2)

    assert_as_plain(train, placed, build)
