"""Random legal walks over a real chunk and over a real manager: everything stays exact and every book balances."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from memory_case import ADAM_BYTES, ROOMY_BYTES, build, close, gradient_like, spec
from pass_case import Driver, Pass, fill_states, passes

from gemini.manager import Phase
from gemini.plan import Plan, offload_all
from gemini.policy import Policy, least_capacity_bytes
from gemini.segment import GRADIENT, MASTER, Placement
from gemini.simulated import StreamOrder
from gemini.state import Move, TensorState
from gemini.store import Kind, Tier
from gemini.tensor import ChunkTensor

S = TensorState


class ChunkWalk(RuleBasedStateMachine):
    """Any legal order of calls on one chunk keeps values, masters, states and gradient sums exact.

    The model beside it is plain dictionaries: values, gradients as fp32 sums, number of holders.
    """

    @initialize(
        low=st.booleans(), order=st.sampled_from(list(StreamOrder)), seed=st.integers(0, 99), trainable=st.booleans()
    )
    def start(self, low: bool, order: StreamOrder, seed: int, trainable: bool) -> None:
        dtype = torch.bfloat16 if low else torch.float32
        specs = [spec(name, numel, dtype=dtype, trainable=trainable) for name, numel in (("a", 5), ("b", 3), ("c", 8))]
        self.house = build([specs], order=order, seed=seed)
        self.chunk = self.house.chunks[0]
        self.trainable = trainable
        self.dtype = dtype
        self.values = {t: self.house.originals[t.name].clone() for t in self.chunk.tensors}
        self.sums: dict[ChunkTensor, torch.Tensor] = {}
        self.in_slot: dict[ChunkTensor, torch.Tensor] = {}
        self.states = {}
        self.count = 0
        if trainable:
            for tensor in self.chunk.tensors:
                self.states[tensor] = torch.randn(tensor.entry.spec.shape)
                self.chunk.write_companion(tensor, "exp_avg", self.states[tensor])

    def some(self, index: int) -> ChunkTensor:
        return self.chunk.tensors[index % 3]

    def movable(self) -> bool:
        return not self.chunk.in_use

    @precondition(lambda self: not self.chunk.on_device)
    @rule()
    def fetch(self) -> None:
        self.chunk.fetch()

    @rule(index=st.integers(0, 2))
    def acquire(self, index: int) -> None:
        tensor = self.some(index)
        if tensor.state in (S.FREE, S.READY_FOR_REDUCE):
            return
        self.chunk.acquire(tensor)
        assert torch.equal(tensor.parameter, self.values[tensor].to(self.dtype))

    @rule(index=st.integers(0, 2), move=st.sampled_from([Move.LET_GO, Move.END_FORWARD, Move.END_BACKWARD]))
    def let_go(self, index: int, move: Move) -> None:
        tensor = self.some(index)
        if tensor.num_holders:
            self.chunk.let_go(tensor, move)

    @precondition(lambda self: self.trainable)
    @rule(index=st.integers(0, 2))
    def gradient(self, index: int) -> None:
        tensor = self.some(index)
        self.count += 1
        gradient = gradient_like(tensor, self.count)
        if self.chunk.takes_slots and tensor.state is not S.READY_FOR_REDUCE:
            self.chunk.take_slot(tensor, gradient)
            self.in_slot[tensor] = gradient.float()
        else:
            self.chunk.deliver(tensor, gradient)
            self.add(tensor, gradient.float())

    def add(self, tensor: ChunkTensor, gradient: torch.Tensor) -> None:
        self.sums[tensor] = self.sums[tensor] + gradient if tensor in self.sums else gradient

    def sent(self) -> None:
        for tensor, gradient in self.in_slot.items():
            self.add(tensor, gradient)
        self.in_slot.clear()

    @rule(index=st.integers(0, 2))
    def restore(self, index: int) -> None:
        tensor = self.some(index)
        if tensor.state is S.READY_FOR_REDUCE:
            self.chunk.restore(tensor)
            self.add(tensor, self.in_slot.pop(tensor))

    @precondition(lambda self: self.chunk.droppable)
    @rule()
    def reduce(self) -> None:
        self.chunk.reduce()
        self.sent()

    @precondition(lambda self: self.chunk.droppable and not self.in_slot)
    @rule()
    def release(self) -> None:
        self.chunk.release()

    @precondition(lambda self: self.movable())
    @rule(resident=st.integers(0, 16), companions=st.integers(0, 16))
    def place(self, resident: int, companions: int) -> None:
        before = self.chunk.placement
        self.chunk.place(Placement(resident, companions))
        if Placement(resident, companions) != before:
            self.sent()
        assert self.chunk.placement == Placement(resident, companions)

    @precondition(lambda self: self.movable())
    @rule(index=st.integers(0, 2), seed=st.integers(0, 99))
    def write(self, index: int, seed: int) -> None:
        tensor = self.some(index)
        if self.chunk.on_device and not self.chunk.resident:
            self.sent()
        values = torch.randn(tensor.entry.spec.shape, generator=torch.Generator().manual_seed(seed))
        self.chunk.write_values(tensor, values)
        self.values[tensor] = values

    @rule()
    def zero_grad(self) -> None:
        for tensor in self.chunk.tensors:
            tensor.has_gradient = False
        self.sums.clear()

    @invariant()
    def all_is_exact(self) -> None:
        self.chunk.check_integrity()
        self.house.store.check_integrity()
        for tensor in self.chunk.tensors:
            assert torch.equal(self.chunk.values_of(tensor), self.values[tensor].to(self.dtype))
            if self.trainable:
                assert torch.equal(self.chunk.companion_of(tensor, MASTER), self.values[tensor])
                assert torch.equal(self.chunk.companion_of(tensor, "exp_avg"), self.states[tensor])
            assert tensor.has_gradient == (tensor in self.sums)
            if tensor in self.sums:
                assert torch.equal(self.chunk.companion_of(tensor, GRADIENT).float(), self.sums[tensor])
        bytes_by = self.house.store.bytes_by
        for tier in (Tier.DEVICE, Tier.HOST):
            numel = sum(s.numel for s in self.chunk.segments if s.value_tier is tier)
            assert bytes_by[tier, Kind.PARAMETERS] == numel * self.dtype.itemsize
            trained = sum(s.numel for s in self.chunk.segments if s.companion_tier is tier) if self.trainable else 0
            assert bytes_by[tier, Kind.OPTIMIZER] == trained * ADAM_BYTES // 2
        assert bytes_by[Tier.DEVICE, Kind.GATHERED] == self.chunk.gathered_bytes

    def teardown(self) -> None:
        if hasattr(self, "house"):
            close(self.house)


ChunkWalk.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_legal_walk_is_exact = ChunkWalk.TestCase


class ManagerWalk(RuleBasedStateMachine):
    """Passes of any shape, evaluations, aborts, plans, updates and idle writes in any order, on a small device."""

    @initialize(low=st.booleans(), order=st.sampled_from(list(StreamOrder)), seed=st.integers(0, 99), data=st.data())
    def start(self, low: bool, order: StreamOrder, seed: int, data: st.DataObject) -> None:
        dtype = torch.bfloat16 if low else torch.float32
        frozen = data.draw(st.integers(0, 3))
        units = [
            [
                spec(f"{i}.a", 4, dtype=dtype, trainable=i != frozen),
                spec(f"{i}.b", 2, dtype=dtype, trainable=i != frozen),
            ]
            for i in range(4)
        ]
        self.house = build(units, order=order, seed=seed)
        fill_states(self.house)
        self.manager = self.house.manager
        self.driver = Driver(self.house)
        self.driver.apply(offload_all("test", self.house.facts))
        self.policy = Policy()

    @rule(steps=passes(4), rows=st.integers(1, 3))
    def train(self, steps: Pass, rows: int) -> None:
        self.driver.run(steps, rows=rows)

    @rule(steps=passes(4))
    def evaluate(self, steps: Pass) -> None:
        self.driver.run(steps, training=False)

    @rule(steps=passes(4), at=st.integers(0, 9))
    def abort(self, steps: Pass, at: int) -> None:
        """A pass that breaks off at some moment, inside a module."""
        part = steps[: at + 1]
        self.manager.begin_pass(True, (1,))
        self.manager.enter("root")
        for step in part:
            if step.phase == "forward":
                self.driver.forward(step)
            else:
                if self.manager.phase is Phase.FORWARD:
                    self.manager.begin_backward()
                self.driver.backward(step)
        self.manager.enter("broken")
        self.manager.read(self.house.tensors[at % 8])
        self.manager.abort_pass()
        assert not any(chunk.in_use for chunk in self.house.chunks)

    @precondition(lambda self: self.manager.trace is not None)
    @rule(extra=st.integers(0, 400))
    def replan(self, extra: int) -> None:
        """The plan of ``auto`` for a device hardly larger than needed, which the next passes may outgrow."""
        self.house.device.capacity_bytes = least_capacity_bytes(self.house.facts, self.manager.trace) + extra
        plan = self.policy.decide(self.house.facts, self.manager.trace, self.house.device.capacity_bytes)
        self.house.device.capacity_bytes = ROOMY_BYTES
        self.driver.apply(plan)

    @rule(placed=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=4, max_size=4))
    def place(self, placed: list[tuple[int, int]]) -> None:
        self.driver.apply(Plan("test", [Placement(*numels) for numels in placed]))

    @rule(index=st.integers(0, 7), value=st.integers(-9, 9))
    def write_between(self, index: int, value: int) -> None:
        tensor = self.house.tensors[index]
        self.manager.read(tensor)
        with torch.no_grad():
            tensor.parameter.fill_(float(value))
        self.house.originals[tensor.name] = torch.full(tensor.entry.spec.shape, float(value))

    @rule(index=st.integers(0, 7))
    def read_between(self, index: int) -> None:
        self.manager.read(self.house.tensors[index])
        self.driver.looks_right(self.house.tensors[index])

    @rule()
    def update(self) -> None:
        """A step of an optimizer: every trained master moves, and its values follow."""
        self.manager.release_stale()
        for tensor in self.house.tensors:
            if tensor.has_gradient:
                values = self.house.originals[tensor.name] + 0.37
                self.manager.write(tensor, values)
                self.house.originals[tensor.name] = values
        self.driver.zero_grad()

    @invariant()
    def all_is_exact(self) -> None:
        if not hasattr(self, "driver"):
            return
        self.manager.check_integrity()
        self.driver.check_sums()
        assert self.manager.phase is Phase.IDLE
        if not any(tensor.is_shown for tensor in self.house.tensors):
            for tensor in self.house.tensors:
                values = self.house.originals[tensor.name]
                assert torch.equal(tensor.chunk.values_of(tensor), values.to(tensor.entry.spec.dtype))
                if tensor.chunk.layout.trainable:
                    assert torch.equal(tensor.chunk.companion_of(tensor, MASTER), values)

    def teardown(self) -> None:
        if hasattr(self, "house"):
            close(self.house)


ManagerWalk.TestCase.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)
test_any_order_of_passes_plans_and_writes_is_exact = ManagerWalk.TestCase
