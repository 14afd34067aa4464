"""The whole config: every table in one read-only object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PrivateAttr
from pydantic.fields import FieldInfo

from zero.config.cost import CostSection
from zero.config.machine import DeviceSection, MemorySection, ParallelSection, PrecisionSection, TensorSection
from zero.config.needs import Need, missing_data, missing_model
from zero.config.task import DataSection, LoraSection, ModelSection
from zero.config.training import OptimizerSection, SchedulerSection, TrainSection
from zero.config.types import Section, section_of
from zero.errors import ConfigError


class Config(Section):
    """A resolved config. Build it with ``load_config``, which reports everything that is wrong at once."""

    device: DeviceSection = DeviceSection()
    """The accelerator that computes, and how much of its memory this run may take."""

    memory: MemorySection = MemorySection()
    """Where parameters, gradients and optimizer states live."""

    precision: PrecisionSection = PrecisionSection()
    """Number formats and the loss scale."""

    optimizer: OptimizerSection = OptimizerSection()
    """The optimizer that `zero train` builds."""

    scheduler: SchedulerSection = SchedulerSection()
    """How the learning rate moves over the run."""

    train: TrainSection = TrainSection()
    """The loop: batches, steps, what is saved and when."""

    model: ModelSection = ModelSection()
    """The model that `zero train` builds."""

    data: DataSection = DataSection()
    """What is trained and evaluated on."""

    parallel: ParallelSection = ParallelSection()
    """How the ranks are divided."""

    cost: CostSection = CostSection()
    """What is said of energy and CO2e."""

    _source: str = PrivateAttr("config")
    _variables: dict[str, Any] = PrivateAttr(default_factory=dict)
    _notes: tuple[str, ...] = PrivateAttr(())

    @property
    def source(self) -> str:
        """Path of the file this was read from; "config" where it came from a dict or from nothing."""
        return self._source

    @property
    def variables(self) -> Mapping[str, Any]:
        """Free variables of a Python config (upper-case names such as BATCH_SIZE), for the user's own script."""
        return self._variables

    @property
    def notes(self) -> tuple[str, ...]:
        """What loading said about this config without refusing it, one line each; also logged."""
        return self._notes

    @property
    def run_folder(self) -> Path:
        """Folder of the run: train.output_dir, or "runs/" and the name of the config file."""
        return self.train.run_folder(Path(self._source).stem)

    def is_set(self, dotted: str) -> bool:
        """Whether a key was given rather than left at its default.

        Args:
            dotted: For example ``"memory.chunk"``.
        """
        *tables, key = dotted.split(".")
        table: BaseModel = self
        for name in tables:
            inner = getattr(table, name) if name in table.model_fields_set else None
            if not isinstance(inner, BaseModel):
                return False
            table = inner
        return key in table.model_fields_set and getattr(table, key) is not None

    def require_model(self) -> None:
        """Checks that exactly one model is given, for commands that build one.

        Raises:
            ConfigError: If none or two are given, or a local folder does not exist.
        """
        self._refuse(missing_model(self.model))

    def require_data(self) -> None:
        """Checks that training data are given, for commands that train.

        Raises:
            ConfigError: If none are given, or a local file does not exist.
        """
        self._refuse(missing_data(self.data))

    def _refuse(self, needs: list[Need]) -> None:
        if needs:
            raise ConfigError([need.text for need in needs], self.source)


SECTIONS: dict[str, type[Section]] = {
    name: table for name, field in Config.model_fields.items() if (table := section_of(field.annotation))
}


def walk(table: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """All keys below a table, depth first, as dotted key and field; tables inside are given before their keys."""
    for name, field in table.model_fields.items():
        dotted = f"{prefix}{name}"
        yield dotted, field
        inner = section_of(field.annotation)
        if inner is not None:
            yield from walk(inner, f"{dotted}.")


FIELDS: dict[str, FieldInfo] = dict(walk(Config))
"""Every table and key of the schema by its dotted name, in the order of the file."""


BYTE_KEYS = frozenset({"device.memory", "memory.host", "memory.chunk", "parallel.replicate"})
"""Keys that hold an amount of memory, as a number of bytes; written with a unit."""


def table_of(dotted: str) -> type[Section] | None:
    """The table class behind a dotted name, ``None`` for a plain key or an unknown name."""
    field = FIELDS.get(dotted)
    return section_of(field.annotation) if field is not None else None


__all__ = [
    "BYTE_KEYS",
    "FIELDS",
    "SECTIONS",
    "Config",
    "CostSection",
    "DataSection",
    "DeviceSection",
    "LoraSection",
    "MemorySection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "PrecisionSection",
    "SchedulerSection",
    "Section",
    "TensorSection",
    "TrainSection",
    "table_of",
    "walk",
]
