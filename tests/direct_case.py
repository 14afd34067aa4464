"""One training loop twice, with plain PyTorch and managed: what a user's own code does must come out the same."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode

import zero

PLACED: dict[str, dict[str, Any]] = {
    "cpu": {"policy": "cpu"},
    "cuda": {"policy": "cuda"},
    "cut": {"policy": "static", "resident_parameters": 0.333, "resident_optimizer": 0.5},
    "auto": {"policy": "auto"},
}
# Under ``auto`` some of Net's parameters stay on the device, fewer of its optimizer states, and one chunk is cut.
CAPACITY_BYTES = {"auto": 20 << 10}
ROOMY_BYTES = 1 << 26

each_placement = pytest.mark.parametrize("placed", PLACED)


def named(*cases: Callable[..., object]) -> list[Any]:
    """Functions or classes as pytest parameters."""
    return [pytest.param(case, id=case.__name__) for case in cases]


Build = Callable[[], nn.Module]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer | None]


class Net(nn.Module):
    """Residual blocks in a list between layers that stand alone."""

    def __init__(self, width: int = 16, num_blocks: int = 2) -> None:
        super().__init__()
        self.emb = nn.Linear(8, width)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(num_blocks)]
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def inputs(index: int = 0, num_rows: int = 5) -> Tensor:
    """Batch number ``index``, always the same."""
    return torch.randn(num_rows, 8, generator=torch.Generator().manual_seed(100 + index))


def mean_square(output: Tensor) -> Tensor:
    """A loss without targets."""
    return output.float().square().mean()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Over what is trainable, with a large step: an update that is lost shows at once."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def frozen(model: nn.Module) -> None:
    """In place of an optimizer: nothing is trained."""
    model.requires_grad_(False)


class Play:
    """What a loop acts on, and what it notes for the comparison.

    Attributes:
        engine: None in plain PyTorch.
        log: values that the loop noted, in order.
        weights, states: at the end of the run.
    """

    def __init__(self, model: nn.Module, optimizer: Any, engine: Any = None) -> None:
        self.model: Any = model
        self.optimizer = optimizer
        self.engine = engine
        self.log: list[Any] = []
        self.weights: dict[str, Tensor] = {}
        self.states: dict[Any, dict[str, Any]] = {}

    def note(self, *values: Any) -> None:
        """Remembers values as they are now, off the device: in a hook a copy of a tensor would count against it."""
        self.log += [value.detach().tolist() if isinstance(value, Tensor) else value for value in values]

    def loss(self, index: int = 0) -> Tensor:
        """A forward over one batch."""
        return mean_square(self.model(inputs(index)))

    def finish_step(self, loss: Tensor) -> None:
        """Backward and update; the books must balance after each."""
        loss.backward()
        self.note(loss)
        self.check()
        self.optimizer.step()
        self.check()

    def train(self, num_steps: int = 2, first: int = 0) -> None:
        """Ordinary steps."""
        for index in range(first, first + num_steps):
            self.optimizer.zero_grad()
            self.finish_step(self.loss(index))

    def eval(self, index: int = 0) -> Tensor:
        """An output without gradients."""
        with torch.no_grad():
            return self.model(inputs(index))

    def gathered(self) -> contextlib.AbstractContextManager[Any]:
        """``engine.gathered_parameters()``; in plain PyTorch, the model as it is."""
        return self.engine.gathered_parameters() if self.engine else contextlib.nullcontext(self.model)

    def check(self) -> None:
        """Raises if the manager's books do not balance, or the device held more than there is."""
        if self.engine is not None:
            self.engine.check_integrity()
            report = self.engine.memory_report()
            assert report.device_peak_bytes <= report.device_capacity_bytes

    def finish(self) -> None:
        """Takes down what the run left."""
        self.check()
        if self.optimizer is not None:
            self.states = copy.deepcopy(self.optimizer.state_dict()["state"])
        self.weights = {name: value.clone() for name, value in self.model.state_dict().items()}


Loop = Callable[[Play], None]


def _built(build: Build, make_optimizer: MakeOptimizer) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    torch.manual_seed(0)
    model = build()
    optimizer = make_optimizer(model)
    torch.manual_seed(1)
    return model, optimizer


def config_of(placed: str, capacity_bytes: int | None = None, **tables: Any) -> dict[str, Any]:
    """An engine config of one of the placements; ``tables`` are further tables of the config."""
    memory = capacity_bytes or CAPACITY_BYTES.get(placed, ROOMY_BYTES)
    return {
        "device": {"type": "simulated", "memory": memory},
        "memory": PLACED[placed],
        "optimizer": {"kernel": "torch"},
        **tables,
    }


def _leave_modes() -> None:
    """Modes of torch that a failed test left on: they must not make the tests after it fail."""
    while _get_current_dispatch_mode() is not None:
        _pop_mode()
    while torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()


@contextlib.contextmanager
def managed(
    placed: str,
    build: Build = Net,
    make_optimizer: MakeOptimizer = adamw,
    closes_to: tuple[type, ...] = (nn.Parameter,),
    **config: Any,
) -> Iterator[Play]:
    """An engine, closed at the end; after a failure without a word, so that the failure is seen.

    Args:
        closes_to: classes of the parameters that are left.
    """
    model, optimizer = _built(build, make_optimizer)
    engine, *_ = zero.initialize(model, optimizer, config=config_of(placed, **config))
    try:
        yield Play(model, optimizer, engine)
    except BaseException:
        with contextlib.suppress(Exception):
            engine.close()
        _leave_modes()
        raise
    engine.close()
    assert all(type(parameter) in closes_to for parameter in model.parameters())


def run_plain(loop: Loop, build: Build = Net, make_optimizer: MakeOptimizer = adamw) -> Play:
    """The loop without an engine."""
    play = Play(*_built(build, make_optimizer))
    loop(play)
    play.finish()
    return play


def assert_same(got: Play, want: Play) -> None:
    """Bit for bit: what the loop noted, final weights, optimizer states."""
    assert len(got.log) == len(want.log)
    differing = [i for i, (mine, theirs) in enumerate(zip(got.log, want.log, strict=True)) if not equal(mine, theirs)]
    assert not differing, f"note {differing[0]}: {got.log[differing[0]]} != {want.log[differing[0]]}"
    assert got.weights.keys() == want.weights.keys()
    assert [name for name in want.weights if not equal(got.weights[name], want.weights[name])] == []
    assert got.states.keys() == want.states.keys()
    for number, state in want.states.items():
        assert state.keys() == got.states[number].keys()
        assert [key for key in state if not equal(got.states[number][key], state[key])] == []


def equal(mine: Any, theirs: Any) -> bool:
    """Bit for bit; a NaN is equal to nothing."""
    if isinstance(theirs, Tensor):
        return isinstance(mine, Tensor) and mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    return bool(mine == theirs)


def assert_as_plain(
    loop: Loop, placed: str, build: Build = Net, make_optimizer: MakeOptimizer = adamw, **config: Any
) -> None:
    """The loop comes out of an engine as out of plain PyTorch, and closing the engine leaves the same weights."""
    want = run_plain(loop, build, make_optimizer)
    with managed(placed, build, make_optimizer, **config) as got:
        loop(got)
        got.finish()
    assert_same(got, want)
    left = dict(got.model.named_parameters())
    assert [name for name, value in want.model.named_parameters() if not equal(left[name].data, value.data)] == []
