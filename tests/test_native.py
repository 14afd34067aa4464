"""The native AdamW against torch: its arithmetic, its roundings and its refusals."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from native_helpers import ISAS, PLAIN, assert_same_bits, best_kernel, bits, make_grad, make_state
from torch import Tensor

from zero.optim.native import NativeKernel, load_native

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (0, 1, 7, 8, 15, 16, 17, 31, 63, 64, 65, 1000, 100_003)


@pytest.fixture(params=ISAS)
def kernel(request: pytest.FixtureRequest) -> NativeKernel:
    """The kernel for each instruction set this machine has."""
    best_kernel()
    found = load_native(request.param)
    if found is None:
        pytest.skip(f"this machine has no {request.param}")
    return found


def available_kernels() -> list[NativeKernel]:
    best_kernel()
    return [kernel for isa in ISAS if (kernel := load_native(isa)) is not None]


@pytest.fixture
def best() -> NativeKernel:
    return best_kernel()


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


def test_python_threads_may_step_at_once(best: NativeKernel) -> None:
    """Each with a team of its own, which ends with it; on states of their own and on parts of the same."""
    numel, num_workers = 300_000, 4
    want, shared = make_state(numel, torch.bfloat16), make_state(numel, torch.bfloat16)
    own = [make_state(numel, torch.bfloat16) for _ in range(num_workers)]
    best.adamw(*want, None, num_threads=1, **PLAIN)

    def work(number: int) -> None:
        best.adamw(*own[number], None, num_threads=2, **PLAIN)
        part = slice(number * numel // num_workers, (number + 1) * numel // num_workers)
        best.adamw(*(tensor[part] for tensor in shared), None, num_threads=2, **PLAIN)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(num_workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for state in (*own, shared):
        assert_same_bits(*zip(state, want, strict=True))


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
