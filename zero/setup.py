"""From a config and a model to device, chunks and manager: everything that stands before the first step."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gemini.accelerator import AcceleratorDevice
from gemini.activations import Activations
from gemini.arena import HostArena
from gemini.chunk import Chunk
from gemini.device import Device, HostDevice
from gemini.disk import DiskArena
from gemini.exchange import ALONE, Exchange
from gemini.heap import give_back_free_memory
from gemini.homes import spill
from gemini.hostinfo import host_memory
from gemini.layout import ChunkLayout, ParameterSpec, UnitSpec, build_layout, is_dense
from gemini.manager import Manager
from gemini.plan import ChunkFacts, chunk_facts, host_bytes
from gemini.policy import Policy
from gemini.profile import HardwareProfile, named_profile
from gemini.schedule import Run
from gemini.segment import Placement
from gemini.simulated import SimulatedDevice, StreamOrder
from gemini.store import Store
from gemini.tensor import ChunkTensor
from gemini.transfer import Transfer
from zero.config.schema import Config
from zero.errors import UserError
from zero.gradient import ManagedParameter, manage
from zero.optim.coded import FormatCodec, align_numel, codec_of, format_of
from zero.optim.elementwise import state_bytes_per_numel
from zero.optim.formats import StateFormat
from zero.pending import Reading, is_pending, release
from zero.precision import LossScaler
from zero.probing import profile_of
from zero.units import Unit, find_units

logger = logging.getLogger("zero")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_device(config: Config) -> Device:
    """The device that ``[device]`` names.

    Raises:
        UserError: an accelerator was asked for and there is none, or it cannot be capped.
    """
    section = config.device
    kind = section.type
    if kind == "auto":
        if torch.accelerator.is_available():
            kind = "cuda"
        else:
            kind = "simulated" if section.memory is not None else "cpu"
            logger.info("no accelerator found: device.type = auto became %s", kind)
    if kind == "cpu":
        return HostDevice()
    if kind == "simulated":
        if section.memory is None:
            raise UserError('device.memory: the simulated device needs a capacity, such as "6GiB"')
        profile = None if section.profile == "auto" else named_profile(section.profile)
        order = StreamOrder(section.streams)
        return SimulatedDevice(section.memory, order, section.stream_seed, section.poison, profile)
    try:
        return AcceleratorDevice(section.memory)
    except ValueError as error:
        raise UserError(f"device.type = {section.type}: {error}") from error


def make_policy(config: Config, device: Device, exchange: Exchange = ALONE, early_bytes: int = 0) -> Policy:
    """The policy that ``[memory]`` names. On the host ``auto`` means that nothing moves: there is nowhere to go.

    Args:
        config: of the run.
        device: it uses.
        exchange: with the other ranks.
        early_bytes: host memory for what updates inside backward overwrite, if it is the same on all ranks.
    """
    return policy_for(config, device, profile_of(config, device, exchange), early_bytes)


def policy_for(config: Config, device: Device | type[Device], profile: HardwareProfile, early_bytes: int = 0) -> Policy:
    """The policy that ``[memory]`` names, for a device of some kind that need not be there.

    Args:
        config: of the run.
        device: the device, or its class.
        profile: rates.
        early_bytes: as in :func:`make_policy`.
    """
    memory = config.memory
    return Policy(
        "cuda" if memory.policy == "auto" and device.is_host else memory.policy,
        memory.resident_parameters,
        memory.resident_optimizer,
        profile,
        None if memory.prefetch == "auto" else memory.prefetch,
        Run(config.train.gradient_accumulation_steps, device.most_bytes_on_way, early_bytes=early_bytes),
        spares_memory=device.is_host,
    )


def most_logits(config: Config) -> int | None:
    """Logits of a chunked loss that may be on the device at a time; None for a loss that is not chunked.

    About 100 MB with what is computed from them, and rows enough for products at full speed.
    """
    return 1 << 23 if config.train.chunked_loss is True else None


def make_activations(config: Config, manager: Manager) -> Activations | None:
    """Where what forward saves waits for backward, if that is not the device."""
    if config.memory.activations == "device" or isinstance(manager.device, HostDevice):
        return None
    capacity_bytes = config.device.memory
    least_bytes = 1 << 20 if capacity_bytes is None else min(1 << 20, capacity_bytes // 1024)
    return Activations(manager.store, manager.transfer, least_bytes)


def make_scaler(config: Config) -> LossScaler:
    """The loss scaler that ``[precision]`` describes."""
    precision = config.precision
    return LossScaler(
        enabled=precision.dtype == "fp16",
        scale=precision.initial_scale,
        growth_factor=precision.growth_factor,
        backoff_factor=precision.backoff_factor,
        growth_interval=precision.growth_interval,
        hysteresis=precision.hysteresis,
        min_scale=precision.min_scale,
        max_scale=precision.max_scale,
    )


@dataclass(frozen=True)
class Survey:
    """What a model's chunks will be.

    Attributes:
        units: that are fetched together.
        layouts: of the chunks.
        codecs: of their masters and states.
        facts: of the chunks.
        limit_bytes: of model data on the host.
        only_infers: nothing is trained, whatever parameters say; they keep saying it.
    """

    units: list[Unit]
    layouts: list[ChunkLayout]
    codecs: list[FormatCodec | None]
    facts: list[ChunkFacts]
    limit_bytes: int
    only_infers: bool


@dataclass
class Managed:
    """A model taken over."""

    manager: Manager
    units: list[Unit]
    tensors: dict[int, ChunkTensor]
    """By ``id`` of the parameter."""
    names: dict[int, str]
    """First name of every parameter, managed or not."""
    facts: list[ChunkFacts]
    spare_host_bytes: int
    """That the host has, or may give, beyond what the model needs."""


def compute_dtype(parameter: torch.Tensor, dtype: torch.dtype, keep_fp32: bool) -> torch.dtype:
    """What dtype computations see a parameter in: integers and parameters the model wants in fp32 stay as they are."""
    if not parameter.dtype.is_floating_point or keep_fp32:
        return parameter.dtype
    # fp32 asks for no less than the model has.
    return torch.promote_types(parameter.dtype, dtype) if dtype == torch.float32 else dtype


def survey(
    model: nn.Module,
    config: Config,
    optimizer: torch.optim.Optimizer | None = None,
    exchange: Exchange = ALONE,
    only_infers: bool = False,
) -> Survey:
    """Finds a model's chunks, and touches nothing.

    Args:
        model: the user's.
        config: of the run.
        optimizer: whose states there will be.
        exchange: with the other ranks that own a part of each chunk.
        only_infers: see :class:`Survey`.

    Raises:
        UserError: a parameter cannot be managed, or states cannot be as the config wants them.
    """
    form = format_of(config, optimizer)
    units = find_units(model)
    _refuse_what_cannot_be_managed(model, units)
    specs = _unit_specs(model, units, DTYPES[config.precision.dtype], only_infers)
    layouts = build_layout(specs, config.memory.chunk, partial(align_numel, form))
    codecs = _codecs(layouts, form, config.train.seed)
    state_bytes = 0 if optimizer is None else state_bytes_per_numel(optimizer)
    facts = [
        _facts(layout, codec, exchange, config, state_bytes) for layout, codec in zip(layouts, codecs, strict=True)
    ]
    limit_bytes = _host_limit_bytes(model, config, exchange)
    if config.memory.disk is not None:
        facts = spill(facts, limit_bytes)
    return Survey(units, layouts, codecs, facts, limit_bytes, only_infers)


def take_over(
    model: nn.Module, about: Survey, config: Config, device: Device, host: HostArena, exchange: Exchange = ALONE
) -> Managed:
    """Moves every parameter of a model into chunks, one by one, so that host memory never holds two copies.

    Args:
        model: the user's.
        about: of it.
        config: of the run.
        device: where gathered copies will live.
        host: gives host memory.
        exchange: with the other ranks that own a part of each chunk.
    """
    parameters = {name: p for unit in about.units for name, p in unit.parameters}
    store, transfer = Store(device, host, DiskArena(config.memory.disk)), Transfer(device)
    with Reading() as read:

        def chunk_of(layout: ChunkLayout, fact: ChunkFacts, codec: FormatCodec | None) -> Chunk:
            own: list[torch.Tensor] = [parameters[entry.spec.name] for entry in layout.entries]
            return Chunk(layout, own, store, transfer, layout.trainable, read, exchange, fact.homes, codec)

        chunks = [chunk_of(*each) for each in zip(about.layouts, about.facts, about.codecs, strict=True)]
    release(model)
    give_back_free_memory()
    tensors = _managed_tensors(chunks)
    dtype = DTYPES[config.precision.dtype]
    _cast_empty(model, tensors, dtype, device)
    _cast_buffers(model, dtype, device)
    spare_bytes = about.limit_bytes - host_bytes(about.facts, [Placement() for _ in about.facts])
    manager = Manager(store, transfer, chunks, about.only_infers)
    manager.recorder.blocks = frozenset(unit.label for unit in about.units if unit.is_block)
    return Managed(manager, about.units, tensors, _names(parameters), about.facts, spare_bytes)


def _managed_tensors(chunks: list[Chunk]) -> dict[int, ChunkTensor]:
    """By ``id`` of the parameter, which is managed from now on."""
    tensors = {id(tensor.parameter): tensor for chunk in chunks for tensor in chunk.tensors}
    for tensor in tensors.values():
        manage(tensor.parameter, tensor)  # type: ignore[arg-type]
    return tensors


def _names(parameters: dict[str, nn.Parameter]) -> dict[int, str]:
    return {id(p): name for name, p in parameters.items()}


def _refuse_what_cannot_be_managed(model: nn.Module, units: list[Unit]) -> None:
    _refuse_managed(units)
    _refuse_compiled(model)
    _require_dense_gradients(model)


def _unit_specs(model: nn.Module, units: list[Unit], dtype: torch.dtype, only_infers: bool) -> list[UnitSpec]:
    wants_fp32 = _fp32_names(model, dtype)

    def spec(name: str, parameter: nn.Parameter) -> ParameterSpec:
        trainable = parameter.requires_grad and not only_infers
        return _spec(name, parameter, dtype, any(w in name for w in wants_fp32), trainable)

    return [UnitSpec(unit.label, tuple(spec(*named) for named in unit.parameters)) for unit in units]


def _host_limit_bytes(model: nn.Module, config: Config, exchange: Exchange) -> int:
    """Host bytes for model data of this process: the budget, or what is free once the model's own tensors are gone."""
    held_bytes = sum(p.nbytes for p in model.parameters() if p.device.type == "cpu" and not is_pending(p))
    free_bytes = host_memory().available_bytes // exchange.num_local + held_bytes
    return free_bytes if config.memory.host is None else min(free_bytes, config.memory.host // exchange.num_local)


def _codecs(layouts: list[ChunkLayout], form: StateFormat, seed: int) -> list[FormatCodec | None]:
    first = [0, *accumulate(layout.numel for layout in layouts)]
    return [
        codec_of(form, layout.dtype, layout.trainable, seed, index)
        for layout, index in zip(layouts, first, strict=False)
    ]


def _facts(
    layout: ChunkLayout,
    codec: FormatCodec | None,
    exchange: Exchange,
    config: Config,
    state_bytes_per_numel: int,
) -> ChunkFacts:
    """Gradients keep the dtype they come in; sums, over micro-batches or ranks, are fp32 unless asked otherwise."""
    accumulates = config.train.gradient_accumulation_steps > 1
    shard = exchange.shard(layout)
    many_ranks = exchange is not ALONE
    sums = accumulates or (many_ranks and (config.precision.reduce == "fp32" or shard.is_whole))
    itemsize = 4 if sums else layout.dtype.itemsize
    return chunk_facts(layout, shard, state_bytes_per_numel, itemsize, codec)


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise UserError(
                f"module {name or 'model'} is compiled: torch.compile cannot see when parameters are fetched; give "
                "zero.initialize() the model uncompiled, and set train.compile = true to have its blocks compiled"
            )


def _require_dense_gradients(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
            raise UserError(
                f"module {name or 'model'} is an {type(module).__name__} with sparse=True: only dense gradients can be "
                "managed; set sparse=False"
            )


def _spec(name: str, parameter: nn.Parameter, dtype: torch.dtype, keep_fp32: bool, trainable: bool) -> ParameterSpec:
    if isinstance(parameter, UninitializedParameter):
        raise UserError(
            f"parameter {name} of a lazy module has no shape yet: run the model once before zero.initialize()"
        )
    if parameter.is_meta and not is_pending(parameter):
        raise UserError(f"parameter {name} is on the meta device and has no values: load them before zero.initialize()")
    if parameter.is_inference():
        raise UserError(
            f"parameter {name} was made in inference mode and cannot be trained: build the model outside of it"
        )
    if parameter.layout is not torch.strided or parameter.is_quantized:
        raise UserError(f"parameter {name} has layout {parameter.layout}: only plain dense parameters can be managed")
    if is_traceable_wrapper_subclass(parameter):  # DTensor, quantised tensors and the like
        raise UserError(f"parameter {name} is a {type(parameter).__name__}: only plain tensors can be managed")
    if parameter.is_complex():
        raise UserError(f"parameter {name} is complex: only real parameters can be managed")
    if trainable and parameter.dtype == torch.float64:
        raise UserError(
            f"parameter {name} is float64, but masters and optimizer states are float32: cast it with .float() if that is "
            "enough, or freeze it"
        )
    stride = parameter.stride() if is_dense(parameter) else torch.empty(parameter.shape, device="meta").stride()
    return ParameterSpec(name, parameter.shape, stride, compute_dtype(parameter, dtype, keep_fp32), trainable)


def _refuse_managed(units: list[Unit]) -> None:
    for unit in units:
        for name, parameter in unit.parameters:
            if isinstance(parameter, ManagedParameter):
                raise UserError(f"parameter {name} is already managed by an engine; close() that engine first")


def _fp32_names(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Parts of parameter names that a Hugging Face model keeps in fp32 under this dtype."""
    if dtype == torch.float32:
        return []
    names: set[str] = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return sorted(names)


def _cast_empty(model: nn.Module, tensors: dict[int, ChunkTensor], dtype: torch.dtype, device: Device) -> None:
    """Parameters without elements are in no chunk; they follow the others' dtype and device."""
    for parameter in model.parameters():
        if id(parameter) not in tensors:
            parameter.data = parameter.data.to(device.torch_device, compute_dtype(parameter, dtype, False))


def _cast_buffers(model: nn.Module, dtype: torch.dtype, device: Device) -> None:
    """Persistent float buffers follow the dtype, as ``from_pretrained(dtype=...)`` has it; computed ones (rotary
    frequencies) keep their precision. All move to the device."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            casts = buffer.is_floating_point() and name not in module._non_persistent_buffers_set
            module._buffers[name] = buffer.to(device=device.torch_device, dtype=dtype if casts else buffer.dtype)
