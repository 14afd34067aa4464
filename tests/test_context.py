"""``ZeroInitContext``: the model is the one that ``from_pretrained`` gives without it, value for value."""

from __future__ import annotations

import copy
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaForCausalLM,
    LlamaModel,
    OPTForCausalLM,
    OPTModel,
)

import zero
from tests.context_models import (
    MODELS,
    NUM_CONVERTED,
    assert_same,
    config,
    load_both,
    num_pending,
    save,
    short_name,
    through_an_engine,
)
from zero.errors import UserError
from zero.pending import PendingTensor

DTYPES = [torch.float32, torch.bfloat16]


# -- equal to plain from_pretrained ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_the_one_of_from_pretrained(name: str, shards: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    save(name, tmp_path, dtype, shards)
    plain, streamed = load_both(MODELS[name][0], tmp_path)
    total = len(list(streamed.parameters()))
    assert num_pending(streamed) == total - NUM_CONVERTED.get(name, 0), "values were loaded too early"
    assert type(streamed) is type(plain)
    assert streamed.config.to_dict() == plain.config.to_dict()
    through_an_engine(streamed)
    assert_same(plain, streamed)


@pytest.mark.parametrize("stored", DTYPES, ids=short_name)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16], ids=short_name)
def test_the_dtype_argument_casts(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    save("llama, tied", tmp_path, stored)
    plain, streamed = load_both(LlamaForCausalLM, tmp_path, dtype=wanted)
    assert streamed.dtype == wanted
    through_an_engine(streamed)
    assert_same(plain, streamed)


@pytest.mark.parametrize("loaded", ["float32", "bfloat16"])
@pytest.mark.parametrize("trained", ["fp32", "bf16"])
def test_training_is_the_same_whatever_dtype_is_stored_loaded_and_trained(
    loaded: str, trained: str, tmp_path: Path
) -> None:
    save("opt, tied", tmp_path, torch.float32)
    losses, weights = [], []
    for model in load_both(OPTForCausalLM, tmp_path, dtype=loaded):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = zero.initialize(model, optimizer, config=config(trained, "auto"))
        engine.eval()
        ids = torch.arange(4, 20).reshape(2, 8)
        for _ in range(3):
            engine.zero_grad()
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        masters = [t.chunk.companion_of(t, "master") for t in engine._ordered]
        weights.append(masters)
        engine.close()
    assert losses[:3] == losses[3:]
    assert losses[0] != losses[2]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize(("stored", "kind"), [(OPTModel, OPTForCausalLM), (LlamaModel, LlamaForCausalLM)])
def test_a_file_of_the_base_model_loads_with_a_head(stored: Any, kind: Any, tmp_path: Path) -> None:
    name = "opt, tied" if stored is OPTModel else "llama, untied"
    save(name, tmp_path, model=stored(MODELS[name][1]))
    plain, streamed = load_both(kind, tmp_path)
    assert num_pending(streamed) >= 20
    through_an_engine(streamed)
    assert_same(plain, streamed)  # Llama's head is in no file: drawn from the same random state


def test_a_file_with_a_head_loads_as_the_base_model(tmp_path: Path) -> None:
    save("llama, untied", tmp_path)
    plain, streamed = load_both(LlamaModel, tmp_path)
    through_an_engine(streamed)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), streamed.parameters(), strict=True))


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_are_both_in_the_file(equal: bool, tmp_path: Path) -> None:
    save("llama, tied", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"] = head if equal else head + 1
    save_file(tensors, path, metadata={"format": "pt"})
    plain, streamed = load_both(LlamaForCausalLM, tmp_path)
    tied = streamed.lm_head.weight is streamed.model.embed_tokens.weight
    assert tied == equal == (plain.lm_head.weight is plain.model.embed_tokens.weight)
    if equal:
        assert num_pending(streamed) == len(list(streamed.parameters())), "compared without loading"
    through_an_engine(streamed)
    assert_same(plain, streamed)


def test_parameters_that_no_file_has_are_initialised_as_transformers_does(tmp_path: Path) -> None:
    save("opt, tied", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name in ("model.decoder.layers.0.fc1.weight", "model.decoder.layers.1.final_layer_norm.weight"):
        del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    torch.manual_seed(1)
    plain, plain_info = OPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    torch.manual_seed(1)
    with zero.ZeroInitContext():
        streamed, info = OPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info == plain_info
    assert len(info["missing_keys"]) == 2
    assert num_pending(streamed) == len(list(streamed.parameters())) - 2
    through_an_engine(streamed)
    assert_same(plain, streamed)


def test_a_head_of_another_length_is_initialised_where_that_is_asked_for(tmp_path: Path) -> None:
    save("llama, untied", tmp_path)
    plain, streamed = load_both(LlamaForCausalLM, tmp_path, vocab_size=80, ignore_mismatched_sizes=True)
    through_an_engine(streamed)
    assert_same(plain, streamed)


def test_config_and_generation_config(tmp_path: Path) -> None:
    save("llama, untied", tmp_path)
    GenerationConfig(max_length=17, num_beams=3).save_pretrained(tmp_path)
    changed = copy.deepcopy(MODELS["llama, untied"][1])
    changed.attention_bias = False
    changed.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    plain, streamed = load_both(LlamaForCausalLM, tmp_path, config=changed)
    assert streamed.generation_config.to_dict() == plain.generation_config.to_dict()
    assert streamed.generation_config.num_beams == 3
    through_an_engine(streamed)
    assert_same(plain, streamed)


def test_the_auto_class(tmp_path: Path) -> None:
    save("gpt2", tmp_path, shards=True)
    plain, streamed = load_both(AutoModelForCausalLM, tmp_path, attn_implementation="eager")
    assert num_pending(streamed) == len(list(streamed.parameters()))
    assert streamed.config._attn_implementation == "eager"
    through_an_engine(streamed)
    assert_same(plain, streamed)


@pytest.mark.parametrize(
    "memory",
    [
        {"policy": "cuda"},
        {"policy": "cpu"},
        {"policy": "auto"},
        {"policy": "static", "resident_parameters": 0.5, "resident_optimizer": 0.25},
    ],
    ids=lambda memory: memory["policy"],
)
def test_every_policy_takes_over_and_gives_back(memory: dict[str, Any], tmp_path: Path) -> None:
    save("opt, post-norm, projected", tmp_path)
    plain, streamed = load_both(OPTForCausalLM, tmp_path)
    through_an_engine(streamed, **memory)
    assert_same(plain, streamed)


# -- from the Hub's cache ----------------------------------------------------------------------------------------------


def _hub_cache(folder: Path, shards: bool) -> Path:
    """A cache as ``huggingface_hub`` lays it out: snapshots of links to blobs."""
    repository = folder / "models--somebody--tiny"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    save("llama, tied", snapshot, shards=shards)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / f"{number:064d}")
        file.symlink_to(Path("..", "..", "blobs", f"{number:064d}"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_a_hub_name_comes_from_the_cache(shards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = _hub_cache(tmp_path, shards)
    plain, streamed = load_both(AutoModelForCausalLM, "somebody/tiny", cache_dir=tmp_path, local_files_only=True)
    assert num_pending(streamed) == len(list(streamed.parameters()))
    assert streamed.name_or_path == "somebody/tiny"
    through_an_engine(streamed)
    assert_same(plain, streamed)
    by_folder = load_both(LlamaForCausalLM, snapshot)[1]
    through_an_engine(by_folder)
    assert_same(plain, by_folder)


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, OPTForCausalLM])
def test_a_name_that_cannot_be_had_says_so(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="somebody/nothing") as caught, zero.ZeroInitContext():
        kind.from_pretrained("somebody/nothing", cache_dir=tmp_path, local_files_only=True)
    assert "network" in str(caught.value)
    assert "folder" in str(caught.value)


# -- weights that are not loaded ---------------------------------------------------------------------------------------


def _make_pickle(folder: Path) -> None:
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, OPTForCausalLM])
def test_pickles_are_refused_with_the_way_to_convert_them(kind: Any, tmp_path: Path) -> None:
    _make_pickle(save("opt, tied", tmp_path))
    with pytest.raises(UserError, match="use_safetensors=False") as caught, zero.ZeroInitContext():
        kind.from_pretrained(tmp_path)
    assert "pytorch_model.bin" in str(caught.value)


def test_a_hub_model_of_pickles_is_refused(tmp_path: Path) -> None:
    snapshot = _hub_cache(tmp_path, shards=False)
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    with pytest.raises(UserError, match="use_safetensors=False"), zero.ZeroInitContext():
        LlamaForCausalLM.from_pretrained("somebody/tiny", cache_dir=tmp_path, local_files_only=True)


def test_pickles_that_are_asked_for_are_loaded_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _make_pickle(save("opt, tied", tmp_path))
    with caplog.at_level(logging.INFO, "zero"):
        plain, streamed = load_both(OPTForCausalLM, tmp_path, use_safetensors=False)
    assert num_pending(streamed) == 0
    assert [r.getMessage() for r in caplog.records] == [
        "OPTForCausalLM is loaded whole by transformers: use_safetensors=False asks for its pickled weights"
    ]
    assert_same(plain, streamed)


def test_initialize_loads_no_parameter_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes straight into its chunk: one that is loaded first would be a second copy of the model."""
    save("opt, tied", tmp_path)
    with zero.ZeroInitContext():
        model = OPTForCausalLM.from_pretrained(tmp_path)
    loaded: list[str] = []
    monkeypatch.setattr(PendingTensor, "load", lambda self: loaded.append(repr(self)))
    zero.initialize(model, torch.optim.AdamW(model.parameters()), config={"device": {"type": "cpu"}})
    assert not loaded


def test_a_state_dict_is_loaded_whole(caplog: pytest.LogCaptureFixture) -> None:
    kind, opt = MODELS["opt, tied"]
    state = kind(opt).state_dict()
    with caplog.at_level(logging.INFO, "zero"), zero.ZeroInitContext():
        model = kind.from_pretrained(None, config=opt, state_dict=state)
    assert num_pending(model) == 0
    assert "values are given" in caplog.text
    assert torch.equal(model.model.decoder.layers[0].fc1.weight, state["model.decoder.layers.0.fc1.weight"])


def test_a_device_map_is_obeyed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save("opt, tied", tmp_path)
    with caplog.at_level(logging.INFO, "zero"), zero.ZeroInitContext():
        model = OPTForCausalLM.from_pretrained(tmp_path, device_map="meta")
        assert "device_map sends it to meta" in caplog.text
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert num_pending(OPTForCausalLM.from_pretrained(tmp_path, device_map="cpu")) > 0


def test_a_file_that_is_cut_off_after_loading_is_named(tmp_path: Path) -> None:
    save("opt, tied", tmp_path)
    with zero.ZeroInitContext():
        model = OPTForCausalLM.from_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"model\.safetensors .*ended early"):
        zero.initialize(model, config=config())


def test_an_index_that_leads_out_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    folder = save("opt, tied", tmp_path / "model", shards=True)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name, file = next(iter(index["weight_map"].items()))
    (folder / file).rename(tmp_path / file)
    for key, value in index["weight_map"].items():
        if value == file:
            index["weight_map"][key] = f"../{file}"
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="only files inside the folder are read"), zero.ZeroInitContext():
        OPTForCausalLM.from_pretrained(folder)
    assert name
