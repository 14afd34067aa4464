"""Compile the C sources of this folder on first use, into a per-user cache.

Nothing here raises anything but :class:`BuildError`, whose text is meant for a person: that a machine has no compiler
is an ordinary case, and torch's own optimizer is always there instead.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_name("kernel.c")
_HEADERS = ("kernel.h", "kernel_isa.h", "kernel_formats.h", "kernel_rules.h", "kernel_update.h")
# No -march=native: the cache may be on a home folder shared by machines of several kinds. No contraction: the sources
# say where a fused multiply-add belongs, and the result must not depend on the compiler's choice.
_FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
_DEFAULT_COMPILERS = ("cc", "gcc", "clang")
_VERSION_TIMEOUT_S = 20.0
_COMPILE_TIMEOUT_S = 180.0


class BuildError(Exception):
    """The kernel cannot be built here; the text says why in one line."""


@dataclass(frozen=True)
class Compiler:
    """A C compiler that answered.

    Attributes:
        command: The program and any arguments ``$CC`` carried.
        version: All that ``--version`` printed; part of the cache key.
    """

    command: tuple[str, ...]
    version: str

    @property
    def label(self) -> str:
        """The first line of the version, for logs."""
        return self.version.splitlines()[0] if self.version else self.command[0]


def find_compiler() -> Compiler:
    """Return ``$CC`` if it is set, and only that; otherwise the first of cc, gcc and clang on the path.

    Raises:
        BuildError: None is there, or the one chosen does not run.
    """
    chosen = os.environ.get("CC", "").strip()
    if chosen:
        try:
            command = tuple(shlex.split(chosen))
        except ValueError as error:
            raise BuildError(f"CC={chosen!r} is not a command: {error}") from error
        return _probe(command, f"CC={chosen}")
    for name in _DEFAULT_COMPILERS:
        if shutil.which(name):
            return _probe((name,), name)
    raise BuildError(f"no C compiler: none of {', '.join(_DEFAULT_COMPILERS)} is on the path and CC is not set")


def _probe(command: tuple[str, ...], label: str) -> Compiler:
    try:
        done = _run([*command, "--version"], _VERSION_TIMEOUT_S)
    except OSError as error:
        raise BuildError(f"{label} does not run: {error.strerror or error}") from error
    if done.returncode != 0:
        raise BuildError(f"{label} --version failed with exit status {done.returncode}")
    return Compiler(command, done.stdout.strip())


def build(compiler: Compiler, thread_flags: tuple[str, ...], *, force: bool = False) -> Path:
    """Return the shared object for these flags, compiled now unless the cache has it.

    Processes may build at once: each compiles to a name of its own and renames it into place.

    Args:
        compiler: From :func:`find_compiler`.
        thread_flags: ``("-fopenmp",)`` or ``("-pthread",)``.
        force: Compile even if the cache has it (because what it has does not load).

    Raises:
        BuildError: The compiler failed, or nothing can be written anywhere.
    """
    name = f"kernel-{_key(compiler, thread_flags)}.so"
    for folder in (_cache_folder, _temporary_folder):
        path = folder() / name
        if path.is_file() and not force:
            return path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(prefix=".kernel-", suffix=".so", dir=path.parent)
        except OSError:
            continue
        os.close(handle)
        _compile_to(Path(partial), path, compiler, thread_flags)
        return path
    raise BuildError(f"neither {_cache_folder()} nor a temporary folder can be written")


def _key(compiler: Compiler, thread_flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in (_SOURCE.name, *_HEADERS):
        try:
            digest.update(_SOURCE.with_name(name).read_bytes())
        except OSError as error:
            raise BuildError(f"cannot read {name} beside {Path(__file__).name}: {error.strerror}") from error
    words = (*compiler.command, compiler.version, *_FLAGS, *thread_flags, sys.platform, platform.machine())
    digest.update("\0".join(words).encode())
    return digest.hexdigest()[:20]


def _compile_to(partial: Path, path: Path, compiler: Compiler, thread_flags: tuple[str, ...]) -> None:
    command = [*compiler.command, *_FLAGS, *thread_flags, "-o", str(partial), str(_SOURCE), "-lm"]
    try:
        done = _run(command, _COMPILE_TIMEOUT_S)
        if done.returncode != 0:
            raise BuildError(f"{compiler.command[0]} failed: {_first_error(done.stderr)}")
        partial.chmod(0o755)
        os.replace(partial, path)
    except OSError as error:
        raise BuildError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _run(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    # The C locale keeps messages, hence logs and the cache key, the same everywhere.
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, env=environment, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} did not finish within {timeout_s:.0f} s") from error


def _first_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "cannot find" in line]
    return (telling or lines or ["no message"])[0][:300]


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative XDG_CACHE_HOME is to be ignored, says its specification.
    root = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~")) / ".cache"
    return root / "gemini-zero"


@functools.cache
def _temporary_folder() -> Path:
    """A folder of this process alone: a shared, guessable one would let another user plant a library."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="gemini-zero-"))
    except OSError as error:
        raise BuildError(f"neither {_cache_folder()} nor a temporary folder can be written: {error}") from error
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
