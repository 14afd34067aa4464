"""Values in and out of a managed model: reading, writing, saving, closing."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import zero
from gemini.plan import DoesNotFitError
from tests.engine_models import MODELS, batches, llama, recipe
from tests.reference import (
    LARGE_BYTES,
    Recipe,
    Reference,
    Run,
    adamw,
    config_of,
    differences,
    finish,
    least_capacity,
    make_engine,
    run_plain,
    states_of,
    trainable,
)

PLACED = {
    "cpu": {"capacity_bytes": LARGE_BYTES, "policy": "cpu"},
    "cuda": {"capacity_bytes": LARGE_BYTES, "policy": "cuda"},
    "cut": {"capacity_bytes": LARGE_BYTES, "policy": "static", "resident_parameters": 0.5, "resident_optimizer": 0.3},
    "host": {"capacity_bytes": None},
}
placements = pytest.mark.parametrize("placed", PLACED.values(), ids=PLACED)


def _steps(model: Any, optimizer: Any, micro: list[dict[str, Tensor]]) -> list[float]:
    losses = []
    for batch in micro:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _compare(engine: Any, reference: Reference) -> None:
    engine.check_integrity()
    run = finish(engine, Run())
    assert differences(run, Run(weights=dict(reference.model.state_dict()), states=reference.states())) == []


def _train_both(engine: Any, reference: Reference, micro: list[dict[str, Tensor]]) -> None:
    torch.manual_seed(0)
    _steps(engine.module, engine.optimizer, micro)
    torch.manual_seed(0)
    for batch in micro:
        reference.backward(reference.model(**batch).loss)
        reference.collect()
        reference.step()


# -- reading and writing ---------------------------------------------------------------------------------------------


@placements
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["opt-pre-norm", "llama"])
def test_gathered_parameters_are_read_and_written(name: str, dtype: str, placed: dict[str, Any]) -> None:
    whole = recipe(name, dtype=dtype)
    engine, reference = make_engine(whole, **placed), Reference(whole)
    _train_both(engine, reference, whole.batches[:1])
    with engine.gathered_parameters() as module, torch.no_grad():
        theirs = dict(reference.model.named_parameters())
        for name_, parameter in module.named_parameters():
            assert torch.equal(parameter, theirs[name_])
            assert parameter.dtype == theirs[name_].dtype
        for model in (module, reference.model):
            model.get_input_embeddings().weight.mul_(1.5)  # tied to the head in OPT
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()))
    _masters_follow(reference)
    engine.check_integrity()
    _train_both(engine, reference, whole.batches[1:])
    _compare(engine, reference)


def _masters_follow(reference: Reference) -> None:
    """An element that was written becomes its master; the others keep what the dtype cannot hold."""
    with torch.no_grad():
        for name, parameter in reference.parameters.items():
            master = reference.masters[name]
            if parameter is not master:
                master.copy_(torch.where(master.to(parameter.dtype) == parameter, master, parameter.float()))


def test_gathered_parameters_write_back_after_an_exception() -> None:
    engine = make_engine(recipe("llama"), **PLACED["cpu"])
    with pytest.raises(RuntimeError, match="mine"), engine.gathered_parameters() as module:  # noqa: PT012
        module.lm_head.weight.data.fill_(2.0)
        raise RuntimeError("mine")
    assert (engine.module.state_dict()["lm_head.weight"] == 2.0).all()
    engine.check_integrity()
    engine.close()


def test_gathered_parameters_take_replaced_data() -> None:
    engine = make_engine(recipe("llama"), **PLACED["cpu"])
    with engine.gathered_parameters() as module:
        module.lm_head.weight.data = torch.full_like(module.lm_head.weight, 3.0)
        state = module.state_dict()
        assert (state["lm_head.weight"] == 3.0).all()
        module.load_state_dict({name: torch.full_like(value, 4.0) for name, value in state.items()})
    assert all((value == 4.0).all() for value in engine.module.state_dict().values())
    engine.close()


@placements
def test_parameter_is_readable_outside_any_pass(placed: dict[str, Any]) -> None:
    whole = recipe("llama")
    engine, reference = make_engine(whole, **placed), Reference(whole)
    for batch in whole.batches:
        _train_both(engine, reference, [batch])
        for path in ("lm_head.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"):
            assert torch.equal(engine.module.get_parameter(path), reference.model.get_parameter(path))
        assert engine.module.lm_head.weight.norm() == reference.model.lm_head.weight.norm()
        engine.check_integrity()
    _compare(engine, reference)


@placements
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_parameter_written_in_place_outside_any_pass(dtype: str, placed: dict[str, Any]) -> None:
    """Weight clipping, re-initialising a head, an EMA copied in: ``with torch.no_grad(): p.mul_(...)``."""
    whole = recipe("llama", dtype=dtype)
    engine, reference = make_engine(whole, **placed), Reference(whole)
    for batch in whole.batches:
        with torch.no_grad():
            for model in (engine.module, reference.model):
                model.lm_head.weight.clamp_(-0.02, 0.02)
                model.model.layers[1].mlp.up_proj.weight[3] = 0.5
        _masters_follow(reference)
        _train_both(engine, reference, [batch])
    with torch.no_grad():
        for model in (engine.module, reference.model):
            model.lm_head.weight.zero_()
    _masters_follow(reference)
    assert (engine.module.state_dict()["lm_head.weight"] == 0).all()
    _compare(engine, reference)


def test_parameter_written_between_backward_and_step() -> None:
    whole = recipe("llama")
    engine, reference = make_engine(whole, **PLACED["cpu"]), Reference(whole)
    for model, optimizer in ((engine.module, engine.optimizer), (reference.model, reference.optimizer)):
        for batch in whole.batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            with torch.no_grad():
                model.model.norm.weight.mul_(1.25)
            optimizer.step()
    _compare(engine, reference)


@pytest.mark.parametrize("path", ["model.norm.weight", "model.decoder.layers.1.fc1.bias"])
@placements
def test_parameter_written_between_forward_and_backward(path: str, placed: dict[str, Any]) -> None:
    """Refused where backward needs the value, as plain PyTorch refuses it; kept in either case."""
    whole = recipe("opt-pre-norm" if "decoder" in path else "llama")
    engine, reference = make_engine(whole, **placed), Reference(whole)
    needed = "norm" in path
    for model, optimizer in ((engine.module, engine.optimizer), (reference.model, reference.optimizer)):
        for batch in whole.batches[:2]:
            optimizer.zero_grad()
            loss = model(**batch).loss
            with torch.no_grad():
                model.get_parameter(path).mul_(1.25)
            expected = pytest.raises(RuntimeError, match="modified by an inplace operation")
            with expected if needed else contextlib.nullcontext():
                loss.backward()
            optimizer.zero_grad()
    engine.check_integrity()
    _train_both(engine, reference, whole.batches)
    _compare(engine, reference)


@placements
def test_state_dict_of_a_managed_model_holds_values(placed: dict[str, Any]) -> None:
    whole = recipe("opt-post-norm")
    engine, reference = make_engine(whole, **placed), Reference(whole)
    _train_both(engine, reference, whole.batches)
    got, want = engine.module.state_dict(), reference.model.state_dict()
    assert list(got) == list(want)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert got["lm_head.weight"].data_ptr() == got["model.decoder.embed_tokens.weight"].data_ptr()
    part = engine.module.model.state_dict()
    assert all(torch.equal(value, want["model." + name]) for name, value in part.items())
    got["model.decoder.embed_tokens.weight"].zero_()  # a copy: nothing happens to the model
    assert engine.module.state_dict()["lm_head.weight"].any()
    engine.close()


@pytest.mark.parametrize("placed", PLACED.values(), ids=PLACED)
def test_load_state_dict_on_a_managed_model(placed: dict[str, Any]) -> None:
    engine = make_engine(recipe("llama"), **placed)
    wanted = {name: torch.randn_like(value) for name, value in llama().state_dict().items()}
    with pytest.raises(RuntimeError, match="assign"):
        engine.module.load_state_dict(wanted, assign=True)
    engine.module.load_state_dict(wanted)
    assert all(torch.equal(value, wanted[name]) for name, value in engine.module.state_dict().items())
    engine.check_integrity()
    engine.close()


def test_cast_of_a_managed_model_is_refused() -> None:
    engine = make_engine(recipe("llama"), **PLACED["cuda"])
    for change in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to("meta")):
        with pytest.raises(zero.UserError, match="precision.dtype"):
            change(engine.module)
    assert engine.module.to("cpu") is engine.module
    assert engine.module.float() is engine.module
    engine.check_integrity()
    engine.close()
    engine.module.half()


# -- saving ----------------------------------------------------------------------------------------------------------


def _tied(build: Any, tied: bool) -> Any:
    def built() -> nn.Module:
        model = build()
        config = copy.deepcopy(model.config)
        config.tie_word_embeddings = tied
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return type(model)(config).train()

    return built


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_save_pretrained_loads_in_plain_transformers(name: str, dtype: str, tied: bool, tmp_path: Path) -> None:
    whole = recipe(name, build=_tied(MODELS[name], tied), dtype=dtype)
    engine = make_engine(whole, int(least_capacity(whole) * 1.3))
    _steps(engine.module, engine.optimizer, whole.batches)
    engine.save_pretrained(tmp_path)
    engine.eval()
    with torch.no_grad():
        want = engine(**whole.batches[0]).logits
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert torch.equal(loaded.eval()(**whole.batches[0]).logits, want)
    head, embedding = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) == tied
    engine.check_integrity()
    engine.close()


# -- closing ---------------------------------------------------------------------------------------------------------


@placements
def test_closed_engine_leaves_model_and_optimizer_to_plain_pytorch(placed: dict[str, Any]) -> None:
    whole = recipe("opt-pre-norm", batches=batches(6))
    model = whole.build()
    optimizer = adamw(trainable(model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    engine, *_ = zero.initialize(model, optimizer, lr_scheduler=scheduler, config=config_of(whole, **placed))
    torch.manual_seed(5)
    losses = _steps(model, optimizer, whole.batches[:3])
    engine.close()
    engine.close()
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    losses += _steps(model, optimizer, whole.batches[3:])

    plain = whole.build()
    its = adamw(trainable(plain))
    torch.manual_seed(5)
    want = Run(
        _steps(plain, its, whole.batches), weights=dict(plain.state_dict()), states=states_of(its, trainable(plain))
    )
    got = Run(losses, weights=dict(model.state_dict()), states=states_of(optimizer, trainable(model)))
    assert differences(got, want) == []
    plain.load_state_dict(model.state_dict())
    assert not copy.deepcopy(model).load_state_dict(plain.state_dict()).missing_keys


def test_engine_after_engine_goes_on_where_the_first_stopped() -> None:
    whole = recipe("llama", batches=batches(6))
    model = whole.build()
    optimizer = adamw(trainable(model))
    losses: list[float] = []
    run = Run()
    for number, placed in enumerate((PLACED["cpu"], PLACED["cut"], PLACED["cuda"])):
        engine, *_ = zero.initialize(model, optimizer, config=config_of(whole, **placed))
        losses += _steps(engine.module, engine.optimizer, whole.batches[2 * number : 2 * number + 2])
        run = finish(engine, Run(losses))
    want = run_plain(whole)
    want.norms, want.scales = [], []
    assert differences(run, want) == []


def test_low_precision_model_closed_is_a_low_precision_model() -> None:
    whole = recipe("llama", dtype="bf16", batches=batches(4))
    model = whole.build()
    optimizer = adamw(trainable(model))
    engine, *_ = zero.initialize(model, optimizer, config=config_of(whole, **PLACED["cpu"]))
    _steps(model, optimizer, whole.batches[:2])
    engine.close()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    before = model.lm_head.weight.clone()
    _steps(model, optimizer, whole.batches[2:])
    assert not torch.equal(before, model.lm_head.weight)


def test_closed_engine_refuses_to_go_on() -> None:
    engine = make_engine(recipe("llama"), **PLACED["cpu"])
    engine.close()
    for verb in (lambda: engine(**batches(1)[0]), engine.step, lambda: engine.save_pretrained("nowhere")):
        with pytest.raises(zero.UserError, match="closed"):
            verb()
    assert not Path("nowhere").exists()


def test_closing_gives_all_memory_back() -> None:
    engine = make_engine(recipe("llama"), **PLACED["cut"])
    _steps(engine.module, engine.optimizer, batches(2))
    assert engine.memory_report().host_bytes > 0
    engine.close()
    assert engine.memory_report().host_bytes == 0
    assert engine.device.model_data_bytes == 0


def test_second_engine_over_a_managed_model_is_refused() -> None:
    whole = recipe("llama")
    engine = make_engine(whole, **PLACED["cpu"])
    for optimizer in (None, adamw(trainable(engine.module))):
        with pytest.raises(zero.UserError, match="already managed"):
            zero.initialize(engine.module, optimizer, config=config_of(whole, **PLACED["cpu"]))
    assert _steps(engine.module, engine.optimizer, whole.batches) == run_plain(whole).losses
    engine.check_integrity()
    engine.close()


def test_refused_capacity_leaves_model_and_optimizer_as_they_were() -> None:
    whole = recipe("opt-pre-norm")
    model = whole.build()
    optimizer = adamw(trainable(model))
    torch.manual_seed(5)
    losses = _steps(model, optimizer, whole.batches[:1])
    for policy, capacity_bytes in (("auto", 4096), ("cuda", 100_000)):
        with pytest.raises(DoesNotFitError):
            zero.initialize(model, optimizer, config=config_of(whole, capacity_bytes, policy))
    losses += _steps(model, optimizer, whole.batches[1:])
    plain = whole.build()
    its = adamw(trainable(plain))
    torch.manual_seed(5)
    want = Run(
        _steps(plain, its, whole.batches), weights=dict(plain.state_dict()), states=states_of(its, trainable(plain))
    )
    got = Run(losses, weights=dict(model.state_dict()), states=states_of(optimizer, trainable(model)))
    assert differences(got, want) == []


def test_gradients_from_before_are_taken_over() -> None:
    whole = recipe("llama")
    model, plain = whole.build(), whole.build()
    for each in (model, plain):
        each(**whole.batches[0]).loss.backward()
    optimizer, its = adamw(trainable(model)), adamw(trainable(plain))
    engine, *_ = zero.initialize(model, optimizer, config=config_of(whole, **PLACED["cpu"]))
    for each, stepper in ((engine.module, engine.optimizer), (plain, its)):
        each(**whole.batches[1]).loss.backward()  # adds to what was there
        stepper.step()
        stepper.zero_grad()
        each(**whole.batches[2]).loss.backward()
        stepper.step()
    want = Run(weights=dict(plain.state_dict()), states=states_of(its, trainable(plain)))
    assert differences(finish(engine, Run()), want) == []


def test_no_engine_without_optimizer_can_step() -> None:
    engine = zero.initialize(llama(), config=config_of(Recipe(llama, []), **PLACED["cpu"]))[0]
    assert engine.optimizer is None
    with torch.no_grad():
        assert torch.equal(engine(**batches(1)[0]).logits, llama()(**batches(1)[0]).logits)
    with pytest.raises(zero.UserError, match="no optimizer"):
        engine.step()
    engine.close()


def test_initialize_returns_what_was_given() -> None:
    model, loader, test_loader, criterion = llama(), [1, 2], [3], nn.CrossEntropyLoss()
    optimizer = adamw(trainable(model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    config = config_of(recipe("llama"), **PLACED["cpu"])
    engine, train, test, schedule = zero.initialize(
        model, optimizer, criterion, loader, test_loader, scheduler, config=config
    )
    assert (list(train), len(train), test, schedule) == ([1, 2], 2, test_loader, scheduler)
    assert (engine.criterion, engine.module) == (criterion, model)
    engine.close()
    engine, *rest = zero.initialize(model, config=config)
    assert rest == [None, None, None]
    engine.close()
    with pytest.raises(zero.UserError, match=r"torch\.nn\.Module"):
        zero.initialize("opt-125m", config=config)  # type: ignore[arg-type]
