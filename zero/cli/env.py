"""``zero env``: what this machine and this installation are, for a bug report. No secrets, no host or user names."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from rich.table import Table

from gemini import hostinfo
from gemini.units import format_bytes
from zero.optim.build import BuildError, find_compiler
from zero.optim.native import ISA_VARIABLE, native_status
from zero.report.tables import values_table, values_text

_PACKAGES = (
    "gemini-zero",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
    "pydantic",
    "rich",
)
_OPTIONAL_PACKAGES = ("tensorboard", "matplotlib", "peft", "wandb", "trackio", "mlflow")

# Only these are shown: an environment holds tokens and passwords too.
_VARIABLES = (
    "ACCELERATE_TORCH_DEVICE",
    "CC",
    "CUDA_VISIBLE_DEVICES",
    "HF_DATASETS_OFFLINE",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HIP_VISIBLE_DEVICES",
    "LOCAL_RANK",
    "MKL_NUM_THREADS",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_P2P_DISABLE",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF",
    "RANK",
    "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_OFFLINE",
    "WORLD_SIZE",
    ISA_VARIABLE,
    "ZE_AFFINITY_MASK",
)


def collect_env() -> dict[str, str]:
    """Return what there is to know, in the order to show it: name to one-line text.

    A probe that fails becomes an entry that says so: this is what people run when something is broken.
    """
    env: dict[str, str] = {}
    for name, probe in _PROBES.items():
        try:
            env[name] = probe()
        except Exception as error:
            env[name] = f"unknown ({type(error).__name__}: {error})"
    env |= {name: _version_of(name) for name in _PACKAGES}
    env["optional packages"] = ", ".join(f"{name} {_version_of(name)}" for name in _OPTIONAL_PACKAGES)
    env |= {name: _without_home(os.environ[name]) for name in _VARIABLES if name in os.environ}
    return {name: _without_home(text) for name, text in env.items()}


def env_text(env: dict[str, str]) -> str:
    """Return the environment as plain text, one line per entry, ready to be pasted into an issue."""
    return values_text(env)


def env_table(env: dict[str, str]) -> Table:
    """Return the environment as a table for a terminal."""
    return values_table(env)


def env_json(env: dict[str, str]) -> str:
    """Return the environment as JSON."""
    return json.dumps(env, indent=2)


def _platform() -> str:
    # Not platform.platform() of an unknown system: node names must not slip in.
    return f"{platform.system()} {platform.release()}, {platform.machine()}"


def _python() -> str:
    return f"{platform.python_version()} ({platform.python_implementation()})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def _cores() -> str:
    import torch

    physical = psutil.cpu_count(logical=False)
    quota = hostinfo.cgroup_cpu_quota()
    return (
        f"{hostinfo.cpu_count()} usable, {psutil.cpu_count()} logical, "
        f"{'unknown' if physical is None else physical} physical, "
        f"cgroup quota {'none' if quota is None else f'{quota:.2f}'}, torch uses {torch.get_num_threads()} threads"
    )


def _host_memory() -> str:
    memory = hostinfo.host_memory()
    limits = f"{format_bytes(memory.available_bytes)} available of {format_bytes(memory.total_bytes)}"
    swap = f"swap {format_bytes(int(psutil.swap_memory().total))}"
    physical = int(psutil.virtual_memory().total)
    machine = "" if physical == memory.total_bytes else f", the machine has {format_bytes(physical)}"
    return f"{limits} (limit: {memory.limit_source}{machine}), {swap}"


def _disk() -> str:
    usage = shutil.disk_usage(Path.cwd())
    return f"{format_bytes(usage.free)} free of {format_bytes(usage.total)} in the working directory"


def _accelerators() -> str:
    import torch

    if not torch.accelerator.is_available():
        return "none: the simulated device and the CPU can be used"
    kind = torch.accelerator.current_accelerator()
    module = torch.get_device_module(kind)
    found = []
    for index in range(torch.accelerator.device_count()):
        free_bytes, total_bytes = torch.accelerator.get_memory_info(index)
        memory = f"{format_bytes(free_bytes)} free of {format_bytes(total_bytes)}"
        found.append(f"{index}: {module.get_device_name(index)}, {memory}")
    return f"{kind.type if kind else 'unknown'} " + "; ".join(found)


def _driver() -> str:
    import torch

    built = {"CUDA": torch.version.cuda, "HIP": torch.version.hip, "XPU": getattr(torch.version, "xpu", None)}
    return ", ".join(f"{name} {number}" for name, number in built.items() if number) or "CPU only"


def _pinned_memory() -> str:
    import torch

    if not torch.accelerator.is_available():
        return "not possible: no accelerator"
    is_pinned = torch.empty(1, pin_memory=True).is_pinned()
    import resource

    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if limit_bytes == resource.RLIM_INFINITY else format_bytes(limit_bytes)
    return f"{'possible' if is_pinned else 'not possible'} (memlock limit {limit})"


def _distributed() -> str:
    import torch.distributed as dist

    if not dist.is_available():
        return "not built in"
    names = [name for name in ("gloo", "nccl", "mpi", "ucc", "xccl") if dist.is_backend_available(name)]
    return ", ".join(names) or "none"


def _compiler() -> str:
    try:
        return find_compiler().label
    except BuildError as error:
        return str(error)


_PROBES: dict[str, Callable[[], str]] = {
    "platform": _platform,
    "processor": _processor,
    "cores": _cores,
    "host memory": _host_memory,
    "disk": _disk,
    "accelerators": _accelerators,
    "torch built for": _driver,
    "pinned memory": _pinned_memory,
    "distributed backends": _distributed,
    "C compiler": _compiler,
    "native AdamW": native_status,
    "python": _python,
}


def _version_of(package: str) -> str:
    """Return the installed version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _without_home(text: str) -> str:
    """Return text with the user's folder as ``~``: its name is often a person's."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text
