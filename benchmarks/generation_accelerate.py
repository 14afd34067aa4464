"""accelerate's hooks, as ``device_map`` sets them up, under transformers' own ``generate``.

On a real accelerator accelerate gets what ``device_map="auto"`` with ``max_memory`` comes to: ``infer_auto_device_map``
and ``dispatch_model``. Without one the same two calls run with the simulated device in its place: every tensor that the
hooks bring is copied there and counts against the capacity, as all that is computed does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from generation_systems import PAD, allocator_bytes, device_table, make_model, non_model_bytes

from gemini.simulated import SimulatedDevice
from zero.config.loading import load_config
from zero.dryrun import InferenceNeeds
from zero.setup import make_device

PAGEABLE = 0.5
"""Of the link's rate, what copies from memory reach that is not pinned: accelerate's own figure for OPT-30B is about 6 GB/s
where the link carries 12."""


def device_map_of(model: Any, device_bytes: int, host_bytes: int) -> dict[str, Any]:
    """Where accelerate would put each module of a model, of which so many bytes may lie on the device and the host."""
    from accelerate import infer_auto_device_map

    memory = {0: max(0, device_bytes), "cpu": host_bytes}
    with mock.patch("accelerate.utils.modeling.logger"):  # that there is no GPU 0 is known
        found: dict[str, Any] = infer_auto_device_map(
            model,
            memory,
            no_split_module_classes=list(model._no_split_modules),
            dtype=model.dtype,
            clean_result=False,  # names of modules, never that of the whole model
        )
    return found


class _Bringing:
    """In the place of accelerate's ``set_module_tensor_to_device``: counts what hooks bring to the device.

    Args:
        device: copy it there: the simulated device is the host's memory, and the hooks would only point at it. None: they
            copy by themselves.

    Attributes:
        num_bytes: so far.
    """

    def __init__(self, device: SimulatedDevice | None) -> None:
        from accelerate.hooks import set_module_tensor_to_device

        self._set: Callable[..., None] = set_module_tensor_to_device
        self.device = device
        self.num_bytes = 0

    def __call__(self, module: Any, name: str, device: Any, value: Any = None, **options: Any) -> None:
        tied = options.get("tied_params_map") or {}
        if value is not None and device not in tied.get(value.data_ptr(), ()):
            self.num_bytes += value.nbytes
            value = value if self.device is None else self._copied(value)
        # What is made to stand for a tensor that leaves takes no memory.
        leaves = value is None and self.device is not None
        with self.device.bookkeeping() if leaves else contextlib.nullcontext():
            self._set(module, name, device, value=value, **options)

    def _copied(self, value: torch.Tensor) -> torch.Tensor:
        """In virtual time as on a GPU: behind all computation so far, from pageable memory, and the program waits."""
        clock = self.device.clock
        clock.wait(clock.copy_in(int(value.nbytes / PAGEABLE), clock.compute_s))
        clock.compute_waits(clock.host_s)
        return value.clone()


class Accelerate:
    """``device_map="auto"`` with the most of the model on the device that leaves room for the rest.

    Args:
        job: of :func:`measure`.
        batch: rows at a time.
        folder: of the disk tier.
        found: by a dry run of these passes.
        spared_bytes: of the device, to be left free beside.
    """

    def __init__(
        self, job: dict[str, Any], batch: int, folder: str, found: InferenceNeeds, spared_bytes: int = 0
    ) -> None:
        self._stack = contextlib.ExitStack()
        self._on_gpu = job["device"] == "cuda"
        self.device = None if self._on_gpu else _simulated(job)
        self._bringing = _Bringing(self.device)
        self._stack.enter_context(mock.patch("accelerate.hooks.set_module_tensor_to_device", self._bringing))
        model = make_model(job["shape"], job["dtype"])
        share_bytes = allocator_bytes(job) - non_model_bytes(found) - spared_bytes
        where = device_map_of(model, share_bytes, 0 if job["tier"] == "disk" else 1 << 50)
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self._model = (
            self._dispatch_to_gpu(model, where, folder) if self._on_gpu else self._dispatch(model, where, folder)
        )

    def _dispatch_to_gpu(self, model: Any, where: dict[str, Any], folder: str) -> Any:
        from accelerate import dispatch_model

        self.resident_bytes = _bytes_at(model, where, 0)
        if set(where.values()) == {0}:
            return model.to(0)
        return dispatch_model(model, where, offload_dir=folder)

    def _dispatch(self, model: Any, where: dict[str, Any], folder: str) -> Any:
        """The host stands for the device, so what would lie on the host is offloaded as accelerate does from a disk."""
        from accelerate import dispatch_model
        from accelerate.utils import extract_submodules_state_dict, offload_state_dict

        self.resident_bytes = _bytes_at(model, where, 0)
        resident, host, disk = ([name for name, place in where.items() if place == at] for at in (0, "cpu", "disk"))
        with self.device.activity():
            for parameter in _parameters_of(model, resident):
                parameter.data = parameter.data.clone()
        state = extract_submodules_state_dict(model.state_dict(), host)
        offload_state_dict(folder, extract_submodules_state_dict(model.state_dict(), disk))
        if not disk:  # a folder with an index is taken as it is
            (Path(folder) / "index.json").write_text("{}", encoding="utf-8")
        self._stack.enter_context(_reading(self.device))
        standing = {name: "cpu" if place == 0 else "disk" for name, place in where.items()}
        return dispatch_model(model, standing, state_dict=state, offload_dir=folder, force_hooks=True)

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """New tokens of each prompt; on the simulated device all bytes count."""
        with self.device.activity() if self.device is not None else contextlib.nullcontext():
            return self.timed(prompts, new)

    def timed(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """The same, but that nobody follows tensors, as in :meth:`Ours.timed`."""
        ids = torch.tensor(prompts)
        ids = ids.cuda() if self._on_gpu else ids
        mask = torch.ones_like(ids)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": PAD}
        output = self._model.generate(ids, attention_mask=mask, **options)
        tokens: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return tokens

    @property
    def link_bytes(self) -> int:
        """That came to the device so far."""
        return self._bringing.num_bytes

    def told(self) -> dict[str, Any]:
        """Bytes."""
        peak_bytes = torch.cuda.max_memory_allocated() if self.device is None else self.device.memory().peak_bytes
        return {"device_peak_bytes": peak_bytes, "resident_bytes": self.resident_bytes}

    def close(self) -> None:
        """Gives everything back."""
        self._model = None
        self._stack.close()


def _simulated(job: dict[str, Any]) -> SimulatedDevice:
    return make_device(load_config({"device": device_table(job)}))


@contextlib.contextmanager
def _reading(device: SimulatedDevice) -> Iterator[None]:
    """While what accelerate reads from disk is made on the host, and takes virtual time."""
    from accelerate.utils import offload

    read = offload.load_offloaded_weight

    def beside(*args: Any, **kwargs: Any) -> torch.Tensor:
        with device.bookkeeping():
            value: torch.Tensor = read(*args, **kwargs)
        device.clock.wait(device.clock.read_disk(value.nbytes, device.clock.host_s))
        return value

    with mock.patch.object(offload, "load_offloaded_weight", beside):
        yield


def _parameters_of(model: Any, names: list[str]) -> list[torch.nn.Parameter]:
    modules = [model.get_submodule(name) for name in names]
    return list(dict.fromkeys(parameter for module in modules for parameter in module.parameters()))


def _bytes_at(model: Any, where: dict[str, Any], place: Any) -> int:
    names = [name for name, at in where.items() if at == place]
    return sum(parameter.nbytes for parameter in _parameters_of(model, names))


def brought_bytes(model: Any, where: dict[str, Any]) -> int:
    """What hooks bring to the device in one forward: a tied table once for each module that has it."""
    names = [name for name, at in where.items() if at != 0]
    modules = dict.fromkeys(module for name in names for module in model.get_submodule(name).modules())
    return sum(parameter.nbytes for module in modules for parameter in module.parameters(recurse=False))
