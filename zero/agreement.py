"""What ranks must know alike before an update: which parameters have a gradient, how large it is, whether it is finite."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
import torch.distributed as dist

from gemini import gradients
from gemini.chunk import Chunk
from gemini.device import Device
from gemini.exchange import Exchange
from gemini.manager import Manager, Phase
from gemini.segment import GRADIENT
from gemini.tensor import ChunkTensor
from zero.collectives import all_gather
from zero.errors import UserError
from zero.gradient import gradient_pieces
from zero.passes import PassPlanner
from zero.precision import GradientStatistics, gradient_statistics, unscaled
from zero.sharding import RankExchange


class Agreement:
    """Of one process: there is nobody to agree with.

    Args:
        ordered: all parameters in the order of ``model.parameters()``.
    """

    def __init__(self, ordered: Sequence[ChunkTensor | torch.Tensor]) -> None:
        self._ordered = ordered
        self.is_alone = True
        self.is_first = True
        """Whether this one writes what is written once."""

    def begin(self, device: Device) -> None:
        """All have the same model, and plan for the same capacity.

        Raises:
            UserError: they have not.
        """

    def end(self) -> None:
        """The engine is closed: there is nothing to agree on any more."""

    def doing(self, what: str, step: int) -> None:
        """What this rank does from now on, and for which step: said by the others if it falls silent."""

    def meet(self, what: str) -> None:
        """Waits until all ranks have come here."""

    def settle_gradients(self, scale: float = 1.0) -> float:
        """Afterwards a parameter has a gradient on all ranks or on none.

        Args:
            scale: what this rank's gradients have been multiplied by; 1 where it had none.

        Returns:
            What all gradients have been multiplied by.
        """
        return scale

    def share_plans(self, planner: PassPlanner) -> None:
        """All ranks make their next plan from the same figures."""

    def one_writing(self, written: torch.Tensor, changed: bool) -> torch.Tensor | None:
        """New values that all ranks agree on: those of the lowest rank that has changed them; None if none has."""
        return written if changed else None

    def statistics(self, inverse_scale: float) -> GradientStatistics:
        """Of all gradients, over all ranks."""
        return gradient_statistics(self._ordered, inverse_scale)


class RankAgreement(Agreement):
    """Of one rank of many.

    Args:
        ordered: as above.
        manager: whose chunks these are.
        exchange: with the other ranks.
    """

    def __init__(self, ordered: Sequence[ChunkTensor | torch.Tensor], manager: Manager, exchange: RankExchange) -> None:
        super().__init__(ordered)
        self._manager = manager
        self._exchange = exchange
        self._world = exchange.world
        self.is_alone = False
        self.is_first = self._world.rank == 0
        self._tensors = [tensor for tensor in ordered if isinstance(tensor, ChunkTensor)]
        self._num_seen = 0
        self._differed: tuple[int, int] | None = None
        exchange.on_settle = self._settle_if_new

    def begin(self, device: Device) -> None:
        """Compares the layouts, takes the smallest capacity, and begins to serve the others."""
        self._exchange.attach(self._manager)
        layouts = [
            [[e.spec.name, *e.spec.shape, str(c.layout.dtype), c.layout.trainable] for e in c.layout.entries]
            for c in self._manager.chunks
        ]
        digest = hashlib.sha256(json.dumps(layouts).encode()).hexdigest()
        with self._world.operation("comparing models"):
            said = self._world.all_gather_object({"layout": digest, "capacity_bytes": device.capacity_bytes})
        odd = [rank for rank, word in enumerate(said) if word["layout"] != said[0]["layout"]]
        if odd:
            raise UserError(
                f"the ranks have different models: that of rank {odd[0]} differs from that of rank 0 in names, shapes, "
                "dtypes or which parameters are trained; build the same model on every rank"
            )
        device.capacity_bytes = min(word["capacity_bytes"] for word in said)

    def end(self) -> None:
        """Serves the others no more."""
        self._exchange.detach()

    def doing(self, what: str, step: int) -> None:
        """What this rank does from now on, and for which step."""
        self._world.step = step
        self._world.doing(what)

    def meet(self, what: str) -> None:
        """Waits until all ranks have come here."""
        self._exchange.meet(what)

    def _settle_if_new(self) -> None:
        """Before the user looks at a gradient between passes; all ranks must look."""
        if self._manager.phase is Phase.IDLE and self._manager.num_gradients != self._num_seen:
            self.meet("looking at gradients")
            self.settle_gradients()

    def settle_gradients(self, scale: float = 1.0) -> float:
        """What one rank has a gradient for counts on all; chunks that each rank owns whole get their mean."""
        self._num_seen = self._manager.num_gradients
        had = {tensor: tensor.has_gradient for tensor in self._tensors}
        said = torch.tensor([*had.values(), scale], dtype=torch.float64)
        with self._world.operation("agreeing on gradients"):
            dist.all_reduce(said, dist.ReduceOp.MAX, group=self._world.control)
            *flags, scale = said.tolist()
            for tensor, flag in zip(self._tensors, flags, strict=True):
                tensor.has_gradient = bool(flag)
            for chunk in self._manager.chunks:
                if chunk.layout.trainable and chunk.shard.is_whole:
                    self._average(chunk, had)
        return scale

    def _average(self, chunk: Chunk, had: dict[ChunkTensor, bool]) -> None:
        """The mean of a replicated chunk's gradients; each rank adds in the same order, so all get the same bits."""
        if not any(tensor.has_gradient for tensor in chunk.tensors):
            return
        store = self._manager.store
        first = all(GRADIENT not in segment.companions for segment in chunk.segments)
        gradients.reserve(chunk.segments, store, 0, chunk.numel, torch.float32, first)
        own = torch.zeros(chunk.numel, dtype=torch.float32)
        for tensor in chunk.tensors:
            if had[tensor]:
                own[tensor.entry.offset : tensor.entry.stop] = torch.cat([p.cpu() for p in gradient_pieces(tensor)])
        every = torch.empty(self._world.size * chunk.numel, dtype=torch.float32)
        all_gather(every, own, self._world.control)
        total = every.view(self._world.size, -1)
        mean = total[0].clone()
        for rank in range(1, self._world.size):
            mean += total[rank]
        mean /= self._world.size
        for segment in chunk.segments:
            segment.companions[GRADIENT].copy_(mean[segment.start : segment.stop])

    def share_plans(self, planner: PassPlanner) -> None:
        """Once a rank needs a new plan, or plans have come to differ: from the highest figures of all ranks."""
        with self._world.operation("agreeing on a plan"):
            asks, number = planner.needs_plan or planner.has_news, planner.plan_number
            own = torch.tensor([asks, number, -number], dtype=torch.int64)
            dist.all_reduce(own, dist.ReduceOp.MAX, group=self._world.control)
            anyone_asks, highest, lowest = int(own[0]), int(own[1]), -int(own[2])
            if not anyone_asks and (highest == lowest or (highest, lowest) == self._differed):
                return  # differing once more, they would differ again: each serves the others all the same
            self._differed = (highest, lowest)
            bases = self._world.all_gather_object(planner.basis())
        if all(basis is not None for basis in bases):
            planner.adopt(bases)

    def one_writing(self, written: torch.Tensor, changed: bool) -> torch.Tensor | None:
        """Those of the lowest rank that has changed them."""
        with self._world.operation("taking over what was written into gathered parameters"):
            mine = torch.tensor([self._world.rank if changed else self._world.size])
            dist.all_reduce(mine, dist.ReduceOp.MIN, group=self._world.control)
            author = int(mine)
            if author == self._world.size:
                return None
            agreed = written.contiguous().clone()
            dist.broadcast(agreed, author, group=self._world.control)
        return agreed

    def statistics(self, inverse_scale: float) -> GradientStatistics:
        """The norm over all ranks' parts, the same bits on every rank; the step will now use the gradients."""
        self._exchange.has_stepped = True
        squares = torch.zeros(len(self._tensors) + 1, dtype=torch.float64)
        scratch: dict[torch.device, torch.Tensor] = {}
        for position, tensor in enumerate(self._tensors):
            if not tensor.has_gradient or (tensor.chunk.shard.is_whole and self._world.rank):
                continue
            for piece in gradient_pieces(tensor):
                gradient = unscaled(piece, inverse_scale, scratch)
                norm = float(torch.linalg.vector_norm(gradient))
                squares[position] += norm**2
                # A norm can overflow where no element did: only then look at the elements.
                finite = bool(torch.isfinite(torch.tensor(norm)) or torch.isfinite(gradient).all())
                squares[-1] += not finite
        with self._world.operation("agreeing on the gradients' norm"):
            every = torch.empty(self._world.size * squares.numel(), dtype=torch.float64)
            all_gather(every, squares, self._world.control)
        total = every.view(self._world.size, -1).sum(dim=0)
        norms = total[:-1].sqrt().to(torch.float32)
        return GradientStatistics(float(torch.linalg.vector_norm(norms)), bool(total[-1] == 0))


def make_agreement(ordered: Sequence[ChunkTensor | torch.Tensor], manager: Manager, exchange: Exchange) -> Agreement:
    """The one that goes with an exchange."""
    if isinstance(exchange, RankExchange):
        return RankAgreement(ordered, manager, exchange)
    return Agreement(ordered)
