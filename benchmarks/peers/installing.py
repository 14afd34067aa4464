"""An environment of the peers' own: transformers imports DeepSpeed wherever it is installed, so it must not be ours.

The folder is kept. DeepSpeed's kernels are compiled for the CPU there at the first run, which takes a minute or two.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

DEEPSPEED = "0.19.8"
_KERNELS = {"cpu_adam": "CPUAdamBuilder", "deepspeed_shm_comm": "ShareMemCommBuilder"}
"""Its folders of compiled code, and what fills them."""


def peers_python(folder: Path) -> Path:
    """The interpreter of the peers' environment, which is made first if it is not there.

    torch and transformers are of our own versions, so that only the systems differ.

    Raises:
        subprocess.CalledProcessError: something could not be installed.
    """
    python = folder / "bin" / "python"
    wanted = {
        "torch": version("torch").partition("+")[0],
        "transformers": version("transformers"),
        "deepspeed": DEEPSPEED,
    }
    if not python.exists():
        sys.stderr.write(f"installing the peers into {folder}: {wanted}\n")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if _versions(python) != wanted:
        _install(python, wanted)
    _build(python)
    return python


def peers_environment(python: Path) -> dict[str, str]:
    """What the peers' processes find in their environment beside the usual."""
    return {
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(_extensions(python)),  # kept: a build takes minutes
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",  # ninja
        "PYTHONPATH": "",
    }


def _extensions(python: Path) -> Path:
    return python.parent.parent / "torch_extensions"


def _install(python: Path, wanted: dict[str, str]) -> None:
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"torch=={wanted['torch']}"], check=True)
    subprocess.run(
        [*pip, f"transformers=={wanted['transformers']}", "psutil", "setuptools", "wheel", "ninja"], check=True
    )
    # Its setup asks torch what to build: nothing now, what is needed later.
    environment = os.environ | {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    command = [*pip, "--no-build-isolation", f"deepspeed=={DEEPSPEED}"]
    subprocess.run(command, check=True, env=environment)


def _build(python: Path) -> None:
    """Compiles what DeepSpeed would compile in the first run."""
    folder = _extensions(python)
    missing = {name: builder for name, builder in _KERNELS.items() if not any((folder / name).glob("*.so"))}
    if not missing:
        return
    sys.stderr.write(f"compiling {', '.join(missing)}: minutes, once\n")
    for name in missing:  # of a build that was killed: everyone after it would wait for ever
        (folder / name / "lock").unlink(missing_ok=True)
    calls = "".join(f"builder.{name}().load()\n" for name in missing.values())
    script = f"import deepspeed.ops.op_builder.cpu as builder\n{calls}"
    subprocess.run(
        [str(python), "-c", script], check=True, capture_output=True, env=os.environ | peers_environment(python)
    )


def _versions(python: Path) -> dict[str, str]:
    names = ("torch", "transformers", "deepspeed")
    script = (
        "from importlib.metadata import version, PackageNotFoundError\n"
        f"for name in {names!r}:\n"
        "    try: print(name, version(name).partition('+')[0])\n"
        "    except PackageNotFoundError: pass\n"
    )
    said = subprocess.run([str(python), "-c", script], check=True, capture_output=True, text=True).stdout
    return dict(line.split() for line in said.splitlines())  # type: ignore[misc]
