"""A trace without running anything: the same manager and hooks, on fake tensors.

Fake tensors have shapes and dtypes but no data, so a model of any number of parameters is walked through in seconds on
any machine. :class:`DryDevice` counts their storages as the simulated device counts real ones.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from gemini.arena import HostArena
from gemini.device import Device, DeviceMemory, InlineStream, Stream
from gemini.tracker import StorageTracker
from gemini.work import work_of


class DryTracker(StorageTracker):
    """Counts fake storages; knows the shape of an operator whose fake version is stricter than the real one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Grouped matrix products of MoE layers run in any dtype on a CPU, but are faked in bfloat16 only."""
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
            narrow = [a.to(torch.bfloat16) if a.is_floating_point() else a for a in args[:2]]
            result = func(*narrow, *args[2:], **(kwargs or {})).to(args[0].dtype)
            self._note(result)
            if self.on_work is not None:
                self.on_work(work_of(func, args, kwargs or {}, result))
            return result
        return super().__torch_dispatch__(func, types, args, kwargs)


class DryDevice(Device):
    """A device without an end, on which fake tensors are counted. Use it inside :func:`fake_mode`."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "dry run"
        self.torch_device = torch.device("cpu")
        self.capacity_bytes = 1 << 62
        self._tracker = DryTracker(self._note_peak)
        self._tracker.on_work = self.work.add
        self._peak_bytes = 0

    def _note_peak(self, num_bytes: int) -> None:
        """``num_bytes`` more are about to be counted, whatever they are for."""
        self._peak_bytes = max(self._peak_bytes, self.model_data_bytes + self._tracker.live_bytes + num_bytes)

    def take_again(self, buffer: torch.Tensor, numel: int) -> None:
        """Gives a fake buffer its bytes back."""
        self._note_peak(numel * buffer.dtype.itemsize)
        super().take_again(buffer, numel)

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A fake buffer."""
        self._note_peak(numel * dtype.itemsize)
        buffer = super().allocate(numel, dtype)
        self._tracker.exempt(buffer)
        return buffer

    def memory(self) -> DeviceMemory:
        """Figures of fake storages."""
        live_bytes, peak_bytes = self._tracker.live_bytes, self._tracker.peak_bytes
        return DeviceMemory(self.model_data_bytes, live_bytes, self._peak_bytes, peak_bytes)

    def _start_window(self) -> None:
        self._tracker.reset_peak()
        self._peak_bytes = self.model_data_bytes + self._tracker.live_bytes

    def stream(self, name: str) -> Stream:
        """Copies of nothing need no queue."""
        del name
        return InlineStream()

    def wait(self, event: Any) -> None:
        """Nothing is ever pending."""

    def synchronize(self) -> None:
        """Nothing is ever pending."""

    def activity(self) -> contextlib.AbstractContextManager[None]:
        """Counts storages made inside."""
        return self._tracker.watching()

    @contextlib.contextmanager
    def bookkeeping(self) -> Iterator[None]:
        """The manager's own tensors stay fake, but are not counted."""
        fake = torch._guards.detect_fake_mode()
        with torch.no_grad(), _disable_current_modes(), fake or contextlib.nullcontext():
            yield


class DryArena(HostArena):
    """Host memory of fake tensors."""

    @staticmethod
    def _map(num_bytes: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        del num_bytes
        return torch.empty(numel, dtype=dtype)

    def release(self, tensor: torch.Tensor) -> None:
        """Counts; a fake tensor has no address that could be pinned."""
        self.host_bytes -= tensor.nbytes


def fake_mode() -> FakeTensorMode:
    """A mode in which every new tensor is fake."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextlib.contextmanager
def fake_conversions() -> Iterator[None]:
    """While a model is built of fake tensors: ``module.to()``, which otherwise fails on them, even if it changes nothing.

    PyTorch swaps a fake parameter for its converted twin, and cannot where the fake mode keeps a weak reference to it.
    """
    original = nn.Module._apply
    nn.Module._apply = _convert_fake  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]


def _convert_fake(
    module: nn.Module, convert: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> nn.Module:
    if recurse:
        for child in module.children():
            child._apply(convert)
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            with torch.no_grad():
                converted = convert(tensor)
            if (converted.dtype, converted.device) != (tensor.dtype, tensor.device):
                is_parameter = isinstance(tensor, nn.Parameter)
                tensors[name] = nn.Parameter(converted, tensor.requires_grad) if is_parameter else converted  # type: ignore[assignment]
    return module


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of a model with fake parameters and buffers; the original is not touched and no memory is taken."""
    with FakeCopyMode(mode):
        duplicate: nn.Module = copy.deepcopy(model, _fake_parameters(model, mode))
    return duplicate


def _fake_parameters(model: nn.Module, mode: FakeTensorMode) -> dict[int, Any]:
    """Twins of plain parameters by their ``id``, made without a look at values, which may still lie in a file."""
    twins: dict[int, Any] = {}
    with mode:
        for parameter in model.parameters():
            if parameter.layout is torch.strided and not is_traceable_wrapper_subclass(parameter):
                shape, stride = parameter.size(), parameter.stride()
                empty = torch.empty_strided(shape, stride, dtype=parameter.dtype, device=parameter.device)
                twins[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return twins
