"""For the checkpoint tests: small engines, file systems that crash, checkpoints forged to be consistent."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zero
from tests.engine_models import MODELS, batches
from zero.checkpoint.codec import dump
from zero.checkpoint.files import Files
from zero.checkpoint.manifest import MANIFEST

LARGE_BYTES = 1 << 40
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
    "adamw-amsgrad": lambda p, lr: torch.optim.AdamW(p, lr=lr, amsgrad=True),
    "sgd-momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr, centered=True, momentum=0.5),
    "adagrad": lambda p, lr: torch.optim.Adagrad(p, lr=lr),
    "nadam": lambda p, lr: torch.optim.NAdam(p, lr=lr),
    "asgd": lambda p, lr: torch.optim.ASGD(p, lr=lr),
}


@dataclass
class Setting:
    """How a run of the tests is set up."""

    model: str = "opt-pre-norm"
    optimizer: str = "adamw"
    policy: str = "auto"
    capacity_bytes: int = LARGE_BYTES
    dtype: str = "fp32"
    accumulation: int = 1
    lr: float = 1e-3
    scale: float = 65536.0
    kernel: str = "torch"
    prepare: Callable[[nn.Module], None] = lambda model: None
    memory: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """An engine, its scheduler, and what was seen of each micro-batch."""

    def __init__(self, setting: Setting) -> None:
        model = MODELS[setting.model]()
        setting.prepare(model)
        optimizer = OPTIMIZERS[setting.optimizer]([p for p in model.parameters() if p.requires_grad], lr=setting.lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        config = {
            "device": {"type": "simulated", "memory": setting.capacity_bytes},
            "memory": {"policy": setting.policy, **setting.memory},
            "precision": {
                "dtype": setting.dtype,
                "initial_scale": setting.scale,
                "growth_interval": 2,
                "hysteresis": 1,
            },
            "optimizer": {"kernel": setting.kernel},
            "train": {"gradient_accumulation_steps": setting.accumulation, **setting.train},
        }
        self.engine, _, _, self.scheduler = zero.initialize(model, optimizer, lr_scheduler=scheduler, config=config)
        self.seen: list[tuple[float, float, float]] = []

    def run(self, some: list[dict[str, Tensor]]) -> Trainer:
        """Trains; notes loss, loss scale and learning rate of each micro-batch."""
        for batch in some:
            self.engine.zero_grad()
            loss = self.engine(**batch).loss
            self.engine.backward(loss)
            acts = self.engine.is_boundary
            self.engine.step()
            if acts and not self.engine.skipped_last_step:
                self.scheduler.step()
            self.engine.check_integrity()
            rate = self.engine.optimizer.param_groups[0]["lr"]
            self.seen.append((loss.item(), self.engine.loss_scale, rate))
        return self

    def save(self, directory: Path, **options: Any) -> Path:
        """Saves with the scheduler."""
        return self.engine.save_checkpoint(directory, lr_scheduler=self.scheduler, **options)

    def load(self, directory: Path, **options: Any) -> zero.checkpoint.LoadedState:
        """Loads with the scheduler."""
        return self.engine.load_checkpoint(directory, lr_scheduler=self.scheduler, **options)


def everything(engine: Any) -> dict[str, Any]:
    """Copies of all that a resume must bring back: masters, values, states, gradients, buffers, counters, scaler."""
    found: dict[str, Any] = {}
    for tensor in engine._tensors.values():
        pieces = tensor.chunk.pieces(tensor.entry.offset, tensor.entry.stop)
        found[f"values {tensor.name}"] = tensor.chunk.values_of(tensor)
        for key in sorted({key for segment, _, _ in pieces for key in segment.companions} - {"gradient"}):
            has_state = key == "master" or tensor in engine.optimizer.updater.scalars
            if has_state:
                found[f"{key} {tensor.name}"] = tensor.chunk.companion_of(tensor, key)
        if engine._micro_step and tensor.has_gradient:
            found[f"gradient {tensor.name}"] = tensor.chunk.companion_of(tensor, "gradient").float()
        found[f"scalars {tensor.name}"] = engine.optimizer.updater.scalars.get(tensor)
    found.update({f"buffer {name}": buffer.clone() for name, buffer in engine.module.named_buffers()})
    found["counters"] = (engine.num_steps, engine.num_skipped_steps, engine.grad_norm, engine._micro_step)
    found["scaler"] = engine.scaler.state_dict()
    found["groups"] = [{k: v for k, v in g.items() if k != "params"} for g in engine.optimizer.param_groups]
    found["rng"] = torch.get_rng_state()
    return found


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nests of values are not the same to the bit."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        same = isinstance(one, Tensor) and isinstance(other, Tensor) and one.dtype == other.dtype
        return [] if same and torch.equal(_bits(one), _bits(other)) else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [f"{where} lacks {key}" for key in one.keys() ^ other.keys()]
        return keys + [
            d for key in one.keys() & other.keys() for d in differences(one[key], other[key], f"{where}/{key}")
        ]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [
            d
            for index, (a, b) in enumerate(zip(one, other, strict=True))
            for d in differences(a, b, f"{where}/{index}")
        ]
    return [] if one == other else [f"{where}: {one!r} != {other!r}"]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1)


# -- file systems that fail ------------------------------------------------------------------------------------------


class SimulatedCrash(BaseException):
    """The process is gone: no handler of ours may run."""


class CountingFiles(Files):
    """Counts operations, and does something at one of them.

    Attributes:
        log: ``(operation, path)`` of each that was begun.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, Path]] = []

    def _begin(self, name: str, path: Path) -> None:
        self.log.append((name, path))

    def make_directory(self, path: Path) -> None:
        self._begin("make_directory", path)
        super().make_directory(path)

    def create(self, path: Path) -> FileIO:
        self._begin("create", path)
        return super().create(path)

    def write(self, handle: FileIO, data: memoryview) -> None:
        self._begin("write", Path(str(handle.name)))
        super().write(handle, data)

    def sync(self, handle: FileIO) -> None:
        self._begin("sync", Path(str(handle.name)))

    def sync_directory(self, path: Path) -> None:
        self._begin("sync_directory", path)

    def rename(self, source: Path, target: Path) -> None:
        self._begin("rename", source)
        super().rename(source, target)

    def remove_file(self, path: Path) -> None:
        self._begin("remove_file", path)
        super().remove_file(path)

    def remove_directory(self, path: Path) -> None:
        self._begin("remove_directory", path)
        super().remove_directory(path)


class CrashingFiles(CountingFiles):
    """Stops the process at one operation, which is not done any more, or half done if it is a write.

    Args:
        at: index of the operation.
        half: of a write, half is written.
    """

    def __init__(self, at: int, half: bool = False) -> None:
        super().__init__()
        self._at = at
        self._half = half
        self._dead = False

    def _begin(self, name: str, path: Path) -> None:
        if self._dead or (len(self.log) == self._at and not (self._half and name == "write")):
            self._dead = True
            raise SimulatedCrash
        super()._begin(name, path)

    def write(self, handle: FileIO, data: memoryview) -> None:
        if self._half and len(self.log) == self._at:
            Files.write(self, handle, data[: len(data) // 2])
            self._dead = True
        super().write(handle, data)


class PowerLossFiles(CrashingFiles):
    """The machine stops: what was not synced is lost. :meth:`lose` makes the folder look as after the reboot.

    Contents that were not synced become empty; names that were not synced are undone, latest first.
    """

    def __init__(self, at: int) -> None:
        super().__init__(at)
        self._dirty: set[Path] = set()
        self._names: list[tuple[Path, Path, Path | None]] = []  # parent, path, where a rename came from

    def make_directory(self, path: Path) -> None:
        super().make_directory(path)
        self._names.append((path.parent, path, None))

    def create(self, path: Path) -> FileIO:
        handle = super().create(path)
        self._names.append((path.parent, path, None))
        self._dirty.add(path)
        return handle

    def sync(self, handle: FileIO) -> None:
        super().sync(handle)
        self._dirty.discard(Path(str(handle.name)))

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        kept: list[tuple[Path, Path, Path | None]] = []
        for parent, name, source in self._names:
            if parent != path:
                kept.append((parent, name, source))
            elif source is not None:  # this rename will not be undone: older names move with it
                kept = [(_moved(p, source, name), _moved(n, source, name), s) for p, n, s in kept]
        self._names = kept

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._dirty = {_moved(path, source, target) for path in self._dirty}
        self._names.append((target.parent, target, source))

    def lose(self) -> None:
        """Undoes what was not durable."""
        for path in self._dirty:
            if path.exists():
                path.write_bytes(b"")
        for _, path, source in reversed(self._names):
            if source is not None:
                if path.exists():  # else it has been removed since, and removals stay
                    path.rename(source)
            elif path.is_dir():
                _remove(path)
            else:
                path.unlink(missing_ok=True)


def _moved(path: Path, source: Path, target: Path) -> Path:
    return target / path.relative_to(source) if path.is_relative_to(source) else path


def _remove(path: Path) -> None:
    for inner in path.iterdir():
        _remove(inner) if inner.is_dir() else inner.unlink()
    path.rmdir()


class FailingFiles(CountingFiles):
    """One operation fails with an error of the operating system; or all of a kind from then on.

    Args:
        at: index of the operation.
        code: an ``errno``.
    """

    def __init__(self, at: int, code: int = errno.ENOSPC) -> None:
        super().__init__()
        self._at = at
        self._code = code

    def _begin(self, name: str, path: Path) -> None:
        failing = len(self.log) == self._at
        super()._begin(name, path)
        if failing:
            raise OSError(self._code, "No space left on device" if self._code == errno.ENOSPC else "Input/output error")


# -- forging ---------------------------------------------------------------------------------------------------------


def forge(checkpoint: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edits a manifest and seals it again, as an attacker would."""
    body = json.loads((checkpoint / MANIFEST).read_text())
    body.pop("manifest_sha256")
    edit(body)
    seal = hashlib.sha256(dump(body)).hexdigest()
    (checkpoint / MANIFEST).write_bytes(dump({**body, "manifest_sha256": seal}))


def forge_file(checkpoint: Path, path: str, data: bytes) -> None:
    """Replaces a file of a checkpoint and its length and hash in the manifest."""
    (checkpoint / path).write_bytes(data)

    def edit(body: dict[str, Any]) -> None:
        record = next(record for record in body["files"] if record["path"] == path)
        record.update(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    forge(checkpoint, edit)


def tensor_file(checkpoint: Path) -> Path:
    """The first file with tensors."""
    return sorted(checkpoint.glob("tensors-*.safetensors"))[0]


def all_files(checkpoint: Path) -> Iterator[Path]:
    """Every file of a checkpoint."""
    return (path for path in sorted(checkpoint.rglob("*")) if path.is_file())


__all__ = [
    "CountingFiles", "CrashingFiles", "FailingFiles", "PowerLossFiles", "Setting", "SimulatedCrash", "Trainer",
    "all_files", "batches", "differences", "everything", "forge", "forge_file", "tensor_file",
]  # fmt: skip


def flip(position: float, bit: int) -> Callable[[bytes], bytes]:
    """Changes one bit, at a position from 0 to 1."""

    def changed(data: bytes) -> bytes:
        written = bytearray(data)
        written[min(int(position * len(data)), len(data) - 1)] ^= 1 << bit
        return bytes(written)

    return changed


CORRUPTIONS: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda data: None,
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "one byte less": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\n",
}
"""What can happen to a file, wherever it is."""
