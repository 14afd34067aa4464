"""OPT and GPT-2 as one: descriptions, weights and folders there and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from opt_models import KINDS, SHAPE, opt_model, randomized, saved
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from zero.data.tokenizer import builtin_tokenizer
from zero.errors import UserError
from zero.models.convert import UNREAD_FILE, convert_folder, main
from zero.models.sizes import OPT_SIZES
from zero.models.unified import UnifiedConfig
from zero.models.unified_weights import (
    UNREAD_ROWS,
    WeightsInMemory,
    to_gpt2_weights,
    to_opt_weights,
    weight_shapes,
)

GPT2_SHAPE: dict[str, Any] = {"vocab_size": 61, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 32}

BOTH_EXPRESS = ("plain", "untied")


def gpt2_model(**changes: Any) -> GPT2LMHeadModel:
    """A tiny GPT-2, every parameter random."""
    torch.manual_seed(6)
    return randomized(GPT2LMHeadModel(GPT2Config(**(GPT2_SHAPE | {"embd_pdrop": 0.0} | changes))).eval())


def assert_bitwise(given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Names, dtypes and bytes."""
    assert sorted(given) == sorted(wanted)
    for name, value in wanted.items():
        assert given[name].dtype == value.dtype
        assert given[name].shape == value.shape, name
        assert torch.equal(given[name].view(torch.uint8), value.view(torch.uint8)), name


def same_config(given: Any, wanted: Any) -> bool:
    """All fields but where the config was read from."""
    ignored = {"_name_or_path", "architectures"}
    return {k: v for k, v in given.to_dict().items() if k not in ignored} == {
        k: v for k, v in wanted.to_dict().items() if k not in ignored
    }


class TestDescription:
    @pytest.mark.parametrize("kind", KINDS)
    def test_opt_there_and_back(self, kind: str) -> None:
        config = OPTConfig(**(SHAPE | KINDS[kind]), dropout=0.3, attention_dropout=0.2, layerdrop=0.1, init_std=0.006)
        assert same_config(UnifiedConfig.from_config(config).to_config("opt"), config)

    @pytest.mark.parametrize("name", OPT_SIZES)
    def test_published_sizes(self, name: str) -> None:
        config = OPT_SIZES[name].config(prefix="</s>", activation_dropout=0.0, dtype="float16")
        model = UnifiedConfig.from_config(config)
        assert same_config(model.to_config("opt"), config)
        if name == "opt-350m":
            with pytest.raises(UserError, match=r"GPT2LMHeadModel cannot express"):
                model.to_config("gpt2")
            assert [p.split(" ")[0] for p in model.problems("gpt2")] == [
                "norm_placement", "final_norm", "projection_size",
            ]  # fmt: skip
        else:
            gpt2 = model.to_config("gpt2")
            assert (gpt2.n_positions, gpt2.n_inner, gpt2.activation_function) == (2048, None, "relu")
            assert (gpt2.embd_pdrop, gpt2.attn_pdrop, gpt2.resid_pdrop) == (0.0, 0.0, 0.1)
            assert same_config(UnifiedConfig.from_config(gpt2).to_config("opt"), config)

    @pytest.mark.parametrize(
        "changes",
        [{}, {"n_inner": 40}, {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True},
         {"reorder_and_upcast_attn": True}, {"layer_norm_epsilon": 1e-6}, {"pad_token_id": 3}, {"n_ctx": 32},
         {"embd_pdrop": 0.3}, {"tie_word_embeddings": False}, {"task_specific_params": {"a": 1}}],
    )  # fmt: skip
    def test_gpt2_there_and_back(self, changes: dict[str, Any]) -> None:
        config = GPT2Config(**(GPT2_SHAPE | changes))
        assert same_config(UnifiedConfig.from_config(config).to_config("gpt2"), config)

    @pytest.mark.parametrize(
        ("changes", "word"),
        [
            ({"layer_norm_epsilon": 1e-6}, "norm_eps"),
            ({"scale_attn_weights": False}, "scale_attn_weights"),
            ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
            ({"reorder_and_upcast_attn": True}, "set upcast_attention to False"),
            ({"embd_pdrop": 0.1}, "set embedding_dropout to 0.0"),
        ],
    )
    def test_what_opt_cannot_express_is_named(self, changes: dict[str, Any], word: str) -> None:
        model = UnifiedConfig.from_config(GPT2Config(**(GPT2_SHAPE | {"embd_pdrop": 0.0} | changes)))
        assert len(model.problems("opt")) == 1
        with pytest.raises(UserError, match=word):
            model.to_config("opt")

    @pytest.mark.parametrize(
        ("kind", "words"),
        [
            ("350m", ["norm_placement", "final_norm", "projection_size"]),
            ("post_norm", ["norm_placement", "final_norm"]),
            ("no_final_norm", ["final_norm"]),
            ("no_bias", ["bias"]),
            ("no_affine", ["norm_affine"]),
        ],
    )
    def test_what_gpt2_cannot_express_is_named(self, kind: str, words: list[str]) -> None:
        model = UnifiedConfig.from_config(OPTConfig(**(SHAPE | KINDS[kind])))
        assert [problem.split(" ")[0] for problem in model.problems("gpt2")] == words

    @pytest.mark.parametrize(("field", "value"), [("layerdrop", 0.1), ("activation_dropout", 0.1)])
    def test_dropouts_that_would_be_lost_are_refused(self, field: str, value: float) -> None:
        model = UnifiedConfig.from_config(OPTConfig(**SHAPE, **{field: value}))
        with pytest.raises(UserError, match=field):
            model.to_config("gpt2")
        assert model.changed({field: 0.0}).problems("gpt2") == []

    def test_an_unknown_field_is_refused(self) -> None:
        with pytest.raises(UserError, match="'rope_theta'"):
            UnifiedConfig.from_config(OPTConfig(**SHAPE, rope_theta=1.0))

    @pytest.mark.parametrize(
        ("changes", "word"),
        [({"add_cross_attention": True}, "add_cross_attention"), ({"summary_type": "last"}, "summary_type")],
    )
    def test_gpt2_as_something_else_is_refused(self, changes: dict[str, Any], word: str) -> None:
        with pytest.raises(UserError, match=word):
            UnifiedConfig.from_config(GPT2Config(**GPT2_SHAPE, **changes))

    def test_another_head_is_refused(self) -> None:
        with pytest.raises(UserError, match="OPTForSequenceClassification"):
            UnifiedConfig.from_config(OPTConfig(**SHAPE, architectures=["OPTForSequenceClassification"]))

    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        model = UnifiedConfig.from_config(OPTConfig(**SHAPE, prefix="</s>", eos_token_id=[2, 3]))
        model.save(tmp_path / "model.json")
        assert UnifiedConfig.load(tmp_path / "model.json") == model

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            ({"hiden_size": 3}, "did you mean 'hidden_size'"),
            ({"num_layers": None}, "num_layers is None; it must be int"),
            ({"num_layers": -1}, "negative"),
            ({"bias": 1}, "bias is 1; it must be bool"),
            ({"dropout": float("nan")}, "dropout is nan"),
            ({"norm_placement": "both"}, 'allowed are "before" and "after"'),
            ({"num_heads": 5}, "5 heads"),
            ({"eos_token_id": "x"}, "eos_token_id"),
        ],
    )
    def test_a_wrong_description_is_refused(self, change: dict[str, Any], word: str) -> None:
        values = UnifiedConfig.from_config(OPTConfig(**SHAPE)).to_dict()
        with pytest.raises(UserError, match=word):
            UnifiedConfig.from_dict(values | change)

    def test_a_description_that_lacks_a_field_is_refused(self) -> None:
        values = UnifiedConfig.from_config(OPTConfig(**SHAPE)).to_dict()
        del values["bias"]
        with pytest.raises(UserError, match="lacks bias"):
            UnifiedConfig.from_dict(values)

    def test_only_what_the_weights_do_not_depend_on_can_be_changed(self) -> None:
        with pytest.raises(UserError, match="'num_heads' cannot be changed"):
            UnifiedConfig.from_config(OPTConfig(**SHAPE)).changed({"num_heads": 2})


class TestWeights:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_shapes_are_those_of_the_class(self, kind: str) -> None:
        model = opt_model(**KINDS[kind])
        wanted = {name: value.shape for name, value in saved(model).items()}
        assert weight_shapes(UnifiedConfig.from_config(model.config), "opt") == wanted

    @pytest.mark.parametrize("tied", [True, False])
    def test_the_shapes_are_those_of_gpt2(self, tied: bool) -> None:
        model = gpt2_model(tie_word_embeddings=tied)
        wanted = {name: value.shape for name, value in saved(model).items()}
        assert weight_shapes(UnifiedConfig.from_config(model.config), "gpt2") == wanted

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("kind", BOTH_EXPRESS)
    def test_opt_there_and_back_is_the_identity(self, kind: str, dtype: torch.dtype) -> None:
        model = opt_model(**KINDS[kind]).to(dtype)
        described, before = UnifiedConfig.from_config(model.config), saved(model)
        gpt2 = dict(to_gpt2_weights(described, WeightsInMemory(before)))
        rows = gpt2.pop(UNREAD_ROWS)
        again = UnifiedConfig.from_config(described.to_config("gpt2"))
        assert_bitwise(dict(to_opt_weights(again, WeightsInMemory(gpt2), rows)), before)

    def test_gpt2_there_and_back_is_the_identity(self) -> None:
        model = gpt2_model()
        described, before = UnifiedConfig.from_config(model.config), saved(model)
        opt = dict(to_opt_weights(described, WeightsInMemory(before)))
        again = UnifiedConfig.from_config(described.to_config("opt"))
        # Rows of zeros are nothing to keep: nothing travels beside the model.
        assert_bitwise(dict(to_gpt2_weights(again, WeightsInMemory(opt))), before)

    @pytest.mark.parametrize("activation", ["relu", "gelu_new", "gelu"])
    @pytest.mark.parametrize("kind", BOTH_EXPRESS)
    def test_the_logits_agree(self, kind: str, activation: str) -> None:
        opt = opt_model(**KINDS[kind], activation_function=activation)
        described = UnifiedConfig.from_config(opt.config)
        gpt2 = GPT2LMHeadModel(described.to_config("gpt2")).eval()
        weights = dict(to_gpt2_weights(described, WeightsInMemory(saved(opt))))
        del weights[UNREAD_ROWS]
        missing = gpt2.load_state_dict(weights, strict=False)
        assert missing.unexpected_keys == []
        assert set(missing.missing_keys) <= {"lm_head.weight"}
        tokens = torch.randint(0, 61, (3, 20))
        mask = torch.ones_like(tokens)
        mask[1, :5] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            given = gpt2(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
            wanted = opt(input_ids=tokens, attention_mask=mask).logits
        assert (given - wanted)[mask.bool()].abs().max() <= 1e-5

    def test_names_of_the_bare_models_are_understood(self) -> None:
        model = opt_model()
        described, before = UnifiedConfig.from_config(model.config), saved(model)
        wanted = dict(to_gpt2_weights(described, WeightsInMemory(before)))
        bare = {name.removeprefix("model."): value for name, value in before.items()}
        assert_bitwise(dict(to_gpt2_weights(described, WeightsInMemory(bare))), wanted)
        rows = wanted.pop(UNREAD_ROWS)
        published = {name.removeprefix("transformer."): value for name, value in wanted.items()}
        published |= {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.0.attn.masked_bias": torch.tensor(-1e4)}
        described = UnifiedConfig.from_config(described.to_config("gpt2"))
        assert_bitwise(dict(to_opt_weights(described, WeightsInMemory(published), rows)), before)

    def test_missing_and_unknown_weights_are_named(self) -> None:
        model = opt_model()
        described, weights = UnifiedConfig.from_config(model.config), saved(model)
        weights["model.decoder.layers.3.fc1.weight"] = weights.pop("model.decoder.layers.1.fc1.weight")
        with pytest.raises(UserError, match=r"missing: .*layers\.1\.fc1\.weight\n.*unknown: .*layers\.3\.fc1\.weight"):
            to_gpt2_weights(described, WeightsInMemory(weights))

    def test_a_wrong_shape_is_named(self) -> None:
        model = opt_model()
        described, weights = UnifiedConfig.from_config(model.config), saved(model)
        weights["model.decoder.layers.1.fc1.weight"] = torch.zeros(41, 24)
        with pytest.raises(
            UserError, match=r"layers\.1\.fc1\.weight' has shape \(41, 24\); the config makes it \(40, 24\)"
        ):
            to_gpt2_weights(described, WeightsInMemory(weights))

    def test_one_weight_under_two_names_is_refused(self) -> None:
        model = opt_model()
        weights = saved(model)
        weights["decoder.layers.1.fc1.weight"] = weights["model.decoder.layers.1.fc1.weight"] + 1
        with pytest.raises(UserError, match="the same one"):
            to_gpt2_weights(UnifiedConfig.from_config(model.config), WeightsInMemory(weights))

    def test_a_tied_head_in_the_file_must_be_the_table(self) -> None:
        model = opt_model()
        described, weights = UnifiedConfig.from_config(model.config), saved(model)
        weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"].clone()
        assert "lm_head.weight" not in dict(to_gpt2_weights(described, WeightsInMemory(weights)))
        weights["lm_head.weight"][3, 3] += 1
        with pytest.raises(UserError, match="tie_word_embeddings"):
            to_gpt2_weights(described, WeightsInMemory(weights))

    def test_a_missing_final_norm_is_explained(self) -> None:
        model = opt_model()
        described, weights = UnifiedConfig.from_config(model.config), saved(model)
        for part in ("weight", "bias"):
            del weights[f"model.decoder.final_layer_norm.{part}"]
        with pytest.raises(UserError, match=r"4\.20\.1.*\"_remove_final_layer_norm\": true"):
            to_gpt2_weights(described, WeightsInMemory(weights))

    def test_a_final_norm_that_the_config_takes_away_is_explained(self) -> None:
        from zero.models.unified_weights import match_weights

        model = opt_model()
        config = OPTConfig(**SHAPE, _remove_final_layer_norm=True)
        with pytest.raises(UserError, match="set _remove_final_layer_norm to false"):
            match_weights(UnifiedConfig.from_config(config), "opt", WeightsInMemory(saved(model)))

    def test_dtypes_that_would_be_joined_must_be_the_same(self) -> None:
        model = opt_model()
        weights = saved(model)
        name = "model.decoder.layers.2.self_attn.v_proj.weight"
        weights[name] = weights[name].half()
        with pytest.raises(UserError, match=r"v_proj\.weight' is torch\.float16"):
            dict(to_gpt2_weights(UnifiedConfig.from_config(model.config), WeightsInMemory(weights)))


@pytest.fixture
def opt_folder(tmp_path: Path) -> Path:
    """A tiny OPT in fp16 with a tokenizer and a generation config, in two files."""
    folder = tmp_path / "opt"
    model = opt_model(vocab_size=300).half()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder, max_shard_size=20_000)
    assert (folder / "model.safetensors.index.json").exists()
    builtin_tokenizer(300).save_pretrained(folder)
    return folder


def folder_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder."""
    return {
        name: value for file in sorted(folder.glob("model*.safetensors")) for name, value in load_file(file).items()
    }


class TestFolders:
    def test_there_and_back_is_the_identity(self, opt_folder: Path, tmp_path: Path) -> None:
        convert_folder(opt_folder, tmp_path / "gpt2", to="gpt2")
        convert_folder(tmp_path / "gpt2", tmp_path / "again", to="opt")
        assert_bitwise(folder_weights(tmp_path / "again"), folder_weights(opt_folder))
        given, wanted = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "again", opt_folder))
        assert given == wanted
        for file in ("generation_config.json", "tokenizer_config.json", "tokenizer.json"):
            assert (tmp_path / "again" / file).read_bytes() == (opt_folder / file).read_bytes()

    def test_the_folders_load_as_they_are(self, opt_folder: Path, tmp_path: Path) -> None:
        convert_folder(opt_folder, tmp_path / "gpt2", to="gpt2")
        opt = OPTForCausalLM.from_pretrained(opt_folder, dtype=torch.float32).eval()
        gpt2, report = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2", dtype=torch.float32, output_loading_info=True)
        assert not any(report.values())
        assert gpt2.generation_config.max_new_tokens == 7
        tokens = torch.randint(0, 300, (2, 32))
        with torch.no_grad():
            assert (gpt2.eval()(tokens).logits - opt(tokens).logits).abs().max() <= 1e-5
        text = "Hello, you there!"
        first, second = (AutoTokenizer.from_pretrained(f) for f in (opt_folder, tmp_path / "gpt2"))
        assert first(text)["input_ids"] == second(text)["input_ids"]

    def test_a_gpt2_needs_its_embedding_dropout_changed(self, tmp_path: Path) -> None:
        gpt2_model(embd_pdrop=0.1).save_pretrained(tmp_path / "gpt2")
        with pytest.raises(UserError, match="embedding_dropout"):
            convert_folder(tmp_path / "gpt2", tmp_path / "opt", to="opt")
        assert not (tmp_path / "opt").exists()
        convert_folder(tmp_path / "gpt2", tmp_path / "opt", to="opt", changes={"embedding_dropout": 0.0})
        tokens = torch.randint(0, 61, (2, 32))
        models = (GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2"), OPTForCausalLM.from_pretrained(tmp_path / "opt"))
        with torch.no_grad():
            first, second = (model.eval()(tokens).logits for model in models)
        assert (first - second).abs().max() <= 1e-5

    def test_nothing_is_left_of_what_fails(self, opt_folder: Path, tmp_path: Path) -> None:
        name = "model.decoder.layers.2.self_attn.v_proj.bias"
        file = next(f for f in opt_folder.glob("*.safetensors") if name in load_file(f))
        weights = load_file(file)
        weights[name] = weights[name].float()
        save_file(weights, file)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(UserError, match=r"v_proj\.bias"):
            convert_folder(opt_folder, tmp_path / "gpt2", to="gpt2")
        assert sorted(tmp_path.iterdir()) == before

    def test_a_full_target_is_refused(self, opt_folder: Path, tmp_path: Path) -> None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "x").touch()
        with pytest.raises(UserError, match="is not empty"):
            convert_folder(opt_folder, tmp_path / "full", to="gpt2")
        with pytest.raises(UserError, match="is not empty"):
            convert_folder(opt_folder, opt_folder, to="gpt2")

    def test_what_is_no_opt_is_refused(self, opt_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="OPTForCausalLM already"):
            convert_folder(opt_folder, tmp_path / "x", to="opt")
        with pytest.raises(UserError, match="allowed are opt and gpt2"):
            convert_folder(opt_folder, tmp_path / "x", to="llama")
        with pytest.raises(UserError, match="no config.json"):
            convert_folder(tmp_path, tmp_path / "x", to="gpt2")
        (opt_folder / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(UserError, match="'llama'"):
            convert_folder(opt_folder, tmp_path / "x", to="gpt2")

    def test_a_damaged_config_is_refused(self, opt_folder: Path, tmp_path: Path) -> None:
        values = json.loads((opt_folder / "config.json").read_text())
        for broken in ("{", "[]", json.dumps(values | {"num_hidden_layers": "three"})):
            (opt_folder / "config.json").write_text(broken)
            with pytest.raises(UserError, match=r"config\.json"):
                convert_folder(opt_folder, tmp_path / "x", to="gpt2")

    def test_unread_rows_are_checked(self, opt_folder: Path, tmp_path: Path) -> None:
        convert_folder(opt_folder, tmp_path / "gpt2", to="gpt2")
        modes = {file.name: file.stat().st_mode for file in (tmp_path / "gpt2").glob("*.safetensors")}
        assert UNREAD_FILE in modes
        assert len(set(modes.values())) == 1, "whoever may read the model may read it whole"
        for tensors, word in (({"a": torch.zeros(1)}, "only unread"), ({UNREAD_ROWS: torch.zeros(3, 24)}, "shape")):
            save_file(tensors, tmp_path / "gpt2" / UNREAD_FILE)
            with pytest.raises(UserError, match=word):
                convert_folder(tmp_path / "gpt2", tmp_path / "x", to="opt")

    def test_pickles_are_refused(self, opt_folder: Path, tmp_path: Path) -> None:
        for file in opt_folder.glob("*.safetensors*"):
            file.unlink()
        torch.save({}, opt_folder / "pytorch_model.bin")
        with pytest.raises(UserError, match="Pickled weights can run code"):
            convert_folder(opt_folder, tmp_path / "x", to="gpt2")

    def test_the_command(self, opt_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([str(opt_folder), str(tmp_path / "gpt2"), "--to", "gpt2", "--set", "attention_dropout=0.25"]) == 0
        assert json.loads((tmp_path / "gpt2" / "config.json").read_text())["attn_pdrop"] == 0.25
        assert main([str(opt_folder), str(tmp_path / "gpt2"), "--to", "gpt2"]) == 2
        assert "is not empty" in capsys.readouterr().err
        assert main([str(opt_folder), str(tmp_path / "x"), "--to", "gpt2", "--set", "dropout"]) == 2
        assert "FIELD=VALUE" in capsys.readouterr().err
