"""What the tests of the native AdamW share."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch
from torch import Tensor

from zero.optim.build import BuildError, find_compiler
from zero.optim.native import NativeKernel, require_native

ISAS = ("neon",) if platform.machine() in ("aarch64", "arm64") else ("avx512", "avx2", "generic")
PLAIN: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "step": 1}


def best_kernel() -> NativeKernel:
    """Skips without a compiler; with one, a kernel that cannot be had is a failure."""
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    return require_native()


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
