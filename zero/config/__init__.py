"""The config: one strict schema, read from TOML, YAML, JSON or Python. Imports neither torch nor transformers."""

from __future__ import annotations

from zero.config.describe import config_help, config_reference, to_toml
from zero.config.legacy import AMP_TYPE, BucketTensorShardStrategy, TensorShardStrategy
from zero.config.loading import load_config
from zero.config.overrides import parse_overrides
from zero.config.schema import (
    Config,
    DataSection,
    DeviceSection,
    LoraSection,
    MemorySection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    PrecisionSection,
    SchedulerSection,
    TensorSection,
    TrainSection,
)

__all__ = [
    "AMP_TYPE",
    "BucketTensorShardStrategy",
    "Config",
    "DataSection",
    "DeviceSection",
    "LoraSection",
    "MemorySection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "PrecisionSection",
    "SchedulerSection",
    "TensorSection",
    "TensorShardStrategy",
    "TrainSection",
    "config_help",
    "config_reference",
    "load_config",
    "parse_overrides",
    "to_toml",
]
