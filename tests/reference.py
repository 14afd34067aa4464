"""A plain-PyTorch trainer with fp32 masters, and a driver that takes the engine through the same steps.

The reference knows nothing of this project: an ordinary model (a bf16 or fp16 copy where asked for), gradients summed
in fp32 over micro-batches, unscaled, clipped by ``torch.nn.utils.clip_grad_norm_``, a ``torch.optim`` optimizer over the
masters, and the new masters copied back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import zero

Batch = dict[str, Tensor]
MakeOptimizer = Callable[[Mapping[str, Tensor]], torch.optim.Optimizer]
Loss = Callable[[nn.Module, Batch], Tensor]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGE_BYTES = 1 << 40


def adamw(named: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """The optimizer of most tests."""
    return torch.optim.AdamW(named.values(), lr=1e-3, weight_decay=0.1)


def output_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a Hugging Face model computes."""
    return model(**batch).loss


@dataclass
class Scale:
    """A dynamic loss scale, written anew from the rules: back off after ``hysteresis`` overflows, grow when clean."""

    value: float = 1.0
    dynamic: bool = False
    interval: int = 1000
    hysteresis: int = 2
    clean: int = 0
    bad: int = 0

    def note(self, overflow: bool) -> None:
        if not self.dynamic:
            return
        if overflow:
            self.clean, self.bad = 0, self.bad + 1
            if self.bad >= self.hysteresis:
                self.value = max(1.0, self.value / 2)
        else:
            self.clean += 1
            if self.clean >= self.interval:
                self.value, self.clean, self.bad = self.value * 2, 0, 0


@dataclass
class Recipe:
    """What is trained, and how.

    Attributes:
        build: makes the model, fp32, always the same.
        batches: micro-batches in order.
        optimizer: made from ``{name: tensor}`` of the trainable parameters (or their masters).
        loss: from model and batch.
        scheduler: made from the optimizer, stepped after every optimizer step.
        dtype: what the model computes in.
        scale, interval: first loss scale and growth interval, of fp16.
        spoil: ``{micro-batch index: (parameter, value)}``: one element of that gradient is replaced.
    """

    build: Callable[[], nn.Module]
    batches: list[Batch]
    optimizer: MakeOptimizer = adamw
    loss: Loss = output_loss
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    dtype: str = "fp32"
    accumulation: int = 1
    max_grad_norm: float | None = None
    scale: float = 65536.0
    interval: int = 1000
    seed: int = 11
    spoil: dict[int, tuple[str, float]] = field(default_factory=dict)

    def but(self, **changes: Any) -> Recipe:
        """The same with changes."""
        return replace(self, **changes)


@dataclass
class Run:
    """What a run left behind."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)
    num_skipped: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


class Reference:
    """Plain PyTorch."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.model = recipe.build()
        self.dtype = DTYPES[recipe.dtype]
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            own = self.dtype == torch.float32
            self.masters[name] = parameter if own else parameter.detach().float().clone().requires_grad_()
        cast_model(self.model, self.dtype)
        self.optimizer = recipe.optimizer(self.masters)
        self.scale = Scale(recipe.scale, True, recipe.interval) if recipe.dtype == "fp16" else Scale()
        self.norm = 0.0
        self.num_skipped = 0

    def backward(self, loss: Tensor) -> None:
        if self.recipe.accumulation > 1:
            loss = loss / self.recipe.accumulation
        (loss * self.scale.value if self.scale.dynamic else loss).backward()

    def collect(self) -> None:
        """Gradients of the model to their masters, summed in fp32."""
        if self.dtype == torch.float32:
            return
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                master = self.masters[name]
                grad = parameter.grad.float()
                master.grad = grad if master.grad is None else master.grad + grad
                parameter.grad = None

    def step(self) -> bool:
        """Returns whether the step was made."""
        gradients = [m.grad for m in self.masters.values() if m.grad is not None]
        for gradient in gradients:
            gradient.div_(self.scale.value)
        limit = self.recipe.max_grad_norm if self.recipe.max_grad_norm is not None else math.inf
        finite = all(bool(torch.isfinite(g).all()) for g in gradients)
        self.norm = float(torch.nn.utils.clip_grad_norm_(self.masters.values(), limit)) if finite else math.nan
        if finite:
            self.optimizer.step()
            self.copy_back()
        else:
            self.num_skipped += 1
        self.scale.note(not finite)
        self.optimizer.zero_grad()
        self.model.zero_grad()
        return finite

    def copy_back(self) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if parameter is not self.masters[name]:
                    parameter.copy_(self.masters[name])

    def states(self) -> dict[str, Any]:
        return states_of(self.optimizer, self.masters)


def cast_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Floating parameters and persistent buffers to a dtype, as ``from_pretrained(dtype=...)`` has it."""
    if dtype == torch.float32:
        return
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to(dtype)


def states_of(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """Copies of an optimizer's states by parameter name."""
    names = {id(tensor): name for name, tensor in named.items()}
    return {names[id(p)]: copy.deepcopy(state) for p, state in optimizer.state.items() if state}


def boundaries(num_batches: int, accumulation: int) -> list[bool]:
    """Whether a step is made after each micro-batch: accelerate's rule, the loader's last one always steps."""
    return [(i + 1) % accumulation == 0 or i == num_batches - 1 for i in range(num_batches)]


def run_plain(recipe: Recipe) -> Run:
    """The reference over all micro-batches."""
    reference, run = Reference(recipe), Run()
    scheduler = recipe.scheduler(reference.optimizer) if recipe.scheduler else None
    torch.manual_seed(recipe.seed)
    for index, (batch, acts) in enumerate(
        zip(recipe.batches, boundaries(len(recipe.batches), recipe.accumulation), strict=True)
    ):
        loss = recipe.loss(reference.model, batch)
        reference.backward(loss)
        if index in recipe.spoil:
            spoil(reference.parameters, *recipe.spoil[index])
        reference.collect()
        run.losses.append(loss.item())
        if acts:
            reference.step()
            run.norms.append(reference.norm)
            run.scales.append(reference.scale.value)
            if scheduler is not None:
                scheduler.step()
    run.weights = {name: value.clone() for name, value in reference.model.state_dict().items()}
    run.states, run.num_skipped = reference.states(), reference.num_skipped
    run.extra["masters"] = {name: m.detach().clone() for name, m in reference.masters.items()}
    return run


def spoil(parameters: Mapping[str, Tensor], name: str, value: float) -> None:
    """Replaces one element of a parameter's gradient, as a user's code can."""
    parameters[name].grad.view(-1)[3] = value  # type: ignore[union-attr]


def config_of(recipe: Recipe, capacity_bytes: int | None, policy: str = "auto", **changes: Any) -> dict[str, Any]:
    """An engine config of a recipe; ``changes`` are keys of ``[memory]``, or whole tables."""
    tables = ("device", "optimizer", "precision", "train")
    memory = {key: value for key, value in changes.items() if key not in tables}
    device = {"type": "cpu"} if capacity_bytes is None else {"type": "simulated", "memory": capacity_bytes}
    precision = {"dtype": recipe.dtype}
    if recipe.dtype == "fp16":
        precision |= {"initial_scale": recipe.scale, "growth_interval": recipe.interval}
    train = {"gradient_accumulation_steps": recipe.accumulation, "max_grad_norm": recipe.max_grad_norm}
    return {
        "device": device | changes.get("device", {}),
        "memory": {"policy": policy, **memory},
        "precision": precision | changes.get("precision", {}),
        "optimizer": {"kernel": "torch"} | changes.get("optimizer", {}),
        "train": train | changes.get("train", {}),
    }


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_engine(recipe: Recipe, capacity_bytes: int | None = None, policy: str = "auto", **changes: Any) -> Any:
    """An engine around the recipe's model; without a capacity, on the host."""
    model = recipe.build()
    config = config_of(recipe, capacity_bytes, policy, **changes)
    return zero.initialize(model, recipe.optimizer(trainable(model)), config=config)[0]


def run_engine(recipe: Recipe, capacity_bytes: int | None = None, policy: str = "auto", **changes: Any) -> Run:
    """The engine over all micro-batches, its books checked after every backward and every step."""
    model = recipe.build()
    optimizer = recipe.optimizer(trainable(model))
    scheduler = recipe.scheduler(optimizer) if recipe.scheduler else None
    engine, loader, _, scheduler = zero.initialize(
        model,
        optimizer,
        train_dataloader=recipe.batches,
        lr_scheduler=scheduler,
        config=config_of(recipe, capacity_bytes, policy, **changes),
    )
    run = Run()
    torch.manual_seed(recipe.seed)
    for index, batch in enumerate(loader):
        engine.zero_grad()
        loss = recipe.loss(engine.module, batch) if recipe.loss is not output_loss else engine(**batch).loss
        engine.backward(loss)
        if index in recipe.spoil:
            spoil(trainable(engine.module), *recipe.spoil[index])
        engine.check_integrity()
        acts = engine.is_boundary
        engine.step()
        engine.check_integrity()
        run.losses.append(loss.item())
        if acts:
            run.norms.append(engine.grad_norm)
            run.scales.append(engine.loss_scale)
            if scheduler is not None:
                scheduler.step()
    finish(engine, run)
    return run


def finish(engine: Any, run: Run) -> Run:
    """Reads everything a test compares, then closes the engine."""
    run.weights = dict(engine.module.state_dict())
    run.num_skipped = engine.num_skipped_steps
    run.extra |= {"report": engine.memory_report(), "plan": engine.plan, "trace": engine.manager.trace}
    if engine.optimizer is not None:
        run.states = states_of(engine.optimizer, dict(engine.module.named_parameters()))
    engine.close()
    return run


def differences(got: Run, want: Run, states: bool = True) -> list[str]:
    """Names of everything that is not equal bit for bit; empty when the runs agree."""
    found = [] if got.losses == want.losses else [f"losses {got.losses} != {want.losses}"]
    found += [] if _same_floats(got.norms, want.norms) else [f"norms {got.norms} != {want.norms}"]
    found += [] if got.scales == want.scales else [f"scales {got.scales} != {want.scales}"]
    found += [] if got.num_skipped == want.num_skipped else [f"skipped {got.num_skipped} != {want.num_skipped}"]
    found += _differing_tensors(got.weights, want.weights, "weight")
    if states:
        found += (
            [] if got.states.keys() == want.states.keys() else [f"states of {got.states.keys() ^ want.states.keys()}"]
        )
        for name in got.states.keys() & want.states.keys():
            found += _differing_tensors(got.states[name], want.states[name], f"state of {name}:")
    return found


def _same_floats(got: Iterable[float], want: Iterable[float]) -> bool:
    return [None if math.isnan(x) or math.isinf(x) else x for x in got] == [
        None if math.isnan(x) or math.isinf(x) else x for x in want
    ]


def _differing_tensors(got: Mapping[str, Any], want: Mapping[str, Any], what: str) -> list[str]:
    if got.keys() != want.keys():
        return [f"{what} keys {sorted(got.keys() ^ want.keys())}"]
    return [f"{what} {key}" for key in want if not _equal(got[key], want[key])]


def _equal(got: Any, want: Any) -> bool:
    if isinstance(want, Tensor):
        return isinstance(got, Tensor) and got.dtype == want.dtype and torch.equal(got, want)
    return bool(got == want)


def assert_same(got: Run, want: Run, states: bool = True) -> None:
    """Bit for bit: losses, norms, loss scales, skipped steps, weights and optimizer states."""
    assert differences(got, want, states) == []


def least_capacity(recipe: Recipe) -> int:
    """The smallest device on which the recipe's largest micro-batch runs, everything offloaded."""
    from gemini.policy import least_capacity_bytes

    largest = max(recipe.batches, key=lambda batch: max(t.numel() for t in batch.values()))
    engine = make_engine(recipe, LARGE_BYTES, "cpu")
    torch.manual_seed(recipe.seed)
    engine.backward(recipe.loss(engine.module, largest))
    least_bytes = least_capacity_bytes(engine.facts, engine.manager.trace)
    engine.close()
    return least_bytes
