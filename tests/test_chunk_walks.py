"""Random legal walks over a real chunk and over a real manager: everything stays exact and every book balances."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from memory_case import ADAM_BYTES, build, close, gradient_like, spec

from gemini.chunk import ChunkTensor
from gemini.segment import GRADIENT, MASTER, Placement
from gemini.simulated import StreamOrder
from gemini.state import Move, TensorState
from gemini.store import Kind, Tier

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
