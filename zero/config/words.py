"""The words of problem lines: how values are shown, what a misspelt word was meant to be."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable
from typing import Any

_SHOWN_CHARACTERS = 60

# Words of other tools and of everyday speech, and the dotted key here that means the same.
FOREIGN_KEYS: dict[str, str] = {
    "learning_rate": "optimizer.lr",
    "adam_epsilon": "optimizer.eps",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "optim": "optimizer.name",
    "lr_scheduler_type": "scheduler.name",
    "scheduler_type": "scheduler.name",
    "num_warmup_steps": "scheduler.warmup_steps",
    "warmup": "scheduler.warmup_ratio",
    "fp16": 'precision.dtype = "fp16"',
    "bf16": 'precision.dtype = "bf16"',
    "fp32": 'precision.dtype = "fp32"',
    "torch_dtype": "precision.dtype",
    "mixed_precision": "precision.dtype",
    "loss_scale": "precision.initial_scale",
    "init_scale": "precision.initial_scale",
    "initial_scale_power": "precision.initial_scale",
    "loss_scale_window": "precision.growth_interval",
    "gradient_clipping": "train.max_grad_norm",
    "clip_grad_norm": "train.max_grad_norm",
    "grad_clip": "train.max_grad_norm",
    "max_norm": "train.max_grad_norm",
    "gradient_accumulation": "train.gradient_accumulation_steps",
    "grad_accum": "train.gradient_accumulation_steps",
    "per_device_batch_size": "train.per_device_train_batch_size",
    "batch_size": "train.per_device_train_batch_size",
    "train_batch_size": "train.per_device_train_batch_size",
    "micro_batch_size": "train.per_device_train_batch_size",
    "train_micro_batch_size_per_gpu": "train.per_device_train_batch_size",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "max_train_steps": "train.max_steps",
    "steps": "train.max_steps",
    "num_steps": "train.max_steps",
    "log_every": "train.logging_steps",
    "save_every": "train.save_steps",
    "keep_last": "train.save_total_limit",
    "activation_checkpointing": "train.gradient_checkpointing",
    "checkpointing": "train.gradient_checkpointing",
    "resume": "train.resume_from_checkpoint",
    "checkpoint_dir": "train.output_dir",
    "run_folder": "train.output_dir",
    "steps_per_print": "train.logging_steps",
    "model_name_or_path": "model.name_or_path",
    "model_name": "model.name_or_path",
    "pretrained": "model.name_or_path",
    "base_model": "model.name_or_path",
    "config_name": "model.config",
    "tokenizer_name": "model.tokenizer",
    "datasets": "data.train",
    "dataset_config_name": "data.dataset_config",
    "subset": "data.dataset_config",
    "split": "data.train_split",
    "block_size": "data.seq_length",
    "max_length": "data.seq_length",
    "max_seq_length": "data.seq_length",
    "seq_len": "data.seq_length",
    "sequence_len": "data.seq_length",
    "sample_packing": "data.packing",
    "max_train_samples": "data.max_samples",
    "text_field": "data.text_column",
    "train_on_inputs": "data.loss_on_prompt",
    "mem_cap": "device.memory",
    "gpu_memory": "device.memory",
    "max_memory": "device.memory",
    "vram": "device.memory",
    "capacity": "device.memory",
    "cpu_memory": "memory.host",
    "host_memory": "memory.host",
    "ram": "memory.host",
    "nvme_path": "memory.disk",
    "chunk_size": "memory.chunk",
    "pin_memory": "memory.pin",
    "placement_policy": "memory.policy",
    "tensor_placement_policy": "memory.policy",
    "cpu_offload": 'memory.policy = "cpu"',
    "offload": 'memory.policy = "cpu"',
    "offload_optimizer": 'memory.policy = "static" with memory.resident_optimizer',
    "offload_param": 'memory.policy = "static" with memory.resident_parameters',
    "offload_optim_frac": "memory.resident_optimizer (1 minus the fraction offloaded)",
    "offload_param_frac": "memory.resident_parameters (1 minus the fraction offloaded)",
    "zero_optimization": "memory.policy",
    "tp_size": "parallel.tensor.size",
    "tensor_parallel_size": "parallel.tensor.size",
    "pp_size": "parallel.pipeline",
    "dp_size": "parallel.data",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_r": "model.lora.r",
}

# The same, for words that have another meaning in another table.
FOREIGN_DOTTED: dict[str, str] = {
    "device.name": "device.type",
    "device.device": "device.type",
    "device.kind": "device.type",
    "memory.memory": "device.memory or memory.host",
    "memory.device": "device.memory",
    "memory.type": "memory.policy",
    "memory.resident_params": "memory.resident_parameters",
    "precision.type": "precision.dtype",
    "precision.precision": "precision.dtype",
    "precision.mode": "precision.dtype",
    "optimizer.type": "optimizer.name",
    "scheduler.type": "scheduler.name",
    "model.name": "model.name_or_path",
    "model.path": "model.name_or_path",
    "parallel.mode": "parallel.tensor.mode",
    "parallel.size": "parallel.tensor.size",
    "parallel.depth": "parallel.tensor.depth",
}

FOREIGN_SECTIONS: dict[str, str] = {
    "training": "train",
    "trainer": "train",
    "training_arguments": "train",
    "dataset": "data",
    "datasets": "data",
    "lr_scheduler": "scheduler",
    "schedule": "scheduler",
    "optim": "optimizer",
    "gpu": "device",
    "accelerator": "device",
    "offload": "memory",
    "gemini": "memory",
    "amp": "precision",
    "mixed_precision": "precision",
    "parallelism": "parallel",
    "distributed": "parallel",
    "zero": "memory",
    "fp16": "precision",
    "bf16": "precision",
    "lora": "model.lora",
    "peft": "model.lora",
    "tokenizer": "model",
}

_FOREIGN_VALUES: dict[str, str] = {
    "gpu": "cuda",
    "rocm": "cuda",
    "hip": "cuda",
    "fake": "simulated",
    "simulation": "simulated",
    "float32": "fp32",
    "float": "fp32",
    "full": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "hybridadam": "adamw",
    "cpuadam": "adamw",
    "fusedadam": "adamw",
    "warmup_linear": "linear",
    "cosine_with_warmup": "cosine",
    "chat": "messages",
    "sharegpt": "messages",
    "instruction": "prompt",
    "ignore": "skip",
    "error": "raise",
    "offload": "cpu",
    "const": "static",
}


def show(value: Any) -> str:
    """A value the way it would be written in a config, cut to one short line."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def name_text(name: str) -> str:
    """A key as it is, in quotes where it holds what would garble a line."""
    return name if name.isprintable() and name else show(name)


def nearest(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The candidate that looks most like a word, upper and lower case and dashes aside."""
    by_folded = {candidate.lower().replace("-", "_"): candidate for candidate in candidates}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), by_folded, n=1, cutoff=cutoff)
    return by_folded[found[0]] if found else None


def nearest_value(value: Any, choices: Iterable[Any]) -> str | None:
    """The choice that a wrong value was probably meant to be."""
    if not isinstance(value, str):
        return None
    texts = [str(choice) for choice in choices]
    meant = _FOREIGN_VALUES.get(value.lower())
    return meant if meant in texts else nearest(value, texts)


def nearest_file(path: str) -> str:
    """``; did you mean "..."?`` with the file of the same folder that looks most like a missing one, or nothing."""
    folder, name = os.path.split(os.path.expanduser(path))
    if folder and not os.path.isdir(folder):
        return f' (the folder "{folder}" does not exist)'
    try:
        found = nearest(name, os.listdir(folder or "."), cutoff=0.7)
    except OSError:
        return ""
    return f'; did you mean "{os.path.join(folder, found)}"?' if found else ""
