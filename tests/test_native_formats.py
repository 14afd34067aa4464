"""The formats of optimizer states: exact where they say so, and the same in C and in torch."""

from __future__ import annotations

import pytest
import torch
from native_helpers import ISAS, assert_same_bits, best_kernel, bits, make_grad
from native_reference import torch_step
from torch import Tensor

from gemini.segment import MASTER
from zero.errors import ConfigError
from zero.optim.formats import (
    BLOCK_NUMEL,
    FORMATS,
    MASTER_LOW,
    MEAN,
    MEAN_SCALE,
    SQUARE,
    SQUARE_SCALE,
    Noise,
    StateFormat,
    state_format,
)
from zero.optim.native import NativeKernel, load_native
from zero.optim.native_rules import AdamRule, LionRule

NUMEL = 3 * BLOCK_NUMEL + 77
INEXACT = [FORMATS["bf16"], FORMATS["8bit"]]
COMPACT = [FORMATS["split"], *INEXACT]
STILL = AdamRule(lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, step=1)


def rule(step: int = 1, **changes: float) -> AdamRule:
    return AdamRule(**{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "step": step, **changes})


@pytest.fixture(params=ISAS)
def kernel(request: pytest.FixtureRequest) -> NativeKernel:
    """The kernel for each instruction set this machine has."""
    best_kernel()
    found = load_native(request.param)
    if found is None:
        pytest.skip(f"this machine has no {request.param}")
    return found


class States:
    """Buffers and weights of a format, from the same fp32 states each time."""

    def __init__(self, form: StateFormat, numel: int = NUMEL, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.form, self.numel = form, numel
        self.values = torch.zeros(numel, dtype=torch.bfloat16)
        self.buffers = form.new_buffers(numel)
        master = 0.02 * torch.randn(numel, generator=generator)
        mean = make_grad(numel, generator)
        form.encode({MASTER: master, MEAN: mean, SQUARE: mean * mean}, self.buffers, self.values)

    def native(self, kernel: NativeKernel, grad: Tensor, step: AdamRule, **options: object) -> States:
        kernel.step(step, self.buffers, grad, self.values, form=self.form, **options)
        return self

    def torch(self, grad: Tensor, step: AdamRule, **options: object) -> States:
        torch_step(step, self.buffers, grad, self.values, form=self.form, **options)
        return self

    def decoded(self) -> dict[str, Tensor]:
        return self.form.decode(self.buffers, self.values)


def same(left: States, right: States) -> bool:
    pairs = [(left.values, right.values), *((left.buffers[key], right.buffers[key]) for key in left.buffers)]
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def gradients(dtype: torch.dtype, numel: int = NUMEL, seed: int = 9) -> Tensor:
    return make_grad(numel, torch.Generator().manual_seed(seed)).to(dtype)


# -- split -------------------------------------------------------------------------------------------------------------


def every_rounding() -> Tensor:
    """All 2^16 lower halves under uppers of each kind: zero, denormal, even, odd, the greatest, infinity, NaN, negative."""
    upper = torch.tensor([0, 1, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x7FC0, 0x8000, 0x8001, 0xBF80, 0xBF81, 0xFF7F, 0xFF80])
    patterns = (upper.unsqueeze(1) << 16) + torch.arange(65536)
    return patterns.flatten().to(torch.int32).view(torch.float32)


def check_split(got: dict[str, Tensor], values: Tensor, master: Tensor, square: Tensor) -> None:
    nan = master.isnan()
    assert torch.equal(got[MASTER].isnan(), nan)
    assert torch.equal(bits(got[MASTER])[~nan], bits(master)[~nan])
    assert torch.equal(bits(values)[~nan], bits(master.bfloat16())[~nan])
    assert_same_bits((got[SQUARE], square))


def test_split_holds_every_master_to_the_bit() -> None:
    form, master = FORMATS["split"], every_rounding()
    square = torch.linspace(0, 1, master.numel())
    buffers, values = form.new_buffers(master.numel()), torch.zeros(master.numel(), dtype=torch.bfloat16)
    form.encode({MASTER: master, MEAN: square, SQUARE: square}, buffers, values)
    check_split(form.decode(buffers, values), values, master, square)
    assert bool((buffers[SQUARE] < 0).any())  # some tie needed the sign


def test_split_stays_as_it_is_in_a_step_that_moves_nothing(kernel: NativeKernel) -> None:
    """The kernel's own rounding, for the same masters; beta2 = 0 and a gradient of zero clear the second moment."""
    form, master = FORMATS["split"], every_rounding()
    zeros, values = torch.zeros_like(master), torch.zeros(master.numel(), dtype=torch.bfloat16)
    buffers = form.new_buffers(master.numel())
    form.encode({MASTER: master, MEAN: zeros, SQUARE: zeros}, buffers, values)
    kernel.step(STILL, buffers, zeros, values, form=form)
    check_split(form.decode(buffers, values), values, master, zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_split_computes_what_fp32_states_do(kernel: NativeKernel, dtype: torch.dtype) -> None:
    """On ties, too: the gradients are tame enough for masters of few bits."""
    split, plain = States(FORMATS["split"]), States(FORMATS["fp32"])
    plain.buffers[MASTER].copy_(split.decoded()[MASTER])
    plain.values.copy_(split.values)
    for step in range(1, 30):
        grad = gradients(dtype, seed=step)
        for states in (split, plain):
            states.native(kernel, grad, rule(step, lr=2.0**-8, grad_scale=0.5))
        decoded = split.decoded()
        assert_same_bits(*((decoded[key], plain.buffers[key]) for key in decoded), (split.values, plain.values))


def test_split_in_torch_computes_what_fp32_states_do() -> None:
    split, plain = States(FORMATS["split"]), States(FORMATS["fp32"])
    for step in range(1, 10):
        grad = gradients(torch.bfloat16, seed=step)
        for states in (split, plain):
            states.torch(grad, rule(step))
        decoded = split.decoded()
        assert_same_bits(*((decoded[key], plain.buffers[key]) for key in decoded), (split.values, plain.values))


@pytest.mark.parametrize("form", INEXACT, ids=str)
def test_other_formats_keep_as_much_of_the_master_as_they_say(kernel: NativeKernel, form: StateFormat) -> None:
    """All of it, or 24 bits of it, whatever the tie; the weights are its nearest neighbour in bf16."""
    master = every_rounding()
    if form.name == "8bit":
        master = (master.view(torch.int32) & -0x100).view(torch.float32)
    zeros, values = torch.zeros_like(master), torch.zeros(master.numel(), dtype=torch.bfloat16)
    buffers, nan = form.new_buffers(master.numel()), master.isnan()
    form.encode({MASTER: master, MEAN: zeros, SQUARE: zeros}, buffers, values)
    for _ in range(2):
        assert_same_bits((form.decode(buffers, values)[MASTER][~nan], master[~nan]))
        assert bool(values[nan].isnan().all())
        ties = (master.view(torch.int32) & 0xFFFF) == 0x8000
        assert_same_bits((values[~nan & ~ties], master.bfloat16()[~nan & ~ties]))
        kernel.step(STILL, buffers, zeros, values, form=form, noise=Noise())


def test_a_negative_second_moment_is_refused() -> None:
    states = States(FORMATS["split"])
    decoded = states.decoded()
    decoded[SQUARE][3] = -1.0
    with pytest.raises(ValueError, match="exp_avg_sq has negative elements"):
        states.form.encode(decoded, states.buffers, states.values)


# -- all but fp32 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", COMPACT, ids=str)
def test_bytes_are_those_of_the_buffers(form: StateFormat) -> None:
    for numel in (0, 1, 1000):
        assert form.state_bytes(numel) == sum(b.numel() * b.element_size() for b in form.new_buffers(numel).values())
    per_numel = 2 + 2 + form.state_bytes(1 << 20) / (1 << 20)  # weights and gradient
    assert per_numel == pytest.approx({"split": 14, "bf16": 10, "8bit": 7.03125}[form.name])


@pytest.mark.parametrize("form", COMPACT, ids=str)
def test_decoded_states_are_encoded_as_they_were(form: StateFormat) -> None:
    states, again = States(form), States(form, seed=1)
    for step in range(1, 4):
        states.torch(gradients(torch.bfloat16, seed=step), rule(step), noise=Noise(step=step))
    form.encode(states.decoded(), again.buffers, again.values)
    decoded, wanted = again.decoded(), states.decoded()
    assert_same_bits(*((decoded[key], wanted[key]) for key in wanted), (again.values, states.values))


@pytest.mark.parametrize("form", COMPACT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_and_torch_agree(kernel: NativeKernel, form: StateFormat, dtype: torch.dtype) -> None:
    """To the bit where nothing is computed; else as far as rounding lets them: at most one step of a code."""
    grad = gradients(dtype)
    native, plain = States(form), States(form)
    noise = Noise(seed=3, step=5, index=2**32 - 300)  # passes 2^32 on the way
    native.native(kernel, torch.zeros_like(grad), rule(lr=0.0, betas=(0.5, 0.5)), noise=noise)
    plain.torch(torch.zeros_like(grad), rule(lr=0.0, betas=(0.5, 0.5)), noise=noise)
    assert same(native, plain)
    native.native(kernel, grad, rule(), noise=noise)
    plain.torch(grad, rule(), noise=noise)
    different = sum(int((native.buffers[k] != plain.buffers[k]).sum()) for k in (MEAN, SQUARE, MASTER_LOW))
    assert different < (3 * NUMEL if form.is_exact else 0.05 * NUMEL)
    got, want = native.decoded(), plain.decoded()
    for key, reach in ((MASTER, 2.0**-16), (MEAN, 0.07), (SQUARE, 0.07)):
        tolerance = 1e-6 if form.is_exact else reach
        torch.testing.assert_close(got[key], want[key], rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("form", COMPACT, ids=str)
def test_threads_and_cuts_change_no_bit(kernel: NativeKernel, form: StateFormat) -> None:
    """Cuts where the format allows them: for the 8-bit one, between blocks."""
    numel = (1 << 17) + 4099
    grad = gradients(torch.bfloat16, numel)
    want = States(form, numel).native(kernel, grad, rule(), noise=Noise(1, 2, 77), num_threads=1)
    assert same(States(form, numel).native(kernel, grad, rule(), noise=Noise(1, 2, 77), num_threads=3), want)
    pieces, multiple = States(form, numel), form.start_multiple
    for left, right in ((0, 5 * multiple), (5 * multiple, 301 * multiple), (301 * multiple, numel)):
        options = {"form": form, "noise": Noise(1, 2, 77 + left)}
        its = {b.key: pieces.buffers[b.key][left // b.block_numel : b.numel(right)] for b in form.buffers}
        kernel.step(rule(), its, grad[left:right], pieces.values[left:right], **options)
    assert same(pieces, want)


@pytest.mark.parametrize("form", COMPACT, ids=str)
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (5, 300), (256, 512), (300, 310), (100, NUMEL), (7, 7)])
def test_a_part_is_updated_and_nothing_else(kernel: NativeKernel, form: StateFormat, start: int, stop: int) -> None:
    """Neighbours in a block of the 8-bit format may get another code: their moments, not their weights."""
    grad, noise = gradients(torch.float32), Noise(1, 2, 3)
    before = States(form).decoded()
    whole = States(form).native(kernel, grad, rule(), noise=noise).decoded()
    for states in (
        States(form).native(kernel, grad, rule(), noise=noise, start=start, stop=stop),
        States(form).torch(grad, rule(), noise=noise, start=start, stop=stop),
    ):
        got = states.decoded()
        inside, outside = slice(start, stop), torch.ones(NUMEL, dtype=torch.bool)
        outside[inside] = False
        assert_same_bits((got[MASTER][outside], before[MASTER][outside]))
        torch.testing.assert_close(got[MASTER][inside], whole[MASTER][inside], rtol=2.0**-15, atol=0)
        for key in (MEAN, SQUARE):
            tolerance = 0.0 if form.name != "8bit" else before[key].abs().max().item() * 2.0**-4
            torch.testing.assert_close(got[key][outside], before[key][outside], rtol=0, atol=tolerance)


# -- rounding at random ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", INEXACT, ids=str)
def test_random_rounding_is_right_on_average(kernel: NativeKernel, form: StateFormat) -> None:
    """The mean over many steps of what a step that changes nothing makes of states between two codes."""
    numel, num_trials = 4 * BLOCK_NUMEL, 100
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(numel, generator=generator) + 0.1
    grad = mean / 0.1  # the first moment after a step from zero
    total_mean, total_square = torch.zeros(2, numel, dtype=torch.float64)
    for trial in range(num_trials):
        states = States(form, numel)
        zeros = torch.zeros(numel)
        states.form.encode({MASTER: zeros, MEAN: zeros, SQUARE: zeros}, states.buffers, states.values)
        decoded = states.native(kernel, grad, rule(), noise=Noise(step=trial)).decoded()
        total_mean += decoded[MEAN]
        total_square += decoded[SQUARE]
    square = 0.001 * grad * grad
    bias_mean = (total_mean / num_trials / mean.double() - 1).mean().abs()
    bias_square = (total_square / num_trials / square.double() - 1).mean().abs()
    spacing = 2.0**-4 if form.name == "8bit" else 2.0**-7
    assert bias_mean < spacing / 40
    assert bias_square < spacing / 40


@pytest.mark.parametrize("form", INEXACT, ids=str)
def test_a_small_change_of_the_second_moment_is_not_lost(form: StateFormat) -> None:
    """It falls by 0.1 % a step, less than any of these formats can tell: to nearest it would stand still."""
    numel = 16 * BLOCK_NUMEL
    states = States(form, numel)
    ones = torch.ones(numel)
    form.encode({MASTER: ones, MEAN: ones, SQUARE: 0.7 * ones}, states.buffers, states.values)
    for step in range(1, 301):
        states.torch(torch.zeros(numel), rule(step, lr=0.0), noise=Noise(step=step))
    assert states.decoded()[SQUARE].mean().item() == pytest.approx(0.7 * 0.999**300, rel=0.02)


def test_noise_depends_on_seed_step_and_index_alone() -> None:
    base = Noise(1, 2, 10).words(100)
    assert torch.equal(Noise(1, 2, 40).words(70), base[30:])
    for other in (Noise(2, 2, 10), Noise(1, 3, 10), Noise(-1, 2, 10)):
        assert int((other.words(100) == base).sum()) == 0
    words = Noise(5, 6, 0).words(100_000)
    for bit in range(32):
        assert (words >> bit & 1).double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_a_first_moment_in_codes_loses_a_32nd_at_most() -> None:
    form, x = FORMATS["8bit"], torch.linspace(-3, 3, 10 * BLOCK_NUMEL)
    states = States(form, x.numel())
    form.encode({MASTER: x, MEAN: x, SQUARE: x * x}, states.buffers, states.values)
    decoded = states.decoded()
    torch.testing.assert_close(decoded[MASTER], x, rtol=2.0**-15, atol=0)
    torch.testing.assert_close(decoded[MEAN], x, rtol=2.0**-5, atol=2.0**-10)
    torch.testing.assert_close(decoded[SQUARE], x * x, rtol=2.0**-5, atol=9 * 2.0**-16)


def test_a_block_of_zeros_and_one_of_nan() -> None:
    form = FORMATS["8bit"]
    states = States(form, 2 * BLOCK_NUMEL)
    x = torch.zeros(2 * BLOCK_NUMEL)
    x[-1] = torch.nan
    form.encode({MASTER: x, MEAN: x, SQUARE: x}, states.buffers, states.values)
    for key in (MEAN, SQUARE):
        decoded = states.decoded()[key]
        assert bool((decoded[:BLOCK_NUMEL] == 0).all())
        assert bool(decoded[BLOCK_NUMEL:].isnan().all())
    assert states.buffers[MEAN_SCALE][0] == states.buffers[SQUARE_SCALE][0] == 0


def test_what_lies_behind_the_end_has_no_say_in_a_scale(kernel: NativeKernel) -> None:
    """The last block is not full, and its second moments fall by far in one step."""
    form, numel = FORMATS["8bit"], BLOCK_NUMEL + 77
    for make in (States.torch, lambda states, *given, **options: states.native(kernel, *given, **options)):
        states = States(form, numel)
        for step, size in ((1, 1.0), (2, 2.0**-20)):
            make(states, torch.full((numel,), size), rule(step, betas=(0.9, 0.0)), noise=Noise(step=step))
        assert_same_bits((states.decoded()[SQUARE], torch.full((numel,), 2.0**-40)))


def test_moments_that_no_scale_reaches_are_nan_and_none_below_is_lost(kernel: NativeKernel) -> None:
    form = FORMATS["8bit"]
    for size, known in ((2.0**124, True), (1.99 * 2.0**124, True), (2.0**125, False), (3e38, False)):
        states = States(form, BLOCK_NUMEL)
        x = torch.full((BLOCK_NUMEL,), size)
        form.encode({MASTER: 0 * x, MEAN: x, SQUARE: x}, states.buffers, states.values)
        moved = rule(lr=0.0, betas=(0.0, 1 - 2.0**-20))
        native = States(form, BLOCK_NUMEL).native(kernel, x, moved, noise=Noise()).decoded()[MEAN]
        for decoded in (states.decoded()[MEAN], states.decoded()[SQUARE], native):
            assert bool((decoded > 0.9 * size).all()) == known
            assert bool(decoded.isnan().all()) != known


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["split", "bf16", "8bit"])
def test_formats_that_do_not_fit_are_refused(name: str) -> None:
    assert state_format(name, torch.bfloat16).name == name
    assert state_format("fp32", torch.float16, "sgd").name == "fp32"
    for dtype, label in ((torch.float16, "fp16"), (torch.float32, "fp32")):
        with pytest.raises(ConfigError, match=f"needs precision.dtype = 'bf16', not '{label}'"):
            state_format(name, dtype)
    with pytest.raises(ConfigError, match="works with optimizer.name = 'adamw' or 'adam', not 'sgd'"):
        state_format(name, torch.bfloat16, "sgd")
    with pytest.raises(ConfigError, match="not one of fp32, split, bf16, 8bit"):
        state_format("4bit", torch.bfloat16)


def test_bad_calls_are_refused() -> None:
    kernel, states = best_kernel(), States(FORMATS["8bit"])
    grad, noise = gradients(torch.bfloat16), Noise()
    with pytest.raises(ValueError, match="needs noise"):
        states.native(kernel, grad, rule())
    with pytest.raises(ValueError, match="goes with Adam and AdamW only, not with LionRule"):
        states.native(kernel, grad, LionRule(1e-3, (0.9, 0.99)), noise=noise)
    with pytest.raises(ValueError, match="out must be torch.bfloat16 weights"):
        kernel.step(rule(), states.buffers, grad, None, form=states.form, noise=noise)
    with pytest.raises(ValueError, match="start and stop"):
        states.native(kernel, grad, rule(), noise=noise, start=5, stop=NUMEL + 1)
    del states.buffers[MEAN_SCALE]
    with pytest.raises(ValueError, match="states lack exp_avg_scale"):
        states.native(kernel, grad, rule(), noise=noise)
