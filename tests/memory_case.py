"""Chunks and a manager on the simulated device without any model: used by the memory manager's tests."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gemini.arena import HostArena
from gemini.chunk import Chunk
from gemini.exchange import ALONE
from gemini.layout import ChunkLayout, ParameterSpec, UnitSpec, build_layout
from gemini.manager import Manager
from gemini.plan import ChunkFacts, chunk_facts
from gemini.segment import Placement
from gemini.simulated import SimulatedDevice, StreamOrder
from gemini.state import TensorState
from gemini.store import Store
from gemini.tensor import ChunkTensor
from gemini.trace import Moment, Trace
from gemini.transfer import Transfer

ROOMY_BYTES = 1 << 30
ADAM_BYTES = 8


@dataclass
class House:
    """Everything below a training engine."""

    device: SimulatedDevice
    arena: HostArena
    store: Store
    transfer: Transfer
    layouts: list[ChunkLayout]
    chunks: list[Chunk]
    manager: Manager
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    """Each parameter's values as they were given, in fp32."""

    @property
    def tensors(self) -> list[ChunkTensor]:
        """All chunk tensors in order."""
        return [tensor for chunk in self.chunks for tensor in chunk.tensors]

    @property
    def facts(self) -> list[ChunkFacts]:
        """What a policy is told of the chunks, with Adam's states and gradients in the values' dtype."""
        return [chunk_facts(layout, ALONE.shard(layout), ADAM_BYTES, layout.dtype.itemsize) for layout in self.layouts]


def spec(name: str, *shape: int, dtype: torch.dtype = torch.float32, trainable: bool = True) -> ParameterSpec:
    """A contiguous parameter."""
    size = torch.Size(shape)
    return ParameterSpec(name, size, torch.empty(size, device="meta").stride(), dtype, trainable)


def build(
    units: list[list[ParameterSpec]],
    capacity_bytes: int = ROOMY_BYTES,
    order: StreamOrder = StreamOrder.PROCRASTINATING,
    seed: int = 0,
    max_chunk_bytes: int = 1 << 20,
    host_bytes: int | None = None,
    poison: bool = True,
) -> House:
    """A house whose parameters hold random values."""
    device = SimulatedDevice(capacity_bytes, order, seed, poison)
    arena = HostArena(device, budget_bytes=host_bytes)
    store, transfer = Store(device, arena), Transfer(device)
    layouts = build_layout([UnitSpec(f"unit{i}", tuple(specs)) for i, specs in enumerate(units)], max_chunk_bytes)
    generator = torch.Generator().manual_seed(seed)
    originals: dict[str, torch.Tensor] = {}
    chunks = []
    for layout in layouts:
        parameters: list[torch.Tensor] = []
        for entry in layout.entries:
            values = torch.empty(0).set_(torch.randn(entry.spec.numel, generator=generator).untyped_storage(), 0,
                                         entry.spec.shape, entry.spec.stride)  # fmt: skip
            if not entry.spec.dtype.is_floating_point:
                values = values.mul_(9).to(entry.spec.dtype)
            originals[entry.spec.name] = values.clone()
            parameters.append(torch.nn.Parameter(values, requires_grad=False))
        chunks.append(Chunk(layout, parameters, store, transfer, keep_master=layout.trainable))
    return House(device, arena, store, transfer, layouts, chunks, Manager(store, transfer, chunks), originals)


def equal_chunks(num_chunks: int, numel: int = 8, **options: object) -> House:
    """One chunk per unit, all of one number of fp32 elements."""
    return build([[spec(f"p{i}", numel)] for i in range(num_chunks)], **options)  # type: ignore[arg-type]


def gradient_like(tensor: ChunkTensor, seed: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A gradient of whole numbers: exact in any dtype, their sums exact in fp32, but too long for any narrower one."""
    generator = torch.Generator().manual_seed(seed)
    shape = tensor.entry.spec.shape
    whole = torch.randint(-4, 5, shape, generator=generator) * 512 ** torch.randint(0, 2, shape, generator=generator)
    return whole.to(dtype or tensor.entry.spec.dtype)


def close(house: House) -> None:
    """Ends what the device changed outside itself."""
    house.device.close()


def readable(tensor: ChunkTensor) -> bool:
    """Whether the parameter's values may be computed with."""
    return tensor.state not in (TensorState.FREE, TensorState.READY_FOR_REDUCE)


def trace_of(reads: list[list[int]], non_model_bytes: int = 0, num_forward: int | None = None) -> Trace:
    """A trace by what each moment reads; backward is the second half of it, or what comes after ``num_forward``."""
    border = len(reads) // 2 if num_forward is None else num_forward
    moments = [
        Moment(f"m{i}", "forward" if i < border else "backward", list(read), non_model_peak_bytes=non_model_bytes)
        for i, read in enumerate(reads)
    ]
    return Trace(moments, batch_shapes=[(1,)])


def placement(house: House, index: int, resident: int, companions: int) -> Placement:
    """A placement of one chunk, cut to its number of elements."""
    numel = house.chunks[index].numel
    return Placement(min(resident, numel), min(companions, numel))
