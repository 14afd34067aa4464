"""Windows that go through a model layer by layer: the same numbers, each unit fetched once for all micro-batches."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_case import TINY, write_config
from torch import Tensor

import zero
from gemini.plan import DoesNotFitError
from gemini.trace import Trace, window_shape
from gemini.windows import SHORT, longer_window
from tests.engine_models import batches
from tests.layer_major_case import WINDOW, least_window_capacity, one_step, recipe, train, windows
from tests.ranks import run_ranks
from tests.reference import (
    LARGE_BYTES,
    Recipe,
    Run,
    adamw,
    assert_same,
    config_of,
    differences,
    finish,
    make_engine,
    run_plain,
    trainable,
)
from tests.sampled import sampled
from zero.cli.main import main
from zero.errors import UserError
from zero.report.metrics import read_metrics
from zero.turns import Turns

full = pytest.mark.full
_QUICK = [("llama", "bf16", "non_reentrant"), ("gpt2", "fp32", None)]
_ALL = list(itertools.product(["llama", "opt", "gpt2"], ["fp32", "bf16"], [None, "non_reentrant", "reentrant"]))
COMBINATIONS = [case if case in _QUICK else pytest.param(*case, marks=full) for case in _ALL]


@functools.cache
def _batch_major(name: str, dtype: str = "fp32", checkpointing: str | None = None) -> Run:
    return train(recipe(name, checkpointing, dtype=dtype), "batch")


@functools.cache
def _least(name: str, dtype: str = "fp32", checkpointing: str | None = None) -> int:
    return least_window_capacity(recipe(name, checkpointing, dtype=dtype))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


# -- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype", "checkpointing"), COMBINATIONS)
def test_bits_are_those_of_one_micro_batch_after_the_other(name: str, dtype: str, checkpointing: str | None) -> None:
    """On a device that is nearly full, whose streams put everything off."""
    got = train(recipe(name, checkpointing, dtype=dtype), "layer", int(_least(name, dtype, checkpointing) * 1.1))
    assert_same(got, _batch_major(name, dtype, checkpointing))


@pytest.mark.parametrize("name", sampled(["mixtral", "llama", "opt"], 3))
def test_on_the_host_and_against_plain_torch(name: str) -> None:
    whole = recipe(name)
    got = train(whole, "layer")
    assert_same(got, _batch_major(name))
    assert_same(got, run_plain(whole))


@pytest.mark.parametrize("placed", [(0.0, 0.0), (0.6, 0.3), pytest.param((1.0, 1.0), marks=full)], ids=str)
@pytest.mark.parametrize("streams", ["random", pytest.param("immediate", marks=full)])
def test_wherever_values_and_states_lie(streams: str, placed: tuple[float, float]) -> None:
    where = {"resident_parameters": placed[0], "resident_optimizer": placed[1]}
    got = train(recipe("llama", dtype="bf16"), "layer", 1 << 22, "static", **where, device={"streams": streams})
    assert_same(got, _batch_major("llama", "bf16"))


def test_experts() -> None:
    """Router logits go from blocks to the loss; experts that no token chose get no gradient."""
    whole = recipe("mixtral", batches=batches(3 * WINDOW, rows=1, tokens=3))
    assert_same(train(whole, "layer", int(least_window_capacity(whole) * 1.1)), train(whole, "batch"))


@pytest.mark.parametrize("name", ["tied-opt", pytest.param("tied-gpt2", marks=full)])
def test_tied_weights_agree_up_to_rounding(name: str) -> None:
    got, want = train(recipe(name), "layer", int(_least(name) * 1.1)), _batch_major(name)
    assert got.losses == pytest.approx(want.losses, rel=1e-6)
    for key, value in want.weights.items():
        assert torch.allclose(got.weights[key], value, rtol=0, atol=1e-6), key


def test_a_use_that_is_overlooked_makes_no_difference() -> None:
    assert_same(train(recipe("unseen"), "layer", 1 << 20), train(recipe("unseen"), "batch"))


@pytest.mark.parametrize("capacity_bytes", [None, 1 << 20])
def test_a_model_that_is_hard_to_cut(capacity_bytes: int | None) -> None:
    """Glue, a tensor that all layers use, tuples, results for the loss alone, a frozen and a skipped layer."""
    whole = recipe("tangled")
    got, want = train(whole, "layer", capacity_bytes), train(whole, "batch")
    assert got.losses == pytest.approx(want.losses, rel=1e-6)
    for key, value in want.weights.items():
        assert torch.allclose(got.weights[key], value, rtol=0, atol=2e-6), key


def test_loss_scaling_and_uneven_windows() -> None:
    whole = recipe("llama", dtype="fp16", scale=2.0**30, batches=batches(2 * WINDOW + 1))
    got, want = train(whole, "layer", 1 << 22), train(whole, "batch", 1 << 22)
    assert got.num_skipped > 0
    assert_same(got, want)


@full
def test_a_shorter_window_needs_no_new_plan() -> None:
    whole = recipe("llama", batches=batches(4 * WINDOW + 3))
    engine, run = make_engine(whole, int(_least("llama") * 1.2)), Run()
    plans = []
    for window in [*windows(whole), *windows(whole)[:1]]:
        one_step(engine, window, "layer", run)
        plans.append(engine.plan)
    assert plans[-1] is plans[-2] is plans[-3]
    engine.close()


@full
def test_the_same_with_dropout_whether_recomputed_or_not() -> None:
    """A mask is drawn once, and drawn again the same when its layer is recomputed, whoever drew in between."""
    kept = train(recipe("dropout-opt"), "layer", 1 << 22)
    recomputed = train(recipe("dropout-opt", "non_reentrant"), "layer", 1 << 22)
    assert recomputed.losses == kept.losses


def test_frozen_parameters_and_an_own_loss() -> None:
    def freeze(whole: Recipe) -> Any:
        model = whole.build()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.1" in name or "lm_head" in name)
        optimizer = adamw(trainable(model))
        return zero.initialize(model, optimizer, config=config_of(whole, 1 << 21))[0]

    def own_loss(output: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = output.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.1)

    whole, runs = recipe("llama"), []
    for order in ("layer", "batch"):
        engine, run = freeze(whole), Run()
        for window in windows(whole):
            engine.zero_grad()
            if order == "layer":
                run.losses += [float(loss) for loss in engine.run_window(window, [0.1, 0.2, 0.3, 0.4], own_loss)]
            else:
                for weight, batch in zip([0.1, 0.2, 0.3, 0.4], window, strict=True):
                    loss = own_loss(engine(**batch), batch)
                    engine.backward(loss * weight, scale_by_accumulation=False)
                    run.losses.append(float(loss.detach()))
                engine.end_of_loader()
            engine.step()
            engine.check_integrity()
        runs.append(finish(engine, run))
    assert_same(*runs)


@pytest.mark.parametrize("checkpointing", ["non_reentrant", pytest.param("reentrant", marks=full)])
def test_saved_activations_on_the_host_and_a_loss_in_pieces(checkpointing: str) -> None:
    whole = recipe("llama", checkpointing, dtype="bf16", batches=batches(3 * WINDOW, tokens=24))
    more = {"activations": "host", "train": {"chunked_loss": True}}
    more["train"] |= {"gradient_accumulation_steps": WINDOW, "max_grad_norm": 0.05}
    got = train(whole, "layer", 1 << 18, **more)
    want = train(whole, "batch", 1 << 18, **more)
    assert_same(got, want)
    report, peak_bytes = got.extra["reports"][-1]
    assert peak_bytes <= 1.05 * report.predicted_device_peak_bytes


@pytest.mark.full
def test_compiled_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("zero.compiling.torch.compile", functools.partial(torch.compile, backend="aot_eager"))
    more = {"train": {"compile": True, "gradient_accumulation_steps": WINDOW, "max_grad_norm": 0.05}}
    got = train(recipe("llama"), "layer", 1 << 21, **more)
    assert_same(got, train(recipe("llama"), "batch", 1 << 21, **more))


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=full), "bf16"])
def test_each_unit_is_fetched_once_for_all_micro_batches(dtype: str) -> None:
    whole = recipe("llama", "non_reentrant", dtype=dtype, batches=batches(3 * WINDOW, rows=4, tokens=24))
    capacity_bytes = int(least_window_capacity(whole) * 1.15)
    got = train(whole, "layer", capacity_bytes, "cpu")
    want = train(whole, "batch", capacity_bytes, "cpu", prefetch=0)
    report, peak_bytes = got.extra["reports"][-1]
    facts = got.extra["facts"]
    value_bytes = sum(fact.value_bytes for fact in facts)
    assert report.num_fetches <= 2 * len(facts)
    assert report.h2d_bytes <= 2 * value_bytes
    # One sum of each gradient, in fp32; those of the others go out one by one.
    assert report.d2h_bytes == sum(4 * fact.numel for fact in facts)
    beside, _ = want.extra["reports"][-1]
    assert beside.num_fetches >= WINDOW * (len(facts) - 1)
    assert beside.d2h_bytes == WINDOW * value_bytes
    assert peak_bytes <= capacity_bytes
    assert peak_bytes == pytest.approx(report.predicted_device_peak_bytes, rel=0.05)


def test_where_sums_would_take_too_much_gradients_go_out_one_by_one() -> None:
    whole = recipe("llama", "non_reentrant", dtype="bf16")
    capacity_bytes = int(_least("llama", "bf16", "non_reentrant") * 1.05)
    got = train(whole, "layer", capacity_bytes, "cpu")
    report, peak_bytes = got.extra["reports"][-1]
    numel = sum(fact.numel for fact in got.extra["facts"])
    assert 4 * numel < report.d2h_bytes <= WINDOW * 2 * numel
    assert peak_bytes == pytest.approx(report.predicted_device_peak_bytes, rel=0.05)


@pytest.mark.parametrize(("name", "checkpointing"), [("llama", "non_reentrant"), pytest.param("opt", None, marks=full)])
def test_a_dry_run_walks_the_window_in_the_same_order(name: str, checkpointing: str | None) -> None:
    from gemini.dryrun import fake_copy, fake_mode
    from gemini.policy import least_capacity_bytes
    from zero.config.loading import load_config
    from zero.dryrun import walk

    whole = recipe(name, checkpointing)
    mode = fake_mode()
    duplicate: Any = fake_copy(whole.build(), mode)
    batch = {key: mode.from_tensor(value) for key, value in whole.batches[0].items()}
    with mode:
        config = load_config(config_of(whole, LARGE_BYTES))
        optimizer = torch.optim.AdamW(duplicate.parameters())
        trace, engine = walk(duplicate, optimizer, config, (), batch, num_micro_batches=WINDOW)
    assert trace.is_window
    assert least_capacity_bytes(engine.facts, trace) == pytest.approx(least_window_capacity(whole), rel=0.05)


@pytest.mark.parametrize(("name", "checkpointing"), [("opt", "non_reentrant"), pytest.param("llama", None, marks=full)])
def test_a_long_window_is_known_from_two_short_ones(name: str, checkpointing: str | None) -> None:
    """So that a plan for many micro-batches does not take long."""

    def trace_of(num: int) -> Trace:
        whole = recipe(name, checkpointing, window=num, dtype="bf16", batches=batches(1) * num)
        engine = make_engine(whole, LARGE_BYTES, "cpu")
        engine.run_window(whole.batches)
        trace: Trace = engine.manager.trace
        engine.close()
        return trace

    got, want = longer_window(trace_of(SHORT), trace_of(SHORT + 1), 7), trace_of(7)
    assert got is not None
    assert got.same_shape(want)
    assert got.batch_shapes == want.batch_shapes
    for mine, theirs in zip(got.moments, want.moments, strict=True):
        assert (mine.reads, mine.gradients) == (theirs.reads, theirs.gradients)
        for figure in ("non_model_peak_bytes", "gathered_peak_bytes", "both_peak_bytes", "flops", "num_ops"):
            assert getattr(mine, figure) == pytest.approx(getattr(theirs, figure), rel=0.01), (mine.key, figure)
    assert longer_window(trace_of(SHORT), trace_of(SHORT + 2), 7) is None


def test_a_window_covers_its_micro_batches_and_shorter_windows() -> None:
    trace = Trace(batch_shapes=[window_shape([(2, 8), (2, 12), (2, 4)])])
    assert trace.is_window
    assert trace.covers((2, 12))
    assert trace.covers(window_shape([(2, 12), (2, 12)]))
    assert not trace.covers((2, 13))
    assert not trace.covers(window_shape([(2, 8)] * 4))
    assert not Trace(batch_shapes=[(2, 12)]).covers(window_shape([(2, 12)]))


# -- what goes wrong -------------------------------------------------------------------------------------------------


def _goes_on(engine: Any, whole: Recipe) -> None:
    """After a failure the engine trains as if nothing had been."""
    run = Run()
    for window in windows(whole):
        one_step(engine, window, "layer", run)
    want = train(whole, "batch")
    assert differences(finish(engine, run), want) == []


@full
def test_a_longer_window_than_planned_for_is_run_again() -> None:
    short, long = recipe("llama"), recipe("llama", batches=batches(WINDOW, rows=3, tokens=40))
    engine, run = make_engine(short, int(least_window_capacity(long) * 1.02)), Run()
    for window in [*windows(short), *windows(long)]:
        one_step(engine, window, "layer", run)
    other, want = make_engine(short), Run()
    for window in [*windows(short), *windows(long)]:
        one_step(other, window, "batch", want)
    assert_same(finish(engine, run), finish(other, want))


@pytest.mark.parametrize("where", [pytest.param("forward", marks=full), "backward"])
def test_out_of_memory_in_the_middle_is_mended(where: str) -> None:
    whole, thrown = recipe("llama"), []
    engine, run = make_engine(whole, 1 << 22), Run()
    one_step(engine, windows(whole)[0], "layer", run)
    layer = engine.module.model.layers[1]

    def throw(*_: Any) -> None:
        if len(thrown) < 2:
            thrown.append(1)
        if len(thrown) == 2:
            thrown.append(1)
            raise torch.OutOfMemoryError("no room")

    hook = layer.mlp.register_forward_hook if where == "forward" else layer.mlp.register_full_backward_hook
    handle = hook(throw)
    one_step(engine, windows(whole)[1], "layer", run)
    assert len(thrown) == 3
    handle.remove()
    one_step(engine, windows(whole)[2], "layer", run)
    assert_same(finish(engine, run), _batch_major("llama"))


def test_what_never_fits_is_refused_with_the_whole_window_in_mind() -> None:
    whole = recipe("llama")
    engine = make_engine(whole, int(_least("llama") * 0.7))
    with pytest.raises(DoesNotFitError) as refused:
        engine.run_window(windows(whole)[0])
    needed_bytes = refused.value.rows[-1][2]
    assert needed_bytes == pytest.approx(_least("llama"), rel=0.1)
    engine.close()


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("backward", KeyboardInterrupt),
        *(pytest.param(*case, marks=full) for case in (("forward", ValueError), ("forward", KeyboardInterrupt))),
        pytest.param("backward", ValueError, marks=full),
    ],
)
def test_an_exception_in_the_model_comes_out_and_nothing_stays(where: str, kind: type[BaseException]) -> None:
    whole = recipe("llama")
    engine = make_engine(whole, int(_least("llama") * 1.2))
    layer, seen = engine.module.model.layers[1], []

    def throw(*_: Any) -> None:
        seen.append(1)
        if len(seen) == 2:
            raise kind("mine")

    hook = layer.mlp.register_forward_hook if where == "forward" else layer.mlp.register_full_backward_hook
    handle = hook(throw)
    with pytest.raises(kind, match="mine") as raised:
        engine.run_window(windows(whole)[0])
    del raised  # its traceback holds what the window had made
    handle.remove()
    engine.zero_grad()
    engine.check_integrity()
    _goes_on(engine, whole)


def test_a_ctrl_c_while_a_micro_batch_runs(request: pytest.FixtureRequest) -> None:
    whole = recipe("llama")
    engine = make_engine(whole, int(_least("llama") * 1.2))
    # The signal itself, which wakes the waiting program as a person's does; a shell may have asked to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    handle = engine.module.model.layers[1].mlp.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        engine.run_window(windows(whole)[0])
    handle.remove()
    engine.zero_grad()
    engine.check_integrity()
    _goes_on(engine, whole)


def test_a_second_ctrl_c_while_threads_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are ended all the same, and the engine knows that the window is over."""
    whole = recipe("llama")
    engine = make_engine(whole, int(_least("llama") * 1.2))
    end, seen = Turns.end, []

    def interrupted(turns: Turns) -> None:
        end(turns)
        seen.append(turns)
        if len(seen) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Turns, "end", interrupted)
    handle = engine.module.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(KeyboardInterrupt):
        engine.run_window(windows(whole)[0])
    assert len(seen) == WINDOW
    monkeypatch.undo()
    handle.remove()
    _goes_on(engine, whole)


@pytest.mark.parametrize("name", ["in place", "in place by a word", "unseen and seen"])
def test_what_cannot_be_cut_says_so(name: str) -> None:
    whole = recipe(name)
    engine = make_engine(whole)
    with pytest.raises(UserError, match='train.accumulation_order = "batch"'):
        engine.run_window(windows(whole)[0])
    engine.close()


def test_refusals() -> None:
    whole = recipe("llama")
    engine = make_engine(whole)
    with pytest.raises(UserError, match="1 to train.gradient_accumulation_steps = 4"):
        engine.run_window(whole.batches[:5])
    with pytest.raises(UserError, match="0 micro-batches"):
        engine.run_window([])
    with pytest.raises(UserError, match="2 weights were given for 3"):
        engine.run_window(whole.batches[:3], [1.0, 2.0])
    with torch.no_grad(), pytest.raises(UserError, match="no_grad"):
        engine.run_window(whole.batches[:2])
    with pytest.raises(UserError, match="engine.backward"):
        engine.run_window(whole.batches[:2], loss=lambda output, batch: 3.0)  # type: ignore[arg-type, return-value]
    with engine.gathered_parameters(), pytest.raises(UserError, match="leave it first"):
        engine.run_window(whole.batches[:2])
    _goes_on(engine, whole)
    with pytest.raises(UserError, match="the engine was closed"):
        engine.run_window(whole.batches[:2])


def test_one_micro_batch_and_one_after_the_other_in_between() -> None:
    whole = recipe("llama")
    engine, run, other, want = make_engine(whole, 1 << 20), Run(), make_engine(whole), Run()
    for number, window in enumerate(windows(whole)):
        one_step(engine, window[: 1 if number == 1 else None], "batch" if number == 2 else "layer", run)
        one_step(other, window[: 1 if number == 1 else None], "batch", want)
    assert_same(finish(engine, run), finish(other, want))


# -- zero train, and several ranks -----------------------------------------------------------------------------------


def test_zero_train_in_both_orders(tmp_path: Path) -> None:
    """No dropout, so both orders train the same model; what was planned for before anything ran is what is measured."""
    summaries = {}
    for order in ("batch", "layer"):
        model = {"config": {**TINY["model"]["config"], "dropout": 0.0, "tie_word_embeddings": False}}
        config = write_config(tmp_path, model=model, device={"memory": "16MiB"}, data={"max_samples": 60})
        arguments = {
            "output_dir": str(tmp_path / order), "accumulation_order": order, "gradient_accumulation_steps": 3,
            "max_steps": 3, "save_steps": 100, "max_grad_norm": 1.0,
        }  # fmt: skip
        flat = [word for key, value in arguments.items() for word in (f"--train.{key}", str(value))]
        assert main(["train", config, *flat]) == 0
        summaries[order] = json.loads((tmp_path / order / "summary.json").read_text())
    lines = {order: read_metrics(tmp_path / order) for order in summaries}
    losses = {order: [line["loss"] for line in lines[order] if "loss" in line] for order in lines}
    assert losses["layer"] == losses["batch"]
    assert (tmp_path / "layer/model/model.safetensors").read_bytes() == (
        tmp_path / "batch/model/model.safetensors"
    ).read_bytes()
    summary = summaries["layer"]
    assert summary["device_peak_bytes"] == pytest.approx(summary["dry_run_device_peak_bytes"], rel=0.05)


def windows_on_ranks(order: str, dtype: str) -> dict[str, Any]:
    """One rank's part: the first has a window of three, the others of two."""
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model: Any = recipe("llama").build()
    config = {
        "device": {"type": "simulated", "memory": "1MiB"}, "parallel": {"replicate": "1KiB"},
        "precision": {"dtype": dtype}, "optimizer": {"kernel": "torch"},
        "train": {"gradient_accumulation_steps": 3, "max_grad_norm": 1.0},
    }  # fmt: skip
    engine = zero.initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-3), config=config)[0]
    run = Run()
    for step in range(2):
        one_step(engine, batches(3, seed=10 * step + rank)[: 3 - rank], order, run)
    fetches = engine.memory_report().num_fetches
    weights = {name: value.clone() for name, value in engine.module.state_dict().items()}
    engine.close()
    return {"norms": run.norms, "weights": weights, "fetches": fetches}


@full
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ranks_with_windows_of_different_lengths(dtype: str) -> None:
    got = run_ranks(windows_on_ranks, 2, "layer", dtype)
    want = run_ranks(windows_on_ranks, 2, "batch", dtype)
    assert got[0]["norms"] == got[1]["norms"] == pytest.approx(want[0]["norms"], rel=1e-5)
    for name, value in want[0]["weights"].items():
        assert torch.equal(got[0]["weights"][name], got[1]["weights"][name]), name
        assert torch.allclose(got[0]["weights"][name], value, rtol=0, atol=2e-6 if dtype == "fp32" else 1e-2), name
