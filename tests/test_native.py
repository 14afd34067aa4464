"""The native AdamW against torch: its arithmetic, its roundings, and every way in which it may fail to be built."""

from __future__ import annotations

import logging
import math
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zero.errors import UserError
from zero.optim import native
from zero.optim.build import BuildError, build, find_compiler
from zero.optim.native import NativeKernel, load_native, native_status, require_native

ISAS = ("avx512", "avx2", "generic")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (0, 1, 7, 8, 15, 16, 17, 31, 63, 64, 65, 1000, 100_003)
PLAIN: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "step": 1}
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=ISAS)
def kernel(request: pytest.FixtureRequest) -> NativeKernel:
    """The kernel for each instruction set this machine has."""
    best_kernel()
    found = load_native(request.param)
    if found is None:
        pytest.skip(f"this machine has no {request.param}")
    return found


def best_kernel() -> NativeKernel:
    """Skips without a compiler; with one, a kernel that cannot be had is a failure."""
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    return require_native()


def available_kernels() -> list[NativeKernel]:
    best_kernel()
    return [kernel for isa in ISAS if (kernel := load_native(isa)) is not None]


@pytest.fixture
def best() -> NativeKernel:
    return best_kernel()


def make_state(numel: int, grad_dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Master, exp_avg, exp_avg_sq and grad, with magnitudes over several decades."""
    generator = torch.Generator().manual_seed(seed)
    master = torch.randn(numel, generator=generator)
    grad = make_grad(numel, generator).to(grad_dtype)
    return [master, 0.01 * torch.randn(numel, generator=generator), torch.rand(numel, generator=generator) * 1e-4, grad]


def make_grad(numel: int, generator: torch.Generator) -> Tensor:
    decades = 10 ** (torch.rand(numel, generator=generator) * 4 - 4)
    return torch.randn(numel, generator=generator) * decades


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def assert_same_bits(*pairs: tuple[Tensor, Tensor]) -> None:
    for got, want in pairs:
        assert torch.equal(bits(got), bits(want))


def assert_close_to_torch(got: Tensor, want: Tensor, reach: float) -> None:
    """Within 1e-6 of the value or, for values near zero, of the distance ``reach`` they have come."""
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * reach)


# Arithmetic


@pytest.mark.parametrize("grad_dtype", FLOATS)
@pytest.mark.parametrize(
    "settings",
    [
        {"decoupled": True, "weight_decay": 0.0},
        {"decoupled": True, "weight_decay": 0.1},
        {"decoupled": False, "weight_decay": 0.1},
        {"decoupled": True, "weight_decay": 0.1, "maximize": True},
        {"decoupled": False, "weight_decay": 0.1, "maximize": True},
        {"decoupled": True, "weight_decay": 0.1, "grad_scale": 0.37 / 1024},
        {"decoupled": True, "weight_decay": 0.1, "betas": (0.3, 0.5), "eps": 1e-3},
    ],
    ids=lambda settings: "-".join(f"{key}={value}" for key, value in settings.items()),
)
def test_agrees_with_torch_after_100_steps(grad_dtype: torch.dtype, settings: dict[str, Any]) -> None:
    kernels = available_kernels()
    numel, num_steps, lr = 1000, 100, 1e-3
    chosen = {"betas": (0.9, 0.999), "eps": 1e-8, "maximize": False, "grad_scale": 1.0, **settings}
    generator = torch.Generator().manual_seed(1)
    weights = torch.nn.Parameter(torch.randn(numel, generator=generator))
    states = [[weights.detach().clone(), torch.zeros(numel), torch.zeros(numel)] for _ in kernels]
    common = {key: value for key, value in chosen.items() if key not in ("decoupled", "grad_scale")}
    kind = torch.optim.AdamW if chosen["decoupled"] else torch.optim.Adam
    optimizer = kind([weights], lr=lr, foreach=False, fused=False, **common)
    for step in range(1, num_steps + 1):
        grad = (make_grad(numel, generator) / chosen["grad_scale"]).to(grad_dtype)
        weights.grad = grad.float() * chosen["grad_scale"]
        optimizer.step()
        for kernel, state in zip(kernels, states, strict=True):
            kernel.adamw(*state, grad, None, lr=lr, step=step, **chosen)
    mean, square = optimizer.state[weights]["exp_avg"], optimizer.state[weights]["exp_avg_sq"]
    for state in states:
        assert_close_to_torch(state[0], weights.detach(), num_steps * lr)
        assert_close_to_torch(state[1], mean, mean.abs().max().item())
        assert_close_to_torch(state[2], square, square.max().item())
        assert (state[0] - weights.detach()).norm() <= 1e-7 * weights.detach().norm()


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", FLOATS)
def test_lengths_and_unaligned_starts(
    kernel: NativeKernel, grad_dtype: torch.dtype, out_dtype: torch.dtype | None
) -> None:
    for numel in LENGTHS:
        for offset in (0, 1, 3) if numel < 1000 else (3,):
            check_slice(kernel, numel, offset, grad_dtype, out_dtype)


def check_slice(
    kernel: NativeKernel, numel: int, offset: int, grad_dtype: torch.dtype, out_dtype: torch.dtype | None
) -> None:
    """One step on a slice of larger tensors changes the slice as torch would, and nothing around it."""
    whole = make_state(numel + 16, grad_dtype, seed=numel)
    before = [tensor.clone() for tensor in whole]
    out = None if out_dtype is None else torch.full((numel + 16,), 7.0, dtype=out_dtype)
    part = slice(offset, offset + numel)
    master, exp_avg, exp_avg_sq, grad = (tensor[part] for tensor in whole)
    kernel.adamw(master, exp_avg, exp_avg_sq, grad, None if out is None else out[part], **PLAIN)
    want = reference_step(*(tensor[part] for tensor in before))
    for got, wanted in zip((master, exp_avg, exp_avg_sq), want, strict=True):
        assert_close_to_torch(got, wanted, max([0.01, *wanted.abs().tolist()]) if numel < 100 else 1.0)
    for tensor, old in zip(whole, before, strict=True):
        assert_same_bits((tensor[:offset], old[:offset]), (tensor[offset + numel :], old[offset + numel :]))
    assert_same_bits((grad, before[3][part]))
    if out is not None:
        assert_same_bits((out[part], master.to(out.dtype)))
        assert bool((out[:offset] == 7).all())
        assert bool((out[offset + numel :] == 7).all())


def reference_step(master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Step 1 of PLAIN, spelled out with torch's operations."""
    decayed = master * (1 - 1e-3 * 0.1)
    mean = exp_avg.lerp(grad.float(), 1 - 0.9)
    square = (exp_avg_sq * 0.999).addcmul(grad.float(), grad.float(), value=1 - 0.999)
    denominator = (square.sqrt() / math.sqrt(1 - 0.999)) + 1e-8
    return decayed.addcdiv(mean, denominator, value=-1e-3 / (1 - 0.9)), mean, square


def test_an_element_does_not_depend_on_its_place(kernel: NativeKernel) -> None:
    whole = make_state(1000, torch.bfloat16)
    pieces = [tensor.clone() for tensor in whole]
    kernel.adamw(*whole, None, **PLAIN)
    for begin, end in ((0, 1), (1, 38), (38, 500), (500, 501), (501, 1000)):
        kernel.adamw(*(tensor[begin:end] for tensor in pieces), None, **PLAIN)
    assert_same_bits(*zip(pieces, whole, strict=True))


@pytest.mark.parametrize("offset", [0, 5])
def test_threads_do_not_change_bits(kernel: NativeKernel, offset: int) -> None:
    """Long enough for streaming stores, with a start off their alignment and a ragged end."""
    numel = (1 << 20) + 70_001
    states = [make_state(numel, torch.bfloat16) for _ in range(3)]
    outs = [torch.zeros(numel, dtype=torch.bfloat16) for _ in states]
    for state, out, num_threads in zip(states, outs, (1, 2, 5), strict=True):
        parts = [tensor[offset:] for tensor in state]
        kernel.adamw(*parts, out[offset:], num_threads=num_threads, **PLAIN)
    assert_same_bits((outs[0][offset:], states[0][0][offset:].bfloat16()))
    for state, out in zip(states[1:], outs[1:], strict=True):
        assert_same_bits((out, outs[0]), *zip(state, states[0], strict=True))


def test_instruction_sets_agree_to_the_bit() -> None:
    kernels = [kernel for isa in ("avx512", "avx2") if (kernel := load_native(isa)) is not None]
    if len(kernels) < 2:
        pytest.skip("this machine has but one of AVX-512 and AVX2")
    states = [make_state(100_003, torch.float16) for _ in kernels]
    for kernel, state in zip(kernels, states, strict=True):
        for step in range(1, 6):
            kernel.adamw(*state, None, **{**PLAIN, "step": step})
    assert_same_bits(*zip(*states, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1000, (1 << 20) + 17])
def test_weights_may_take_the_place_of_the_gradient(kernel: NativeKernel, dtype: torch.dtype, numel: int) -> None:
    apart, shared = make_state(numel, dtype), make_state(numel, dtype)
    out = torch.empty(numel, dtype=dtype)
    kernel.adamw(*apart, out, **PLAIN)
    kernel.adamw(*shared, shared[3], **PLAIN)
    assert_same_bits((shared[3], out), *zip(shared[:3], apart[:3], strict=True))


# Roundings


def special_patterns() -> Tensor:
    """Every upper half of an fp32 (so infinities, NaN, denormals too) with lower halves around each way to round."""
    upper = torch.arange(65536, dtype=torch.int64).unsqueeze(1) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x0FFF, 0x1001, 0xF000, 0xE000, 0xEFFF])
    return (upper + lower).flatten().to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_torchs_to_the_bit(kernel: NativeKernel, dtype: torch.dtype) -> None:
    """A learning rate of zero leaves the weights alone, so that `out` is their cast."""
    master = special_patterns()
    want, patterns = master.to(dtype), master.clone()
    out = torch.empty(master.numel(), dtype=dtype)
    moments = torch.zeros(2, master.numel())
    grad = torch.zeros(master.numel(), dtype=dtype)
    kernel.adamw(master, moments[0], moments[1], grad, out, **{**PLAIN, "lr": 0.0})
    nan = patterns.isnan()
    assert torch.equal(out.isnan(), nan)
    assert torch.equal(bits(out)[~nan], bits(want)[~nan])
    assert torch.equal(bits(master)[~nan], bits(patterns)[~nan])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_gradient_is_read_exactly(kernel: NativeKernel, dtype: torch.dtype) -> None:
    """With beta1 = 0 the first moment becomes the gradient (but for infinities: torch's lerp makes NaN of them)."""
    grad = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    master, exp_avg, exp_avg_sq = torch.zeros(3, grad.numel())
    want = exp_avg.lerp(grad.float(), 1.0)
    kernel.adamw(master, exp_avg, exp_avg_sq, grad, None, **{**PLAIN, "betas": (0.0, 0.999)})
    torch.testing.assert_close(exp_avg, want, rtol=0.0, atol=0.0, equal_nan=True)


# Numbers at the edge


def test_edge_values_go_torchs_way(kernel: NativeKernel) -> None:
    inf, nan = math.inf, math.nan
    grad = torch.tensor([0.0, -0.0, 1e30, -1e30, inf, -inf, nan, 1e-30, 1e-45, 1.0, 0.0, 1.0])
    master = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, inf, -inf, nan])
    for eps in (1e-8, 0.0):
        for decoupled in (True, False):
            check_edge(kernel, master, grad, eps, decoupled)


def check_edge(kernel: NativeKernel, master: Tensor, grad: Tensor, eps: float, decoupled: bool) -> None:
    weights = torch.nn.Parameter(master.clone())
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    decay = 0.1 if decoupled else 0.0
    optimizer = kind([weights], lr=1e-3, eps=eps, weight_decay=decay, foreach=False, fused=False)
    got = [master.clone(), torch.zeros_like(master), torch.zeros_like(master)]
    for step in (1, 2):
        weights.grad = grad.clone()
        optimizer.step()
        settings = {**PLAIN, "step": step, "eps": eps, "weight_decay": decay}
        kernel.adamw(*got, grad.clone(), None, decoupled=decoupled, **settings)
    state = optimizer.state[weights]
    for mine, torchs in zip(got, (weights.detach(), state["exp_avg"], state["exp_avg_sq"]), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-6, atol=0.0, equal_nan=True)


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"master": torch.zeros(8, dtype=torch.float64)}, "master must be torch.float32"),
        ({"exp_avg": torch.zeros(8, dtype=torch.bfloat16)}, "exp_avg must be torch.float32"),
        ({"exp_avg_sq": torch.zeros(9)}, "same numel"),
        ({"grad": torch.zeros(8, dtype=torch.int32)}, "grad must be"),
        ({"grad": torch.zeros(16)[::2]}, "grad must be a contiguous"),
        ({"grad": torch.zeros(2, 4)}, "one-dimensional"),
        ({"grad": torch.zeros(8, device="meta")}, "CPU"),
        ({"out": torch.zeros(8)}, "out must be"),
        ({"out": torch.zeros(7, dtype=torch.bfloat16)}, "same numel"),
        ({"step": 0}, "step counts from 1"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"num_threads": 0}, "num_threads"),
    ],
)
def test_bad_arguments_are_refused(best: NativeKernel, change: dict[str, Any], message: str) -> None:
    names = ("master", "exp_avg", "exp_avg_sq", "grad", "out")
    arguments = {**{name: torch.zeros(8) for name in names}, "out": None, **PLAIN, **change}
    tensors = [arguments.pop(name) for name in names]
    with pytest.raises(ValueError, match=message):
        best.adamw(*tensors, **arguments)


def test_overlapping_tensors_are_refused(best: NativeKernel) -> None:
    slab, other, third = torch.zeros(12), torch.zeros(8), torch.zeros(8)
    with pytest.raises(ValueError, match="overlap"):
        best.adamw(slab[:8], slab[4:], other, third, None, **PLAIN)
    halves = torch.zeros(9, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="overlap"):
        best.adamw(slab[:8], other, third, halves[:8], halves[1:], **PLAIN)


# Building


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
FAILING = 'case "$*" in *--version*) echo fake 1.0;; *) echo "adamw.c:1: error: no such luck" >&2; exit 1;; esac'
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
        (FAILING, "adamw.c:1: error: no such luck"),
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
    with pytest.raises(UserError, match="'mmx' is not one of avx512, avx2, generic"):
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
