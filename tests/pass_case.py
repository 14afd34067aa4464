"""Passes without a model: tells a manager what a model would do, moment by moment, and checks what it then sees."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from memory_case import ADAM_BYTES, House, gradient_like

from gemini.plan import Plan
from gemini.tensor import ChunkTensor

ALIGN_BYTES = 4


@dataclass
class Step:
    """One moment of a pass."""

    label: str
    phase: str
    reads: list[int] = field(default_factory=list)
    """Chunks, each read whole by a module of its own."""
    gradients: list[int] = field(default_factory=list)
    """Chunks whose gradients come at its end."""
    activation_bytes: int = 0
    """Made after all reads, gone at its end."""


Pass = list[Step]


@st.composite
def passes(draw: st.DrawFn, num_chunks: int, most_reads: int = 2, activations: bool = True) -> Pass:
    """A forward through some units, a backward through the same in reverse; each chunk's gradient comes at its last
    backward read, or later (a tied weight's), or never (unused)."""
    num_units = draw(st.integers(1, 5))
    chunks = st.lists(st.integers(0, num_chunks - 1), min_size=0, max_size=most_reads, unique=True)
    sizes = st.integers(0, 12).map(lambda n: n * ALIGN_BYTES * 4) if activations else st.just(0)
    reads = [draw(chunks) for _ in range(num_units)]
    forward = [Step(f"u{i}", "forward", reads[i], [], draw(sizes)) for i in range(num_units)]
    backward = [Step(f"u{i}", "backward", reads[i][::-1], [], draw(sizes)) for i in reversed(range(num_units))]
    for chunk in {chunk for read in reads for chunk in read}:
        last = max(position for position, step in enumerate(backward) if chunk in step.reads)
        place = draw(st.sampled_from([last, last, last, num_units - 1, None]))
        if place is not None:
            backward[place].gradients.append(chunk)
    return forward + backward


def fill_states(house: House) -> None:
    """Gives every trained tensor its optimizer states, which the first step of a real run makes."""
    for tensor in house.tensors:
        if tensor.chunk.layout.trainable:
            for key in ("exp_avg", "exp_avg_sq")[: ADAM_BYTES // 4]:
                tensor.chunk.write_companion(tensor, key, torch.ones(tensor.entry.spec.shape))
            tensor.chunk.deliver(tensor, torch.zeros(tensor.entry.spec.shape, dtype=tensor.entry.spec.dtype))
            tensor.has_gradient = False


class Driver:
    """Runs passes on a house and checks values, gradients and books at every turn."""

    def __init__(self, house: House, check: bool = True) -> None:
        self.house = house
        self.manager = house.manager
        self.check = check
        self.sums: dict[ChunkTensor, torch.Tensor] = {}
        self.count = 0

    def run(self, steps: Pass, training: bool = True, rows: int = 1) -> None:
        """One pass."""
        self.manager.begin_pass(training, (rows,))
        self.manager.enter("root")
        steps = steps if training else [step for step in steps if step.phase == "forward"]
        in_forward = True
        for step in steps:
            if in_forward and step.phase == "backward":
                in_forward = False
                self.manager.leave()
                self.manager.end_forward_pass()
                self.manager.begin_backward()
            (self.forward if step.phase == "forward" else self.backward)(step)
        if in_forward:
            self.manager.leave()
            self.manager.end_forward_pass()
        if training:
            self.manager.end_backward()
        self.settled()

    def forward(self, step: Step) -> None:
        """A unit's forward: a module per chunk, then activations."""
        self.manager.enter(step.label)
        self.manager.begin_moment(step.label, "forward")
        for index in step.reads:
            self.manager.enter(f"{step.label}.{index}")
            for tensor in self.house.chunks[index].tensors:
                self.manager.read(tensor)
                self.looks_right(tensor)
            self.manager.leave()
            self.settled()
        self.activations(step)
        self.manager.leave()
        self.settled()

    def backward(self, step: Step) -> None:
        """A unit's backward: saved weights are unpacked, gradients come."""
        self.manager.begin_unit_backward(step.label)
        for index in step.reads:
            for tensor in self.house.chunks[index].tensors:
                self.manager.unpack(tensor)
                self.looks_right(tensor)
            self.settled()
        self.activations(step)
        for index in step.gradients:
            for tensor in reversed(self.house.chunks[index].tensors):
                self.gradient(tensor)
        self.manager.end_unit_backward(step.label)
        self.settled()

    def gradient(self, tensor: ChunkTensor) -> None:
        """A gradient is complete."""
        if not tensor.chunk.layout.trainable:
            return
        self.count += 1
        gradient = gradient_like(tensor, self.count)
        self.manager.take_gradient(tensor, gradient)
        before = self.sums.get(tensor)
        self.sums[tensor] = gradient.float() if before is None else before + gradient.float()

    def activations(self, step: Step) -> None:
        """Non-model bytes of the moment."""
        with self.house.device.activity():
            made = torch.empty(step.activation_bytes // 4)
            self.settled()
            del made

    def looks_right(self, tensor: ChunkTensor) -> None:
        """What a computation would see now."""
        expected = self.house.originals[tensor.name].to(tensor.entry.spec.dtype)
        assert torch.equal(tensor.parameter, expected), f"{tensor!r} is not what it should be"

    def settled(self) -> None:
        """The books balance, and memory is within the capacity."""
        if self.check:
            self.manager.check_integrity()
            memory = self.house.device.memory()
            assert memory.peak_bytes <= self.house.device.capacity_bytes

    def check_sums(self) -> None:
        """Every gradient sent is the sum of what came."""
        for tensor in self.house.tensors:
            assert tensor.has_gradient == (tensor in self.sums)
            if tensor in self.sums:
                assert torch.equal(tensor.chunk.companion_of(tensor, "gradient").float(), self.sums[tensor])

    def zero_grad(self) -> None:
        """Forgets gradients."""
        for tensor in self.house.tensors:
            tensor.has_gradient = False
        self.sums.clear()

    def apply(self, plan: Plan) -> None:
        """A new plan, with fresh counters."""
        self.manager.apply(plan)
        self.manager.reset_counters()
        self.settled()
