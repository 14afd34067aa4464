"""metaseq checkpoints to Hugging Face folders: the same logits, and nothing that the files ask for is run."""

from __future__ import annotations

import argparse
import json
import logging
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import metaseq_writer
import opt_models
import pytest
import torch
from torch import Tensor
from transformers import OPTForCausalLM

from zero.errors import UserError
from zero.models.metaseq import convert_metaseq, main
from zero.models.metaseq_pickle import load_inert
from zero.models.sizes import OPT_SIZES, OPTSize

# Pickled by its name alone: called if anybody ever looks the name up and calls it.
WAS_RUN: list[str] = []


def run_me(word: str) -> str:
    """What a hostile file wants to be called."""
    WAS_RUN.append(word)
    return word


class Evil:
    """Pickles as a call of a function."""

    def __init__(self, function: Any = run_me, *arguments: Any) -> None:
        self._call = function, arguments or ("run",)

    def __reduce__(self) -> Any:
        return self._call


def assert_same_model(folder: Path, model: Any) -> None:
    """Weights bitwise, logits, and the config of what computes."""
    made, report = OPTForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert made.dtype == model.dtype
    given, wanted = opt_models.saved(made), opt_models.saved(model)
    assert sorted(given) == sorted(wanted)
    assert all(torch.equal(given[name], wanted[name]) for name in wanted)
    ours, theirs = (
        {
            key: value
            for key, value in m.config.to_dict().items()
            if key not in ("_name_or_path", "dtype", "architectures")
        }
        for m in (made, model)
    )
    assert ours == theirs
    tokens = torch.randint(3, model.config.vocab_size, (2, 17))
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    with torch.no_grad():
        first, second = (m.eval()(input_ids=tokens, attention_mask=mask).logits for m in (made, model))
    assert torch.equal(first[mask.bool()], second[mask.bool()])


CONVERTIBLE = ("plain", "350m", "post_norm", "no_final_norm", "no_bias", "no_affine", "gelu")


@pytest.mark.parametrize("kind", CONVERTIBLE)
def test_two_by_two_gives_the_same_logits(kind: str, tmp_path: Path) -> None:
    model = opt_models.opt_model(**opt_models.KINDS[kind], vocab_size=62)
    metaseq_writer.write(tmp_path / "metaseq", model)
    assert len(list((tmp_path / "metaseq").iterdir())) == 4
    described = convert_metaseq(tmp_path / "metaseq", tmp_path / "hf")
    assert (described.num_layers, described.vocab_size) == (3, 62)
    assert_same_model(tmp_path / "hf", model)


@pytest.mark.parametrize(("num_parts", "num_shards"), [(1, 1), (1, 5), (4, 1), (4, 3), (2, 7)])
def test_other_divisions(num_parts: int, num_shards: int, tmp_path: Path) -> None:
    model = opt_models.opt_model(vocab_size=64).half()
    metaseq_writer.write(tmp_path / "metaseq", model, num_parts, num_shards)
    convert_metaseq(tmp_path / "metaseq", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float16"
    made = OPTForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert_same_weights(made, model)


def assert_same_weights(made: Any, model: Any) -> None:
    """Bitwise."""
    given, wanted = opt_models.saved(made), opt_models.saved(model)
    assert all(torch.equal(given[name], wanted[name]) for name in wanted)


def state_of(model: Any) -> dict[str, Tensor]:
    """Weights without the head."""
    return {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}


class TestPublishedForms:
    """The files that were published are not all as a training writes them."""

    @pytest.mark.parametrize("fused", [True, False])
    def test_unflattened_parts(self, fused: bool, tmp_path: Path) -> None:
        model = opt_models.opt_model(vocab_size=64)
        options = metaseq_writer.options_of(model.config, 2)
        for number, part in enumerate(metaseq_writer.parts_of(state_of(model), 2, 3, fused)):
            weights = part | {"decoder.version": torch.tensor([3.0])}
            metaseq_writer.save(tmp_path / f"reshard-model_part-{number}.pt", weights, {}, cfg={"model": options})
        convert_metaseq(tmp_path, tmp_path / "hf")
        assert_same_model(tmp_path / "hf", model)

    @pytest.mark.parametrize("as_folder", [True, False])
    def test_one_file_with_old_options(self, as_folder: bool, tmp_path: Path) -> None:
        model = opt_models.opt_model(**opt_models.KINDS["350m"])
        part = metaseq_writer.parts_of(state_of(model), 1, 3, fused=False)[0]
        part["decoder.output_projection.weight"] = part["decoder.embed_tokens.weight"].clone()
        options = metaseq_writer.options_of(model.config, 1)
        metaseq_writer.save(tmp_path / "reshard.pt", part, None, args=options)
        convert_metaseq(tmp_path if as_folder else tmp_path / "reshard.pt", tmp_path / "hf")
        assert_same_model(tmp_path / "hf", model)

    @pytest.mark.parametrize("num_shards", [1, 3])
    @pytest.mark.parametrize("by_layer", [True, False])
    def test_flat_parts_that_do_not_say_what_is_in_them(
        self, by_layer: bool, num_shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As 66b and 175b were published (by layer), and the smaller ones (one vector), both without a list."""
        model = opt_models.opt_model(vocab_size=50272).half()
        monkeypatch.setitem(OPT_SIZES, "opt-tiny", TinySize("opt-tiny", 3, 4, 24, 0, 2))
        for number, part in enumerate(metaseq_writer.parts_of(state_of(model), 2, 3)):
            if by_layer:
                shards = [weights for weights, _ in metaseq_writer.flatten(part, num_shards)]
            else:
                flat = torch.cat([value.flatten() for value in part.values()])
                length = -(-flat.numel() // num_shards)
                flat = torch.nn.functional.pad(flat, (0, num_shards * length - flat.numel()))
                shards = [{"flat_param_0": piece.clone()} for piece in flat.split(length)]
            for rank, weights in enumerate(shards):
                metaseq_writer.save(tmp_path / f"reshard-model_part-{number}-shard{rank}.pt", weights, None)
        with pytest.raises(UserError, match=r"does not say its decoder_layers.*--size"):
            convert_metaseq(tmp_path, tmp_path / "hf")
        convert_metaseq(tmp_path, tmp_path / "hf", size="opt-tiny")
        assert_same_weights(OPTForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto"), model)
        with pytest.raises(UserError, match=r"elements, this model's would have|flat parameters"):
            convert_metaseq(tmp_path, tmp_path / "other", size="opt-125m")

    def test_omegaconf_inside(self, tmp_path: Path) -> None:
        model = opt_models.opt_model(vocab_size=64)
        part = metaseq_writer.parts_of(state_of(model), 1, 3)[0]
        with metaseq_writer.omegaconf_classes() as omegaconf:
            options = vars(metaseq_writer.options_of(model.config, 1, alibi=False))
            options = {name: omegaconf.AnyNode(value) for name, value in options.items()}
            config = omegaconf.DictConfig({"model": omegaconf.DictConfig(options)})
            metaseq_writer.save(tmp_path / "reshard.pt", part, None, cfg=config)
        convert_metaseq(tmp_path, tmp_path / "hf")
        assert_same_model(tmp_path / "hf", model)


class TinySize(OPTSize):
    """A published size that a test can hold."""

    def config(self, **changes: Any) -> Any:
        return super().config(**({"ffn_dim": 40, "max_position_embeddings": 32} | changes))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two parts of two shards."""
    metaseq_writer.write(tmp_path / "metaseq", opt_models.opt_model(vocab_size=62))
    return tmp_path / "metaseq"


def change(path: Path, **parts: Any) -> None:
    """Other values at the top of a file."""
    torch.save(torch.load(path, weights_only=False) | parts, path)


class TestHostile:
    @pytest.mark.parametrize(
        "evil",
        [Evil(), Evil(eval, "1"), Evil(exec, "1"), Evil(getattr, "", "join"), Evil(__import__, "os"), Evil(print, "x"),
         Evil(torch.load, "x"), Evil(pickle.loads, b""), Evil(Path.unlink, Path("x"))],
        ids=lambda evil: getattr(evil._call[0], "__name__", "evil"),
    )  # fmt: skip
    @pytest.mark.parametrize("where", ["cfg", "model", "extra_state"])
    def test_a_call_is_refused_and_not_made(self, where: str, evil: Evil, checkpoint: Path, tmp_path: Path) -> None:
        target = checkpoint / "checkpoint_last-model_part-1-shard1.pt"
        content = torch.load(target, weights_only=False)
        torch.save(content | {where: {"a": evil}}, target)
        with pytest.raises(UserError, match="to be called when it is loaded"):
            convert_metaseq(checkpoint, tmp_path / "hf")
        assert WAS_RUN == []
        assert not (tmp_path / "hf").exists()

    def test_the_same_file_would_have_run(self, tmp_path: Path) -> None:
        """The payload above is a live one."""
        torch.save({"a": Evil()}, tmp_path / "evil.pt")
        torch.load(tmp_path / "evil.pt", weights_only=False)
        assert WAS_RUN == ["run"]
        WAS_RUN.clear()

    def test_what_looks_like_data_is_not_called_either(self, tmp_path: Path) -> None:
        class Posing(Evil):
            pass

        run_me.__module__, before = "metaseq.tasks", run_me.__module__
        import sys
        import types

        sys.modules["metaseq"], sys.modules["metaseq.tasks"] = (
            types.ModuleType("metaseq"),
            types.ModuleType("metaseq.tasks"),
        )
        sys.modules["metaseq.tasks"].run_me = run_me  # type: ignore[attr-defined]
        try:
            torch.save({"a": Posing(), "b": argparse.Namespace(x=1), "c": defaultdict(int, y=2)}, tmp_path / "x.pt")
            loaded = load_inert(tmp_path / "x.pt")
        finally:
            run_me.__module__ = before
            del sys.modules["metaseq"], sys.modules["metaseq.tasks"]
        assert WAS_RUN == []
        assert (loaded["a"].kind, loaded["a"].arguments) == ("metaseq.tasks.run_me", ("run",))
        assert type(loaded["b"]) is not argparse.Namespace
        assert (loaded["b"].kind, loaded["b"].state) == ("argparse.Namespace", {"x": 1})
        assert loaded["c"] == {"y": 2}

    @pytest.mark.parametrize("cut", [0, 10, 1000, -30])
    def test_damaged_files(self, cut: int, checkpoint: Path, tmp_path: Path) -> None:
        path = checkpoint / "checkpoint_last-model_part-0-shard1.pt"
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(UserError, match=r"shard1\.pt cannot be read as a torch checkpoint"):
            convert_metaseq(checkpoint, tmp_path / "hf")

    def test_a_plain_pickle(self, tmp_path: Path) -> None:
        (tmp_path / "reshard.pt").write_bytes(pickle.dumps({"a": Evil()}))
        with pytest.raises(UserError, match="cannot be read"):
            convert_metaseq(tmp_path, tmp_path / "hf")
        assert WAS_RUN == []


class TestWrongInput:
    def test_a_missing_shard(self, checkpoint: Path, tmp_path: Path) -> None:
        (checkpoint / "checkpoint_last-model_part-0-shard1.pt").unlink()
        with pytest.raises(UserError, match=r"2 parts x 2 shards, but part 0 shard 1 of them are not there"):
            convert_metaseq(checkpoint, tmp_path / "hf")

    def test_all_last_shards_missing(self, checkpoint: Path, tmp_path: Path) -> None:
        for part in (0, 1):
            (checkpoint / f"checkpoint_last-model_part-{part}-shard1.pt").unlink()
        with pytest.raises(UserError, match="are shards missing"):
            convert_metaseq(checkpoint, tmp_path / "hf")

    def test_a_part_of_another_model(self, checkpoint: Path, tmp_path: Path) -> None:
        metaseq_writer.write(tmp_path / "other", opt_models.opt_model(vocab_size=62, num_hidden_layers=2))
        for shard in (0, 1):
            name = f"checkpoint_last-model_part-1-shard{shard}.pt"
            (checkpoint / name).write_bytes((tmp_path / "other" / name).read_bytes())
        with pytest.raises(UserError, match="hold different parameters"):
            convert_metaseq(checkpoint, tmp_path / "hf")

    def test_several_checkpoints(self, checkpoint: Path, tmp_path: Path) -> None:
        metaseq_writer.write(checkpoint, opt_models.opt_model(vocab_size=62, seed=8), 1, 1, name="checkpoint_1_1000")
        with pytest.raises(UserError, match=r"several checkpoints: checkpoint_1_1000, checkpoint_last; choose one"):
            convert_metaseq(checkpoint, tmp_path / "hf")
        convert_metaseq(checkpoint, tmp_path / "hf", name="checkpoint_1_1000")
        assert_same_model(tmp_path / "hf", opt_models.opt_model(vocab_size=62, seed=8))
        with pytest.raises(UserError, match=r"no nothing\*\.pt"):
            convert_metaseq(checkpoint, tmp_path / "x", name="nothing")

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="reshard-model_part-0.pt"):
            convert_metaseq(tmp_path, tmp_path / "hf")
        with pytest.raises(UserError, match="neither a folder nor a file"):
            convert_metaseq(tmp_path / "none", tmp_path / "hf")

    def test_the_wrong_size(self, checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"is not opt-125m.*decoder_layers is 3, not 12"):
            convert_metaseq(checkpoint, tmp_path / "hf", size="opt-125m")
        with pytest.raises(UserError, match="no OPT 'opt-1b'"):
            convert_metaseq(checkpoint, tmp_path / "hf", size="opt-1b")

    @pytest.mark.parametrize(
        ("changes", "word"),
        [
            ({"decoder_learned_pos": False}, "decoder_learned_pos = False"),
            ({"no_scale_embedding": False}, "no_scale_embedding"),
            ({"alibi": True}, "alibi"),
            ({"activation_fn": "swiglu"}, "activation_fn is 'swiglu'"),
            ({"decoder_output_dim": 12}, "decoder_input_dim and decoder_output_dim differ"),
            ({"decoder_layers": None}, "does not say its decoder_layers"),
            ({"decoder_layers": "three"}, "num_layers is 'three'"),
            ({"decoder_attention_heads": 5}, "5 heads"),
            ({"no_decoder_final_norm": True}, "has a final norm|have a final norm"),
            ({"decoder_layers": 4}, r"missing: .*layers\.3"),
            ({"max_target_positions": 30}, r"embed_positions\.weight' has shape \(34, 24\)"),
        ],
    )
    def test_options_that_do_not_fit(self, changes: dict[str, Any], word: str, tmp_path: Path) -> None:
        metaseq_writer.write(tmp_path / "metaseq", opt_models.opt_model(vocab_size=62), **changes)
        with pytest.raises(UserError, match=word):
            convert_metaseq(tmp_path / "metaseq", tmp_path / "hf")
        assert not (tmp_path / "hf").exists()

    @pytest.mark.parametrize(
        ("model", "word"),
        [(None, "holds no model"), ({}, "holds no model"), ({"a": 1}, "'a' in the model is a int"),
         ({"decoder.embed_positions._float_tensor": torch.zeros(1)}, "sinusoidal"),
         ({"decoder.version": torch.zeros(1)}, "missing: model.decoder.embed_tokens")],
    )  # fmt: skip
    def test_a_model_that_is_none(self, model: Any, word: str, tmp_path: Path) -> None:
        options = metaseq_writer.options_of(opt_models.opt_model().config, 1)
        torch.save({"model": model, "args": options}, tmp_path / "reshard.pt")
        with pytest.raises(UserError, match=word):
            convert_metaseq(tmp_path, tmp_path / "hf")

    @pytest.mark.parametrize("damage", ["names", "shapes", "padding", "params", "fsdp_path"])
    def test_a_list_of_contents_that_is_wrong(self, damage: str, checkpoint: Path, tmp_path: Path) -> None:
        path = checkpoint / "checkpoint_last-model_part-0-shard0.pt"
        metadata = torch.load(path, weights_only=False)["shard_metadata"]
        instance = metadata["param_metadata"][1]
        info = instance["params"]["flat_param_0"]
        if damage == "names":
            info["names"] = info["names"][:-1]
        elif damage == "shapes":
            info["shapes"][0] = (3, -24)
        elif damage == "padding":
            info["padding"] = 10**9
        else:
            instance[damage] = None
        change(path, shard_metadata=metadata)
        with pytest.raises(UserError, match=r"shard0\.pt"):
            convert_metaseq(checkpoint, tmp_path / "hf")

    def test_an_unknown_parameter_is_named(self, tmp_path: Path) -> None:
        model = opt_models.opt_model(vocab_size=64)
        part = metaseq_writer.parts_of(state_of(model), 1, 3)[0] | {
            "decoder.layernorm_embedding.weight": torch.ones(24)
        }
        metaseq_writer.save(tmp_path / "reshard.pt", part, None, args=metaseq_writer.options_of(model.config, 1))
        with pytest.raises(UserError, match=r"unknown: model\.decoder\.layernorm_embedding\.weight"):
            convert_metaseq(tmp_path, tmp_path / "hf")

    def test_a_full_target(self, checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="is not empty"):
            convert_metaseq(checkpoint, checkpoint)


def test_parts_that_drifted_apart_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = opt_models.opt_model(vocab_size=64)
    options = metaseq_writer.options_of(model.config, 2, no_emb_dropout=False)
    for number, part in enumerate(metaseq_writer.parts_of(state_of(model), 2, 3)):
        part["decoder.layers.1.fc2.bias"] = part["decoder.layers.1.fc2.bias"] + number
        metaseq_writer.save(tmp_path / f"reshard-model_part-{number}.pt", part, None, args=options)
    with caplog.at_level(logging.WARNING, logger="zero"):
        convert_metaseq(tmp_path, tmp_path / "hf")
    assert "decoder.layers.1.fc2.bias differs by up to 1 between part 0, which is taken, and part 1" in caplog.text
    assert "has no dropout of the embeddings (no_emb_dropout)" in caplog.text
    assert_same_model(tmp_path / "hf", model)


def test_memory_is_that_of_one_tensor_not_of_the_model(checkpoint: Path, tmp_path: Path) -> None:
    """No tensor that is made is larger than the largest weight, and none is alive while the next is made."""
    from zero.models import metaseq

    seen: list[int] = []
    written = metaseq.write_safetensors

    def write_one_by_one(tensors: Any, folder: Path) -> None:
        def watched() -> Any:
            for name, value in tensors:
                seen.append(value.untyped_storage().nbytes())
                yield name, value

        written(watched(), folder)

    metaseq.write_safetensors = write_one_by_one  # type: ignore[assignment]
    try:
        convert_metaseq(checkpoint, tmp_path / "hf")
    finally:
        metaseq.write_safetensors = written
    assert len(seen) == 52
    assert max(seen) == 62 * 24 * 4  # not a view of a whole flat parameter, nor of a mapped file


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint), str(tmp_path / "hf")]) == 0
    assert_same_model(tmp_path / "hf", opt_models.opt_model(vocab_size=62))
    assert main([str(checkpoint), str(tmp_path / "hf"), "--name", "checkpoint_last"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([str(checkpoint), str(tmp_path / "x"), "--size", "opt-125m"]) == 2
