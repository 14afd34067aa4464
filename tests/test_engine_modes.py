"""Evaluation, generation, checkpointing and errors in between: training goes on exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine_models import MODELS, batches, llama, recipe
from tests.reference import (
    LARGE_BYTES,
    Recipe,
    Run,
    assert_same,
    differences,
    finish,
    least_capacity,
    make_engine,
    run_engine,
    run_plain,
)
from tests.sampled import sampled

CPU = {"capacity_bytes": LARGE_BYTES, "policy": "cpu"}


def _train(engine: Any, micro: list[dict[str, Tensor]], between: Callable[[Any, str], None]) -> list[float]:
    """The steps of :func:`run_engine` with something done at every point where something can be done."""
    losses = []
    torch.manual_seed(11)
    for batch in micro:
        _undisturbed(between, engine, "before")
        engine.zero_grad()
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.check_integrity()
        _undisturbed(between, engine, "before step")
        engine.check_integrity()
        engine.step()
        engine.check_integrity()
        losses.append(loss.item())
    _undisturbed(between, engine, "after")
    return losses


def _undisturbed(between: Callable[[Any, str], None], engine: Any, when: str) -> None:
    """What happens in between draws random numbers of its own."""
    with torch.random.fork_rng(devices=[]):
        between(engine, when)


def _without_norms(run: Run) -> Run:
    run.norms, run.scales = [], []
    return run


def _evaluate(engine: Any, when: str) -> None:
    del when
    engine.eval()
    with torch.no_grad():
        first = engine(**batches(1, 3, 20, seed=5)[0]).loss
        second = engine.module(**batches(1, 3, 20, seed=5)[0]).loss
    engine.train()
    assert torch.equal(first, second)
    assert torch.isfinite(first)


def _evaluate_inference_mode(engine: Any, when: str) -> None:
    del when
    engine.eval()
    with torch.inference_mode():
        assert torch.isfinite(engine(**batches(1, 1, 9, seed=5)[0]).loss)
    engine.train()


def _evaluate_with_grad(engine: Any, when: str) -> None:
    """A forward in train mode whose graph is thrown away."""
    del when
    assert engine(**batches(1, 1, 9, seed=5)[0]).loss.requires_grad


def _generate(engine: Any, when: str) -> None:
    del when
    engine.eval()
    tokens = engine.module.generate(batches(1, 2, 5, seed=6)[0]["input_ids"], max_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 9)
    engine.train()


def _read_everything(engine: Any, when: str) -> None:
    del when
    assert all(torch.isfinite(value).all() for value in engine.module.state_dict().values())
    with engine.gathered_parameters() as module:
        assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    assert torch.isfinite(engine.module.get_input_embeddings().weight).all()
    assert engine.optimizer.state_dict()["param_groups"]


INTERLUDES = {
    "eval": _evaluate,
    "inference_mode": _evaluate_inference_mode,
    "forward without backward": _evaluate_with_grad,
    "generate": _generate,
    "read everything": _read_everything,
}


@pytest.mark.parametrize("tight", [False, True], ids=["roomy", "tight"])
@pytest.mark.parametrize("interlude", INTERLUDES)
@pytest.mark.parametrize("name", [pytest.param("opt-pre-norm", marks=pytest.mark.full), "llama"])
def test_interludes_do_not_disturb_training(name: str, interlude: str, tight: bool) -> None:
    whole = recipe(name)
    engine = make_engine(whole, int(least_capacity(whole) * 1.5) if tight else LARGE_BYTES)
    run = Run(_train(engine, whole.batches, INTERLUDES[interlude]))
    assert differences(finish(engine, run), _without_norms(run_plain(whole))) == []


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("policy", ["cpu", "cuda", "auto"])
@pytest.mark.parametrize("interlude", INTERLUDES)
@pytest.mark.parametrize("name", MODELS)
def test_interludes_everywhere(name: str, interlude: str, policy: str, dtype: str) -> None:
    whole = recipe(name, dtype=dtype, scale=64.0)
    engine = make_engine(whole, LARGE_BYTES, policy)
    run = Run(_train(engine, whole.batches, INTERLUDES[interlude]))
    assert differences(finish(engine, run), _without_norms(run_plain(whole))) == []


def test_first_pass_in_inference_mode_leaves_no_inference_tensors() -> None:
    whole = recipe("llama")
    for policy in ("cpu", "cuda", "auto"):
        engine = make_engine(whole, LARGE_BYTES, policy)
        with torch.inference_mode():
            engine.eval()(**whole.batches[0])
        engine.train()
        run = Run(_train(engine, whole.batches, lambda engine, when: None))
        assert differences(finish(engine, run), _without_norms(run_plain(whole))) == []


def test_evaluation_does_not_touch_the_training_trace() -> None:
    whole = recipe("llama")
    engine = make_engine(whole, LARGE_BYTES)
    _train(engine, whole.batches, lambda engine, when: None)
    before = repr(engine.manager.trace.moments), engine.manager.trace.batch_shapes, repr(engine.plan)
    _evaluate(engine, "after")
    _generate(engine, "after")
    assert (repr(engine.manager.trace.moments), engine.manager.trace.batch_shapes) == before[:2]
    engine.close()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_under_tight_capacity(name: str) -> None:
    """Prompt and cache of generation are smaller than the activations of training: what trains must generate."""
    whole = recipe(name, batches=batches(2, 2, 16))
    engine = make_engine(whole, int(least_capacity(whole) * 1.05))
    prompt = batches(1, 2, 6, seed=3)[0]["input_ids"]
    plain = whole.build().eval()
    engine.eval()
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(engine.module.generate(prompt, **options), plain.generate(prompt, **options))
    engine.train()
    _train(engine, whole.batches, lambda engine, when: None)
    trained = whole.build()
    trained.load_state_dict(engine.module.state_dict())
    engine.eval()
    assert torch.equal(engine.module.generate(prompt, **options), trained.eval().generate(prompt, **options))
    engine.check_integrity()
    engine.close()


# -- activation checkpointing ----------------------------------------------------------------------------------------


def _checkpointed(build: Callable[[], nn.Module], reentrant: bool) -> Callable[[], nn.Module]:
    def checkpointed() -> nn.Module:
        model: Any = build()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        return model

    return checkpointed


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("policy", [pytest.param("cpu", marks=pytest.mark.full), "auto"])
@pytest.mark.parametrize("name", sampled(MODELS, 2))
def test_activation_checkpointing(name: str, policy: str, reentrant: bool) -> None:
    whole = Recipe(_checkpointed(MODELS[name], reentrant), batches())
    capacity_bytes = int(least_capacity(whole) * 1.1)
    assert_same(run_engine(whole, capacity_bytes, policy), run_plain(whole))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_saves_activations(reentrant: bool) -> None:
    long = batches(2, 4, 24)
    plain = run_engine(Recipe(llama, long), **CPU).extra["report"].non_model_peak_bytes
    saved = run_engine(Recipe(_checkpointed(llama, reentrant), long), **CPU).extra["report"].non_model_peak_bytes
    assert saved < 0.7 * plain


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_with_frozen_base_and_clipping(reentrant: bool) -> None:
    def build() -> nn.Module:
        model = _checkpointed(llama, reentrant)()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.1" in name or "norm" in name)
        return model

    whole = Recipe(build, batches(), dtype="bf16", max_grad_norm=0.05, accumulation=2)
    assert_same(run_engine(whole, int(least_capacity(whole) * 1.2)), run_plain(whole))


# -- unusual passes --------------------------------------------------------------------------------------------------


def _both(
    act: Callable[[Any, Any, list[dict[str, Tensor]]], Any], name: str = "llama", policy: str = "cpu", ratio: float = 0
) -> None:
    """Does the same with a plain model and optimizer and with the engine's, and compares."""
    from tests.reference import Reference

    whole = recipe(name, batches=batches(4))
    capacity_bytes = int(least_capacity(whole) * ratio) if policy == "auto" else LARGE_BYTES
    reference, engine = Reference(whole), make_engine(whole, capacity_bytes, policy)
    for model, optimizer in ((reference.model, reference.optimizer), (engine.module, engine.optimizer)):
        torch.manual_seed(2)
        for start in (0, 2):
            act(model, optimizer, whole.batches[start : start + 2])
        _plain_step(model, optimizer, whole.batches[0])
    engine.check_integrity()
    run = finish(engine, Run())
    assert differences(run, Run(weights=dict(reference.model.state_dict()), states=reference.states())) == []


def _plain_step(model: Any, optimizer: Any, batch: dict[str, Tensor]) -> None:
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("policy", ["cpu", "cuda", "auto"])
@pytest.mark.parametrize("name", ["opt-pre-norm", "llama"])
def test_two_forwards_then_one_backward(name: str, policy: str) -> None:
    def act(model: Any, optimizer: Any, pair: list[dict[str, Tensor]]) -> None:
        optimizer.zero_grad()
        (model(**pair[0]).loss + 2 * model(**pair[1]).loss).backward()
        optimizer.step()

    _both(act, name, policy, ratio=4)


@pytest.mark.parametrize("policy", ["cpu", "cuda", "auto"])
def test_two_forwards_then_two_backwards_in_either_order(policy: str) -> None:
    def act(model: Any, optimizer: Any, pair: list[dict[str, Tensor]]) -> None:
        optimizer.zero_grad()
        first, second = (model(**batch).loss for batch in pair)
        first.backward()
        second.backward()
        optimizer.step()
        optimizer.zero_grad()
        first, second = (model(**batch).loss for batch in pair)
        second.backward()
        first.backward()
        optimizer.step()

    _both(act, policy=policy, ratio=4)


@pytest.mark.parametrize("policy", ["cpu", "cuda", "auto"])
@pytest.mark.parametrize("name", ["opt-pre-norm", "llama"])
def test_backward_twice_with_a_kept_graph(name: str, policy: str) -> None:
    def act(model: Any, optimizer: Any, pair: list[dict[str, Tensor]]) -> None:
        optimizer.zero_grad()
        loss = model(**pair[0]).loss
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()

    _both(act, name, policy, ratio=2)


def test_forward_in_train_mode_without_backward() -> None:
    def act(model: Any, optimizer: Any, pair: list[dict[str, Tensor]]) -> None:
        model(**pair[0])
        _plain_step(model, optimizer, pair[1])
        model(**pair[0])

    _both(act, policy="auto", ratio=1.5)


def test_eval_between_forward_and_backward() -> None:
    def act(model: Any, optimizer: Any, pair: list[dict[str, Tensor]]) -> None:
        optimizer.zero_grad()
        loss = model(**pair[0]).loss
        with torch.no_grad():
            model(**pair[1])
        loss.backward()
        optimizer.step()

    for policy in ("cpu", "cuda", "auto"):
        _both(act, policy=policy, ratio=3)


def test_loss_of_the_users_own_that_reads_a_parameter() -> None:
    """A penalty on the head's weights, read outside any module."""

    def act(model: Any, optimizer: Any, pair: list[dict[str, Tensor]]) -> None:
        optimizer.zero_grad()
        loss = model(**pair[0]).loss + 0.1 * model.lm_head.weight.square().sum()
        loss.backward()
        optimizer.step()

    for policy in ("cpu", "cuda", "auto"):
        _both(act, policy=policy, ratio=2)
        _both(act, "opt-pre-norm", policy, ratio=2)


def test_parts_of_the_model_called_by_themselves() -> None:
    def act(model: Any, optimizer: Any, pair: list[dict[str, Tensor]]) -> None:
        optimizer.zero_grad()
        hidden = model.model(input_ids=pair[0]["input_ids"]).last_hidden_state
        logits = model.lm_head(hidden)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), pair[0]["labels"].flatten()).backward()
        optimizer.step()

    for policy in ("cpu", "cuda", "auto"):
        _both(act, policy=policy, ratio=2)


def test_gradients_by_autograd_grad() -> None:
    """``torch.autograd.grad`` with respect to inputs, which fills no parameter's gradient."""
    whole = recipe("llama")
    engine = make_engine(whole, **CPU)
    plain = whole.build()
    found = []
    for model in (plain, engine.module):
        embedded = model.get_input_embeddings()(whole.batches[0]["input_ids"]).detach().requires_grad_()
        loss = model(inputs_embeds=embedded, labels=whole.batches[0]["labels"]).loss
        found.append(torch.autograd.grad(loss, embedded)[0])
    assert torch.equal(*found)
    assert all(parameter.grad is None for parameter in engine.module.parameters())
    engine.check_integrity()
    run = Run(_train(engine, whole.batches, lambda engine, when: None))
    assert differences(finish(engine, run), _without_norms(run_plain(whole))) == []


# -- errors ----------------------------------------------------------------------------------------------------------


class _Boom(Exception):
    pass


def _raise(*_: Any) -> None:
    raise _Boom


@contextlib.contextmanager
def _failing_forward(module: nn.Module, error: type[BaseException] = _Boom) -> Any:
    def fail(*_: Any) -> None:
        raise error

    handle = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("policy", [*(pytest.param(p, marks=pytest.mark.full) for p in ("cpu", "cuda")), "auto"])
@pytest.mark.parametrize("where", ["model.layers.1.mlp", "model.norm", "model.embed_tokens", "lm_head"])
def test_exception_in_forward_then_training_goes_on(where: str, policy: str) -> None:
    def act(model: Any, optimizer: Any, pair: list[dict[str, Tensor]]) -> None:
        _plain_step(model, optimizer, pair[0])
        state = torch.get_rng_state()
        with _failing_forward(model.get_submodule(where)), pytest.raises(_Boom):
            model(**pair[1])
        torch.set_rng_state(state)
        _plain_step(model, optimizer, pair[1])

    _both(act, policy=policy, ratio=1.5)


def test_keyboard_interrupt_in_forward_then_training_goes_on() -> None:
    """Ctrl-C in a notebook: torch runs no hooks for what is not an Exception."""

    def act(model: Any, optimizer: Any, pair: list[dict[str, Tensor]]) -> None:
        with _failing_forward(model.model.layers[1].mlp, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            model(**pair[1])
        _plain_step(model, optimizer, pair[0])

    for policy in ("cpu", "cuda", "auto"):
        _both(act, policy=policy, ratio=1.5)


@pytest.mark.parametrize("policy", [pytest.param("cpu", marks=pytest.mark.full), "cuda", "auto"])
@pytest.mark.parametrize("verb", ["loss.backward", "engine.backward"])
@pytest.mark.parametrize("layer", [0, 2])
def test_exception_in_backward_then_training_goes_on(layer: int, verb: str, policy: str) -> None:
    from tests.reference import Reference

    whole = recipe("llama", batches=batches(4))
    reference = Reference(whole)
    engine = make_engine(whole, int(least_capacity(whole) * 1.5) if policy == "auto" else LARGE_BYTES, policy)
    backward = {"loss.backward": Tensor.backward, "engine.backward": engine.backward}[verb]
    for model, optimizer in ((reference.model, reference.optimizer), (engine.module, engine.optimizer)):
        for batch in whole.batches:
            kept: list[Tensor] = []
            handle = model.model.layers[layer].register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out))
            loss = model(**batch).loss
            handle.remove()
            kept[0].register_hook(_raise)
            with pytest.raises(_Boom):
                Tensor.backward(loss) if model is reference.model else backward(loss)
            del kept, loss
            _plain_step(model, optimizer, batch)
    engine.check_integrity()
    run = finish(engine, Run())
    assert differences(run, Run(weights=dict(reference.model.state_dict()), states=reference.states())) == []


def test_error_of_the_users_own_stays_itself() -> None:
    engine = make_engine(recipe("llama"), **CPU)
    with _failing_forward(engine.module.lm_head), pytest.raises(_Boom):
        engine(**batches(1)[0])
    engine.check_integrity()
    with pytest.raises(ValueError, match="input_ids"):
        engine()
    engine.check_integrity()
    engine.close()
