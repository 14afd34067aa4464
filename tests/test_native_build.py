"""The native AdamW's build: its cache, its threads, and every way in which it may fail."""

from __future__ import annotations

import logging
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from native_helpers import PLAIN, assert_same_bits, best_kernel, make_state

from zero.errors import UserError
from zero.optim import native
from zero.optim.build import build, find_compiler
from zero.optim.native import NativeKernel, load_native, native_status, require_native

ROOT = Path(__file__).resolve().parent.parent
PROBE = """
import logging
logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
from zero.optim.native import load_native
kernel = load_native()
assert load_native() is kernel
print(kernel.isa if kernel else None)
print(kernel.path if kernel else None)
"""
# Without torch, so that it is quick.
BUILD_PROBE = """
from zero.optim.build import BuildError, build, find_compiler
print(build(find_compiler(), ("-pthread",)))
"""

# Stand-ins for the compiler. No optimisation makes a build take less than a second.
QUICK = 'exec $REAL "$@" -O0'
COUNTED = f'echo "$*" >> "$(dirname "$0")/calls"\n{QUICK}'
NO_OPENMP = f'case "$*" in *-fopenmp*) echo "error: unsupported option -fopenmp" >&2; exit 1;; esac\n{QUICK}'
FAILING = 'case "$*" in *--version*) echo fake 1.0;; *) echo "kernel.c:1: error: no such luck" >&2; exit 1;; esac'
NOT_A_LIBRARY = """
case "$*" in *--version*) echo fake 1.0; exit;; esac
while [ "$1" != -o ]; do shift; done
echo nonsense > "$2"
"""
WRONG_NUMBERS = 'exec $REAL "$@" -O0 -Dsqrtf=fabsf'


def write_compiler(folder: Path, script: str) -> str:
    """A shell script in the compiler's place; it knows the real one as $REAL."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\nREAL={os.environ.get('CC') or 'cc'}\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def start(probe: str, cache: Path, compiler: str, **environment: str) -> subprocess.Popen[str]:
    values = {**os.environ, "XDG_CACHE_HOME": str(cache), "CC": compiler, **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", probe], env=values, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[list[str], list[str]]:
    """The lines of stdout and of the log."""
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return stdout.splitlines(), stderr.splitlines()


@pytest.fixture
def best() -> NativeKernel:
    return best_kernel()


class FreshBuild:
    """What this process would do on its first use, with a cache of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.records, self._monkeypatch = folder, list[logging.LogRecord](), monkeypatch
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        self.forget()

    def forget(self) -> None:
        self._monkeypatch.setattr(native, "_outcomes", {})
        self._monkeypatch.setattr(native, "_announced", set())

    def use_compiler(self, script: str) -> None:
        self._monkeypatch.setenv("CC", write_compiler(self.folder, script))

    @property
    def cached(self) -> list[Path]:
        return list((self.folder / "gemini-zero").glob("*"))


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FreshBuild]:
    found = FreshBuild(tmp_path, monkeypatch)
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", found.records.append)
    native.logger.addHandler(handler)
    yield found
    native.logger.removeHandler(handler)


def test_without_a_compiler_torch_is_taken_and_said(tmp_path: Path) -> None:
    stdout, log = finish(start(PROBE, tmp_path, "/nowhere"))
    assert stdout == ["None", "None"]
    reason = "CC=/nowhere does not run: No such file or directory"
    assert log == [f"WARNING native AdamW is not available ({reason}); torch's AdamW is used instead"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "--version failed with exit status 3"),
        (FAILING, "kernel.c:1: error: no such luck"),
        (NOT_A_LIBRARY, "file too short"),
        (WRONG_NUMBERS, "computes wrong numbers"),
    ],
    ids=["broken", "failing", "not-a-library", "wrong-numbers"],
)
def test_a_bad_compiler_is_said_once(fresh: FreshBuild, script: str, reason: str) -> None:
    fresh.use_compiler(script)
    isa = "generic" if script == WRONG_NUMBERS else None
    assert load_native(isa) is None
    assert load_native(isa) is None
    assert [record.levelname for record in fresh.records] == ["WARNING"]
    assert reason in fresh.records[0].getMessage()
    with pytest.raises(UserError, match=reason):
        require_native(isa)
    if isa is None:
        assert native_status().startswith("not available (")


def test_no_compiler_on_the_path(fresh: FreshBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(fresh.folder))
    with pytest.raises(UserError, match="none of cc, gcc, clang is on the path.*Install gcc or clang"):
        require_native()


def test_an_unknown_instruction_set(fresh: FreshBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZERO_NATIVE_ISA", "mmx")
    with pytest.raises(UserError, match="'mmx' is not one of avx512, avx2, neon, generic"):
        require_native()


def test_four_processes_build_at_once(best: NativeKernel, fresh: FreshBuild) -> None:
    compiler = write_compiler(fresh.folder, QUICK)
    results = [finish(process) for process in [start(BUILD_PROBE, fresh.folder, compiler) for _ in range(4)]]
    assert {tuple(stdout) for stdout, _ in results} == {(str(path),) for path in fresh.cached}
    assert len(fresh.cached) == 1
    assert NativeKernel(fresh.cached[0]).isa == best.isa


def test_a_built_kernel_is_not_compiled_again(best: NativeKernel, fresh: FreshBuild) -> None:
    fresh.use_compiler(COUNTED)
    paths = []
    for _ in range(2):
        paths.append(require_native().path)
        fresh.forget()
    assert paths[0] == paths[1]
    assert [path.name for path in fresh.cached] == [paths[0].name]
    calls = (fresh.folder / "calls").read_text().splitlines()
    assert ["--version" in call for call in calls] == [True, False, True]


def test_a_cache_that_cannot_be_written(best: NativeKernel, tmp_path: Path) -> None:
    """The build goes to a folder of the process alone, gone when it ends."""
    (tmp_path / "file").write_text("")
    compiler = write_compiler(tmp_path, QUICK)
    stdout, log = finish(start(PROBE, tmp_path / "file", compiler, TMPDIR=str(tmp_path)))
    assert stdout[0] == best.isa
    assert len(log) == 1
    assert Path(stdout[1]).parent.parent == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compiler", "file"]


def test_a_damaged_cache_is_built_again(best: NativeKernel, fresh: FreshBuild) -> None:
    fresh.use_compiler(QUICK)
    path = build(find_compiler(), ("-fopenmp",) if best.uses_openmp else ("-pthread",))
    path.write_text("nonsense")
    assert require_native().path == path


def test_a_compiler_without_openmp(best: NativeKernel, fresh: FreshBuild) -> None:
    """Plain threads then, with the same bits."""
    fresh.use_compiler(NO_OPENMP)
    plain = require_native()
    assert not plain.uses_openmp
    assert "plain threads" in native_status()
    numel = 300_001
    states = [make_state(numel, torch.bfloat16) for _ in range(2)]
    plain.adamw(*states[0], None, num_threads=3, **PLAIN)
    best.adamw(*states[1], None, num_threads=1, **PLAIN)
    assert_same_bits(*zip(*states, strict=True))


def test_a_forked_child_can_step(best: NativeKernel) -> None:
    state = make_state(200_000)
    best.adamw(*state, None, num_threads=2, **PLAIN)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that hangs must not outlive the test
        best.adamw(*state, None, num_threads=2, **PLAIN)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_second_openmp_runtime_is_loaded(best: NativeKernel) -> None:
    if not best.uses_openmp:
        pytest.skip("built without OpenMP")
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(loaded) == 1
