"""Other ways to write a config: the old Python form, the command line, texts written back; and whatever comes."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from config_helpers import GOOD, LEAVES, ROOT, has_line, problems_of, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zero
from zero.config import (
    AMP_TYPE,
    BucketTensorShardStrategy,
    TensorShardStrategy,
    config_help,
    config_reference,
    load_config,
    parse_overrides,
    to_toml,
)
from zero.config.schema import FIELDS, SECTIONS, table_of
from zero.config.words import FOREIGN_DOTTED, FOREIGN_KEYS, FOREIGN_SECTIONS
from zero.errors import ConfigError

# --- the old Python form --------------------------------------------------------------------------------------------

OLD = """
from zero import TensorShardStrategy
import math
BATCH_SIZE = 4
NUM_EPOCHS = 2
SEQ_LEN = 128
VOCAB = 50304
zero = dict(
    model_config=dict(shard_strategy=TensorShardStrategy(), tensor_placement_policy="auto", reuse_fp16_shard=True),
    optimizer_config=dict(gpu_margin_mem_ratio=0.8, initial_scale=2**5),
)
parallel = dict(pipeline=2, tensor=dict(mode="2.5d", depth=1, size=4))
clip_grad_norm = 1.0
gradient_accumulation = 4
"""


@pytest.fixture
def _strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that a config file imports from `zero`."""
    monkeypatch.setattr(zero, "TensorShardStrategy", TensorShardStrategy, raising=False)
    monkeypatch.setattr(zero, "AMP_TYPE", AMP_TYPE, raising=False)


@pytest.mark.usefixtures("_strategies")
def test_old_form_keeps_its_meaning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "old.py"
    path.write_text(OLD)
    with caplog.at_level(logging.WARNING, logger="zero"):
        config = load_config(path)
    assert config.memory.policy == "auto"
    assert config.precision.dtype == "fp16"
    assert config.precision.initial_scale == 32
    assert config.train.max_grad_norm == 1.0
    assert config.train.gradient_accumulation_steps == 4
    assert config.train.per_device_train_batch_size == 4
    assert config.train.num_train_epochs == 2
    assert config.data.seq_length == 128
    assert config.parallel.pipeline == 2
    assert config.parallel.tensor.mode == "2.5d"
    assert config.parallel.world_size == 8
    assert dict(config.variables) == {"BATCH_SIZE": 4, "NUM_EPOCHS": 2, "SEQ_LEN": 128, "VOCAB": 50304}
    for key in ("gpu_margin_mem_ratio", "reuse_fp16_shard", "shard_strategy"):
        assert sum(key in record.getMessage() for record in caplog.records) == 1


@pytest.mark.usefixtures("_strategies")
def test_old_fp16_alone_and_with_zero(tmp_path: Path) -> None:
    path = tmp_path / "old.py"
    path.write_text("from zero import AMP_TYPE\nfp16 = dict(mode=AMP_TYPE.TORCH, growth_interval=7)\n")
    config = load_config(path)
    assert (config.precision.dtype, config.precision.growth_interval) == ("fp16", 7)
    assert config.memory.policy == "auto"
    both = load_config({"zero": {"model_config": {"tensor_placement_policy": "cpu"}}, "fp16": {"mode": "naive"}})
    assert (both.precision.dtype, both.memory.policy) == ("fp16", "cpu")
    assert load_config({"fp16": {"mode": None}}).precision.dtype == "fp32"


def test_old_defaults_and_choices() -> None:
    plain = load_config({"zero": {"model_config": {"shard_strategy": BucketTensorShardStrategy}}})
    assert (plain.memory.policy, plain.precision.dtype) == ("cuda", "fp16")
    assert load_config({"zero": {"model_config": {"bf16": True}}}).precision.dtype == "bf16"
    explicit = load_config({"zero": {}, "precision": {"dtype": "fp32"}, "memory": {"policy": "cpu"}})
    assert (explicit.precision.dtype, explicit.memory.policy) == ("fp32", "cpu")
    old = load_config({"parallel": {"pipeline": {"size": 2}, "tensor": {"mode": None, "size": 1}}})
    assert (old.parallel.pipeline, old.parallel.tensor.mode) == (2, "none")
    assert load_config({"cudnn_deterministic": True, "torch_ddp": {}, "seed": 7}).train.seed == 7


@pytest.mark.usefixtures("_strategies")
def test_shipped_old_config_loads_and_round_trips(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "gemini_zero.py", require=("model", "data"))
    assert (config.memory.policy, config.precision.dtype, config.precision.initial_scale) == ("auto", "fp16", 2**14)
    path = tmp_path / "resolved.toml"
    path.write_text(to_toml(config))
    assert values(load_config(path)) == values(config)


# --- overrides ------------------------------------------------------------------------------------------------------


def test_values_on_the_command_line() -> None:
    argv = [
        "--optimizer.lr",
        "1e-4",
        "--optimizer.betas",
        "[0.9,0.95]",
        "--model.config.hidden_size",
        "64",
        "--train.max-steps=-1",
        "--model.revision",
        "12345",
        "--parallel.tensor",
        '{mode="1d",size=2}',
        "--train.max_grad_norm",
        "null",
        "--device.memory",
        "6GiB",
        "--data.packing",
        "False",
        "--train.output_dir",
        "out#1",
        "--data.train",
        "a.txt",
        "--train.warmup_ratio",
        "0.5",
        "--model.config.model_type",
        "opt",
        "--data.files",
        "x.txt",
        "--train.seed",
        "1",
        "--train.seed",
        "2",
        "--model.name_or_path=a=b",
    ]
    assert parse_overrides(argv) == {
        "optimizer": {"lr": 1e-4, "betas": [0.9, 0.95]},
        "model": {"config": {"hidden_size": 64, "model_type": "opt"}, "revision": "12345", "name_or_path": "a=b"},
        "train": {"max_steps": -1, "max_grad_norm": "null", "output_dir": "out#1", "seed": 2},
        "parallel": {"tensor": {"mode": "1d", "size": 2}},
        "device": {"memory": "6GiB"},
        "data": {"packing": False, "train": "x.txt"},
        "scheduler": {"warmup_ratio": 0.5},
    }
    assert parse_overrides(["--data.train", '["a.txt", "b.txt"]'])["data"]["train"] == ["a.txt", "b.txt"]
    # TOML would read 5 and a comment, or two keys.
    assert parse_overrides(["--data.train", "5#x", "--data.eval", "1\nx = 2"])["data"] == {
        "train": "5#x",
        "eval": "1\nx = 2",
    }
    assert parse_overrides(["--train.output_dir", '"a b"'])["train"]["output_dir"] == "a b"


def test_all_wrong_arguments_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["--lr", "1", "--optimizer.lrr", "2", "x", "--train.max_steps"])
    assert len(caught.value.problems) == 4
    assert str(caught.value).startswith("command line: 4 problems")


def test_precedence_is_command_line_file_default(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(
        '[optimizer]\nlr = 1.0\nname = "sgd"\n[train]\nwarmup_ratio = 0.1\nmax_grad_norm = 1.0\n'
        '[data]\ntrain_file = "a.txt"\n[model.config]\nmodel_type = "opt"\nhidden_size = 64\nnum_attention_heads = 4\n'
    )
    argv = [
        "--optimizer.lr",
        "2.0",
        "--scheduler.warmup_steps",
        "3",
        "--data.dataset",
        "b.txt",
        "--model.config.hidden_size",
        "32",
    ]
    config = load_config(path, parse_overrides([*argv, "--train.max_grad_norm", "null"]))
    assert (config.optimizer.lr, config.optimizer.name, config.optimizer.kernel) == (2.0, "sgd", "auto")
    assert (config.scheduler.warmup_ratio, config.scheduler.warmup_steps) == (0.0, 3)
    assert config.data.train == ("b.txt",)
    assert config.train.max_grad_norm is None
    assert config.model.config == {"model_type": "opt", "hidden_size": 32, "num_attention_heads": 4}
    named = load_config(path, parse_overrides(["--model.name_or_path", "facebook/opt-125m"]))
    assert (named.model.config, named.model.name_or_path) == (None, "facebook/opt-125m")


def test_an_override_is_marked_and_can_mend_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[train]\nmax_steps = 0\n")
    assert load_config(path, {"train": {"max_steps": 5}}).train.max_steps == 5
    assert has_line(problems_of(None, {"train": {"max_steps": 0}}), ["train.max_steps = 0", "(override)"])


# --- texts ----------------------------------------------------------------------------------------------------------


def test_every_key_is_documented() -> None:
    text, reference = config_help(), config_reference()
    for dotted, field in FIELDS.items():
        assert field.description, dotted
        if table_of(dotted) is None:
            assert f"--{dotted} " in text
            assert f"`{dotted.partition('.')[2]}`" in reference
    assert config_help(["optimizer"]).count("[optimizer]") == 1
    assert "[device]" not in config_help(["optimizer"])


def test_contract_keys_exist() -> None:
    contract = {
        "device": "type memory",
        "memory": "policy resident_parameters resident_optimizer host disk",
        "precision": "dtype optimizer_state",
        "optimizer": "name lr betas eps weight_decay kernel",
        "train": "per_device_train_batch_size gradient_accumulation_steps max_grad_norm max_steps num_train_epochs "
        "seed gradient_checkpointing logging_steps save_steps save_total_limit output_dir resume_from_checkpoint",
        "scheduler": "warmup_ratio",
        "model": "name_or_path config",
        "data": "seq_length packing",
        "parallel": "data pipeline tensor tensor.mode tensor.size tensor.depth",
    }
    for section, keys in contract.items():
        for key in keys.split():
            assert f"{section}.{key}" in FIELDS


def test_hints_point_at_keys_that_exist() -> None:
    for target in [*FOREIGN_KEYS.values(), *FOREIGN_DOTTED.values(), *FOREIGN_SECTIONS.values()]:
        dotted = target.split(" ")[0]
        assert dotted in FIELDS, target


@pytest.mark.parametrize("dotted", LEAVES)
def test_round_trip_of_every_default(dotted: str) -> None:
    assert f"{dotted.rpartition('.')[2]} = " in to_toml(load_config(GOOD)) + to_toml(load_config()) or (
        FIELDS[dotted].default is None or dotted.startswith("model.")
    )


def test_round_trip_with_inline_model(tmp_path: Path) -> None:
    inline = {
        "model_type": "opt",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "pad_token_id": None,
        "id2label": {"0": "a b", "1": "é"},
        "layerdrop": 0.0,
        "architectures": ["OPTForCausalLM"],
    }
    config = load_config({"model": {"config": inline}, "device": {"type": "simulated", "memory": 1234567}})
    path = tmp_path / "resolved.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    again = load_config(path)
    assert values(again) == values(config)
    assert again.model.config == inline
    assert again.device.memory == 1234567


# --- properties -----------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(LEAVES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from([dotted.rpartition(".")[2] for dotted in FIELDS]) | st.text(max_size=8)
top = st.sampled_from([*SECTIONS, "zero", "fp16", "parallel", "clip_grad_norm", "BATCH_SIZE"]) | st.text(max_size=8)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(top, json_values | st.dictionaries(keys, json_values, max_size=5), max_size=5))
def test_any_dict_is_loaded_or_refused_with_reasons(raw: dict[str, Any]) -> None:
    if isinstance(raw.get("model"), dict):
        raw["model"].pop("config", None)  # kept cheap: transformers' own classes are covered above
    try:
        config = load_config(raw)
    except ConfigError as error:
        problems = error.problems
    else:
        problems = ["none"]
        assert values(load_config(config)) == values(config)
    assert problems
    assert all("\n" not in line for line in problems)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([f"--{dotted}" for dotted in FIELDS]) | st.text(max_size=10), max_size=6))
def test_any_arguments_are_read_or_refused(argv: list[str]) -> None:
    try:
        problems = [str(parse_overrides(argv))]
    except ConfigError as error:
        problems = error.problems
    assert problems


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([".toml", ".json", ".yaml"]))
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(data)
    try:
        problems = [load_config(path).source]
    except ConfigError as error:
        problems = error.problems
    assert problems


def test_importing_the_config_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from zero.config import load_config; load_config({'device': {'type': 'cpu'}}); "
        "sys.exit(','.join(name for name in ('torch', 'transformers', 'numpy') if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_old_words_can_be_imported_from_where_the_error_says(tmp_path: Path) -> None:
    file = tmp_path / "old.py"
    file.write_text(
        "from zero import AMP_TYPE, BucketTensorShardStrategy, TensorShardStrategy\nfp16 = dict(mode=AMP_TYPE.TORCH)\n"
    )
    assert load_config(file).precision.dtype == "fp16"
