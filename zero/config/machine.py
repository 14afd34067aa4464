"""Tables about the machine: device, memory, precision, parallel."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from gemini.profile import NAMED, named_profile
from zero.config.types import (
    Allowed,
    ByteAmount,
    Fraction,
    Growth,
    PositiveInt,
    PositiveNumber,
    Section,
    Seed,
    Shrink,
    Text,
)


def _known_card(value: Any) -> Any:
    """Refuses a name that no published profile has."""
    if isinstance(value, str) and value != "auto":
        try:
            named_profile(value)
        except ValueError as error:
            raise ValueError(str(error).partition(": ")[2]) from error
    return value


class DeviceSection(Section):
    """The accelerator that computes, and how much of its memory this run may take."""

    type: Literal["auto", "cuda", "cpu", "simulated"] = "auto"
    """Which device. `auto` takes the accelerator there is; without one the simulated
    device if `device.memory` is given, else the CPU. `simulated` is a stand-in with a fixed
    capacity that needs no accelerator and makes every missing wait or wrong placement show."""

    memory: ByteAmount | None = None
    """Cap on device memory in bytes, such as "6GiB". Unset: all that is free. On a real accelerator the allocator
    enforces it, so that a small card can be tried out on a large one; `simulated` needs it."""

    profile: Annotated[str, AfterValidator(_known_card), Allowed(f"auto, {', '.join(NAMED)}")] = "auto"
    """How fast the machine is, for the choice of a plan. `auto` measures an accelerator once and keeps what it found,
    and takes fixed figures for `simulated`. The name of a card takes its data sheet; `simulated` then reckons in
    virtual time how long a step would take there."""

    streams: Literal["procrastinating", "random", "immediate"] = "procrastinating"
    """When the simulated device carries out queued copies: only when a wait forces them, in a random legal order, or
    at once. The results must not differ. Only with type = "simulated"."""

    stream_seed: Seed = 0
    """Seed of the order that streams = "random" picks. Only with type = "simulated"."""

    poison: bool = True
    """Fill released memory of the simulated device with NaN, so that reading it is noticed. Only with type =
    "simulated"."""


class MemorySection(Section):
    """Where parameters, gradients and optimizer states live."""

    policy: Literal["auto", "cuda", "cpu", "static"] = "auto"
    """How placement is decided. `auto` records one step and takes the fastest placement that fits; `cuda` keeps all on
    the device; `cpu` keeps all on the host and fetches what is computed with; `static` keeps the fractions below."""

    resident_parameters: Fraction = 0.0
    """Fraction of the parameter bytes that stays on the device, 0 to 1. Only with policy = "static"."""

    resident_optimizer: Fraction = 0.0
    """Fraction of the optimizer-state bytes that lives and is updated on the device, 0 to 1. Only with policy =
    "static"."""

    host: ByteAmount | None = None
    """Budget of host memory in bytes, such as "48GiB", for all ranks on this machine together. Unset: what the machine
    or its container leaves free."""

    disk: Text | None = None
    """Folder for what neither device nor host can hold. Unset: nothing goes to disk."""

    chunk: ByteAmount = 64 * 2**20
    """Largest chunk in bytes. Larger ones use the link better, smaller ones fit a smaller device; a parameter larger
    than this gets a chunk of its own."""

    activations: Literal["device", "host"] = "device"
    """Where what forward saves waits for backward. `host` frees device memory for longer sequences; with
    train.gradient_checkpointing only each block's input moves, without it everything does, which is slow."""

    prefetch: Annotated[int, Field(ge=0, le=64)] | Literal["auto"] = "auto"
    """Units ahead of which parameters are fetched, as far as device memory is spare, so that copies run beside
    computing; 0 fetches a unit when it runs. Results are the same to the bit. `auto` leaves it to the plan."""

    pin: bool = True
    """Lock host memory so that copies to and from the device run beside computing. Turn off where locked memory is
    limited; a device without such copies ignores it."""


class PrecisionSection(Section):
    """Number formats and the loss scale."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Format of parameters and computing. With bf16 and fp16 the optimizer keeps an fp32 master copy; fp16 also scales
    the loss. `fp32` does what plain PyTorch does."""

    initial_scale: PositiveNumber = 65536.0
    """Loss scale of the first step. Only with dtype = "fp16"."""

    growth_factor: Growth = 2.0
    """The scale is multiplied by this after growth_interval steps without overflow. Only with dtype = "fp16"."""

    backoff_factor: Shrink = 0.5
    """The scale is multiplied by this after an overflow. Only with dtype = "fp16"."""

    growth_interval: PositiveInt = 1000
    """Steps without overflow before the scale grows. Only with dtype = "fp16"."""

    hysteresis: PositiveInt = 2
    """Overflows in a row before the scale shrinks; every one of them skips its step. Only with dtype = "fp16"."""

    min_scale: PositiveNumber = 1.0
    """The scale never falls below this. Only with dtype = "fp16"."""

    max_scale: PositiveNumber = 2.0**32
    """The scale never rises above this. Only with dtype = "fp16"."""

    reduce: Literal["fp32", "bf16"] = "fp32"
    """Format in which gradients are summed over ranks. `fp32` adds them without loss, whatever format they travel in;
    `bf16` sends and keeps them in bf16, which takes less of the links and of the host."""

    optimizer_state: Literal["fp32", "split", "bf16", "8bit"] = "fp32"
    """Format of master weights and moments. `fp32` takes 16 bytes a parameter on the host with dtype = "bf16", gradients
    and weights included; `split` takes 14 and gives the same results to the bit; `bf16` takes 10 and `8bit` 7, with
    moments rounded at random, so that results are close and not the same. All but `fp32` need dtype = "bf16" and adamw
    or adam."""


def _mode_of_this_version(value: Any) -> Any:
    if value == "sequence":
        raise ValueError("sequence parallelism is not in this version; use none, 1d, 2d, 2.5d or 3d")
    return value


class TensorSection(Section):
    """How single layers are split over ranks."""

    mode: Annotated[Literal["none", "1d", "2d", "2.5d", "3d"], BeforeValidator(_mode_of_this_version)] = "none"
    """Shape of the split: a row of ranks, a square, `depth` squares, or a cube."""

    size: PositiveInt = 1
    """Number of ranks that share each layer: a square number for 2d, depth times a square for 2.5d, a cube for 3d."""

    depth: PositiveInt = 1
    """Number of squares. Only with mode = "2.5d"."""


class ParallelSection(Section):
    """How the ranks are divided. Their number is data x pipeline x tensor.size."""

    data: PositiveInt | None = None
    """Number of groups that work on different data. Unset: as many as the ranks allow."""

    pipeline: PositiveInt = 1
    """Number of stages the layers are divided into, one after the other."""

    tensor: TensorSection = TensorSection()
    """How single layers are split over ranks: {mode, size, depth}."""

    replicate: ByteAmount = 16 * 2**10
    """Chunks of no more bytes than this are kept whole by every rank: fetching them from one another would take longer
    than their memory is worth. "1B": all chunks are divided."""

    timeout: PositiveNumber = 600.0
    """Seconds that a rank waits for another one before it gives up and says whom it waited for."""

    @property
    def model_ranks(self) -> int:
        """Number of ranks that hold one copy of the model together."""
        return self.pipeline * self.tensor.size

    @property
    def world_size(self) -> int:
        """Number of ranks this table asks for: data x pipeline x tensor.size, an unset `data` counted as 1."""
        return (self.data or 1) * self.model_ranks

    def data_ranks(self, num_ranks: int) -> int:
        """Number of data-parallel groups among the ranks that really run.

        Args:
            num_ranks: Number of ranks of the run.

        Returns:
            `data`, or what the ranks allow where it is unset.

        Raises:
            ValueError: If the ranks cannot be divided as asked; the message says what would do.
        """
        found, rest = divmod(num_ranks, self.model_ranks)
        if rest or (self.data is not None and found != self.data):
            wanted = str(self.world_size) if self.data else f"a multiple of {self.model_ranks}"
            asked = f"data {self.data or 'unset'} x pipeline {self.pipeline} x tensor {self.tensor.size}"
            raise ValueError(
                f"parallel asks for {asked}, but {num_ranks} ranks run: start {wanted} ranks or change [parallel]"
            )
        return found
