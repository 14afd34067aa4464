"""What the engine cannot do it refuses at once, naming the parameter or module and what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zero
from tests.direct_case import Net, Play, adamw, config_of, each_placement, inputs, managed, mean_square
from zero.errors import UserError

Act = Callable[[Play], Any]


class SparseTable(nn.Module):
    """Its gradient has no elements where no row was looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8, sparse=True)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def _on_meta() -> nn.Module:
    return Net().to("meta")


def _lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))


def _in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return Net()


def _compiled() -> nn.Module:
    net = Net()
    net.blocks[1] = torch.compile(net.blocks[1], backend="eager")
    return net


def _compiled_in_place() -> nn.Module:
    net = Net()
    net.blocks[1].compile(backend="eager")
    return net


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (SparseTable, "table.*sparse"),
        (_on_meta, r"emb\.weight.*meta"),
        (_lazy, r"1\.weight.*lazy"),
        (_in_inference_mode, r"emb\.weight.*inference"),
        (_compiled, r"blocks\.1.*compile"),
        (_compiled_in_place, r"blocks\.1.*compile"),
    ],
)
def test_a_model_that_cannot_be_managed_is_refused_and_left_alone(build: Callable[[], nn.Module], says: str) -> None:
    model = build()
    before = {name: type(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(UserError, match=says):
        zero.initialize(model, config=config_of("cpu"))
    assert {name: type(parameter) for name, parameter in model.named_parameters()} == before


def test_a_frozen_sparse_table_needs_no_gradient() -> None:
    model = SparseTable()
    model.table.requires_grad_(False)
    engine, *_ = zero.initialize(model, adamw(model), config=config_of("cpu"))
    engine.backward(mean_square(engine(torch.arange(5))))
    engine.step()
    engine.close()


# -- losses ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [None, 1.0, {"loss": 1.0}])
def test_a_loss_that_is_no_tensor_is_refused(loss: Any) -> None:
    with managed("cpu") as play:
        with pytest.raises(UserError, match=r"loss is .*labels"):
            play.engine.backward(loss)
        play.train(2)


# -- after close() ---------------------------------------------------------------------------------------------------------

CLOSED: dict[str, Act] = {
    "forward": lambda play: play.engine(inputs()),
    "backward": lambda play: play.engine.backward(torch.ones((), requires_grad=True)),
    "step": lambda play: play.engine.step(),
    "zero_grad": lambda play: play.engine.zero_grad(),
    "check_integrity": lambda play: play.engine.check_integrity(),
    "gathered": lambda play: play.engine.gathered_parameters().__enter__(),
    "save_pretrained": lambda play: play.engine.save_pretrained(Path("nowhere")),
    "save_checkpoint": lambda play: play.engine.save_checkpoint(Path("nowhere")),
    "optimizer step": lambda play: play.engine.optimizer.step(),
    "optimizer state_dict": lambda play: play.engine.optimizer.state_dict(),
    "optimizer state": lambda play: list(play.engine.optimizer.state.values()),
}


@pytest.mark.parametrize("act", CLOSED.values(), ids=CLOSED)
@each_placement
def test_a_closed_engine_says_so(act: Act, placed: str) -> None:
    with managed(placed) as play:
        play.train(2)
        play.engine.close()
        with pytest.raises(UserError, match="closed"):
            act(play)


@each_placement
def test_the_users_own_optimizer_goes_on_after_close(placed: str) -> None:
    with managed(placed) as play:
        play.train(2)
        play.engine.close()
        play.engine = None
        assert len(play.optimizer.state_dict()["state"]) == len(list(play.model.parameters()))
        before = play.model.head.weight.detach().clone()
        play.train(1)
        assert not torch.equal(play.model.head.weight, before)
