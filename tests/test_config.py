"""The config: what is accepted means what it says, and what is refused says how to put it right."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import config_cases as cases
import pytest
import yaml
from config_helpers import GOOD, LEAVES, has_line, nested, problems_of, values

from zero.config import (
    load_config,
    parse_overrides,
    to_toml,
)
from zero.errors import ConfigError

# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "text", "fragments"), cases.BAD_TOML, ids=[case[0] for case in cases.BAD_TOML])
def test_bad_toml_says_key_value_and_what_to_do(tmp_path: Path, name: str, text: str, fragments: list[str]) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    problems = problems_of(path)
    assert len(problems) == 1, problems
    assert has_line(problems, fragments), problems


@pytest.mark.parametrize(("name", "text", "fragments"), cases.BAD_MODEL, ids=[case[0] for case in cases.BAD_MODEL])
def test_bad_inline_model(tmp_path: Path, name: str, text: str, fragments: list[str]) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(f"[model.config]\n{text}")
    problems = problems_of(path)
    assert len(problems) == 1, problems
    assert has_line(problems, fragments), problems


@pytest.mark.parametrize(
    ("name", "file", "data", "fragments"), cases.BAD_FILES, ids=[case[0] for case in cases.BAD_FILES]
)
def test_bad_file_is_named(tmp_path: Path, name: str, file: str, data: bytes, fragments: list[str]) -> None:
    path = tmp_path / file
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert has_line(caught.value.problems, fragments), caught.value.problems
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(("name", "config", "fragments"), cases.BAD_OLD, ids=[case[0] for case in cases.BAD_OLD])
def test_bad_old_form(name: str, config: dict[str, Any], fragments: list[str]) -> None:
    assert has_line(problems_of(config), fragments), problems_of(config)


@pytest.mark.parametrize(
    ("argv", "fragments"), cases.BAD_ARGUMENTS, ids=[" ".join(case[0]) for case in cases.BAD_ARGUMENTS]
)
def test_bad_arguments(argv: list[str], fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(argv)
    assert has_line(caught.value.problems, fragments), caught.value.problems


@pytest.mark.parametrize("dotted", LEAVES)
def test_every_key_slightly_misspelt_is_suggested(dotted: str) -> None:
    table, _, key = dotted.rpartition(".")
    wrong = key[:-1] + "_" + key[-1] if len(key) > 1 else key * 2
    problems = problems_of(nested(f"{table}.{wrong}", 1))
    if len(key) > 1:
        assert has_line(problems, [f"{table}.{wrong} = 1", f"did you mean {dotted}?"]), problems
    else:
        assert has_line(problems, [f"{table}.{wrong} = 1", f"keys of [{table}]", key]), problems


@pytest.mark.parametrize("dotted", LEAVES)
def test_every_key_refuses_what_it_cannot_be(dotted: str) -> None:
    for wrong in ({"a": object()}, [object()], object(), b"x", 1j, [[]]):
        problems = problems_of(nested(dotted, wrong))
        assert len(problems) == 1
        assert problems[0].startswith(f"{dotted} = "), problems


def test_all_problems_at_once_in_one_error(tmp_path: Path) -> None:
    path = tmp_path / "many.toml"
    path.write_text(
        'lr = 1\n[optimizer]\nlr = "fast"\nnam = "x"\n[device]\ntype = "cpu"\nmemory = "1GiB"\n'
        '[parallel.tensor]\nmode = "2d"\nsize = 3\n[model.config]\nmodel_type = "optt"\n'
        "[memory]\nresident_optimizer = 2"
    )
    problems = problems_of(path, {"train": {"max_steps": 0}}, require=("data",))
    for fragments in (
        ["lr = 1:", "[optimizer]"],
        ["optimizer.lr"],
        ["optimizer.nam ="],
        ["device.memory", "cap"],
        ["parallel.tensor.size"],
        ["model.config.model_type"],
        ["memory.resident_optimizer = 2"],
        ["train.max_steps = 0", "override"],
        ["data.train: not given"],
    ):
        assert has_line(problems, fragments), (fragments, problems)
    assert len(problems) == 9, problems


def test_a_wrong_value_does_not_cause_second_problems() -> None:
    # The square is not asked for where the mode itself is wrong, nor the capacity where it cannot be read.
    assert len(problems_of({"parallel": {"tensor": {"mode": "2x", "size": 3}}})) == 1
    assert len(problems_of({"device": {"type": "simulated", "memory": "1X"}})) == 1
    assert len(problems_of({"model": {"config": 3}}, require=("model",))) == 1


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "quickstart.toml").write_text("")
    assert has_line(problems_of(tmp_path / "quikstart.toml"), ["no such file", "quickstart.toml"])
    assert has_line(problems_of(tmp_path / "nowhere" / "a.toml"), ["no such file", "does not exist"])
    assert has_line(problems_of(str(tmp_path / "a\0.toml")), ["no such file"])


def test_folder_and_huge_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    assert has_line(problems_of(tmp_path / "folder.toml"), ["folder"])
    assert has_line(problems_of(tmp_path), ["folder"])
    with open(tmp_path / "huge.toml", "wb") as file:
        file.truncate(5 * 2**20)
    assert has_line(problems_of(tmp_path / "huge.toml"), ["too many"])


def test_wrong_source_type() -> None:
    assert has_line(problems_of(3), ["file path or a dict", "int"])


def test_nothing_of_a_long_value_is_dumped() -> None:
    (problem,) = problems_of({"optimizer": {"lr": "x" * 10_000}})
    assert len(problem) < 200


# --- what is accepted -----------------------------------------------------------------------------------------------


def test_defaults_do_what_plain_pytorch_does() -> None:
    config = load_config()
    assert config.train.max_grad_norm is None
    assert config.train.gradient_accumulation_steps == 1
    assert config.precision.dtype == "fp32"
    assert config.memory.policy == "auto"
    assert (config.memory.resident_parameters, config.memory.resident_optimizer) == (0.0, 0.0)
    assert config.memory.chunk == 64 * 2**20
    assert config.optimizer.lr == 5e-5
    assert config.run_folder == Path("runs/config")
    assert config.notes == ()


def test_partial_dict_of_initialize() -> None:
    config = load_config({"device": {"type": "simulated", "memory": "3MiB"}, "memory": {"policy": "auto"}})
    assert config.device.memory == 3 * 2**20
    assert config.device.streams == "procrastinating"
    assert config.device.poison is True
    assert config.is_set("memory.policy")
    assert not config.is_set("memory.chunk")
    assert config.notes == ()


def write_good(folder: Path, suffix: str) -> Path:
    path = folder / f"good{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(GOOD))
    elif suffix in (".yaml", ".yml"):
        path.write_text(yaml.safe_dump(GOOD))
    elif suffix == ".py":
        path.write_text("import os\n_helper = 3\n" + "".join(f"{key} = {value!r}\n" for key, value in GOOD.items()))
    else:
        path.write_text(to_toml(load_config(GOOD)))
    return path


@pytest.mark.parametrize("suffix", [".toml", ".json", ".yaml", ".yml", ".py"])
def test_the_same_config_in_every_format(tmp_path: Path, suffix: str) -> None:
    config = load_config(write_good(tmp_path, suffix))
    assert values(config) == values(load_config(GOOD))
    assert config.run_folder == Path("runs/good")
    assert config.optimizer.lr == 1e-5
    assert config.scheduler.warmup_ratio == 0.1
    assert config.data.train == ("a.txt", "b.jsonl")
    assert config.data.eval == ("c.csv",)
    assert config.parallel.world_size == 16
    assert config.train.checkpointing == "reentrant"


def test_byte_order_mark_and_empty_files(tmp_path: Path) -> None:
    for suffix in (".toml", ".yaml", ".json", ".py"):
        path = tmp_path / f"empty{suffix}"
        path.write_bytes(b"")
        assert values(load_config(path)) == values(load_config())
    (tmp_path / "empty.yaml").write_text("data:\n#  train: builtin\ntrain:\n  seed: 3\n")
    assert load_config(tmp_path / "empty.yaml").train.seed == 3
    path = tmp_path / "bom.toml"
    path.write_bytes(b"\xef\xbb\xbf[train]\r\nseed = 5\r\n")
    assert load_config(str(path)).train.seed == 5


def test_yaml_reads_exponents_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("optimizer:\n  lr: 1e-5\n  betas: [9e-1, 0.95]\n")
    config = load_config(path)
    assert config.optimizer.lr == 1e-5
    assert config.optimizer.betas == (0.9, 0.95)


@pytest.mark.parametrize("key", ["train", "dataset", "name", "path", "files", "train_file", "train_files"])
def test_names_of_the_training_data(key: str) -> None:
    assert load_config({"data": {key: "builtin"}}).data.train == ("builtin",)
    assert load_config({"data": {key: "built-in"}}).data.train == ("builtin",)
    assert load_config({"data": {key: [Path("a.txt"), "b.txt"]}}).data.train == ("a.txt", "b.txt")


@pytest.mark.parametrize(
    "key", ["eval", "validation_file", "eval_file", "test", "eval_files", "eval_dataset", "validation", "test_file"]
)
def test_names_of_the_evaluation_data(key: str) -> None:
    assert load_config({"data": {"train": "a", key: "b"}}).data.eval == ("b",)


def test_warmup_in_either_table() -> None:
    assert load_config({"train": {"warmup_ratio": 0.1}}).scheduler.warmup_ratio == 0.1
    assert load_config({"scheduler": {"warmup_steps": 7}}).scheduler.num_warmup_steps(100) == 7
    both = load_config({"train": {"warmup_ratio": 0.1}, "scheduler": {"warmup_ratio": 0.1}})
    assert both.scheduler.num_warmup_steps(101) == 11


def test_no_clipping_is_one_value() -> None:
    assert load_config({"train": {"max_grad_norm": 0}}).train.max_grad_norm is None
    assert load_config({"train": {"max_grad_norm": "null"}}).train.max_grad_norm is None


def test_report_to_none_is_the_empty_list() -> None:
    assert load_config({"train": {"report_to": "none"}}).train.report_to == ()
    assert load_config({"train": {"report_to": "wandb"}}).train.report_to == ("wandb",)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "rmsprop", "adagrad", "nadam", "radam", "adamax", "adadelta"])
def test_optimizer_arguments_fit_torch(name: str) -> None:
    import torch

    config = load_config({"optimizer": {"name": name, "lr": 0.1}})
    optimizer_class = next(
        getattr(torch.optim, found) for found in dir(torch.optim) if found.lower() == name and found != name
    )
    optimizer = optimizer_class([torch.zeros(1, requires_grad=True)], **config.optimizer.arguments())
    assert optimizer.defaults["lr"] == 0.1
    assert optimizer.defaults["weight_decay"] == 0.0


def test_settings_without_effect_are_said_not_swallowed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="zero"):
        config = load_config(
            {
                "precision": {"initial_scale": 8},
                "device": {"poison": False},
                "optimizer": {"name": "sgd", "betas": [0.5, 0.5]},
                "scheduler": {"name": "constant", "warmup_steps": 3},
            }
        )
    for key in ("precision.initial_scale", "device.poison", "optimizer.betas", "scheduler.warmup_steps"):
        assert has_line(list(config.notes), [f"{key} = ", "no effect"]), config.notes
        assert key in caplog.text


@pytest.mark.parametrize(
    "tables",
    [
        {"optimizer": {"early": True}, "train": {"max_grad_norm": 1.0}},
        {"optimizer": {"early": True}, "train": {"gradient_accumulation_steps": 2}},
        {"optimizer": {"early": True, "workers": 0}},
    ],
)
def test_updates_inside_backward_that_cannot_be_had_are_said_not_swallowed(tables: dict[str, Any]) -> None:
    assert has_line(list(load_config(tables).notes), ["optimizer.early = true: has no effect with"])
    assert not load_config({"optimizer": {"early": True}}).notes


def test_an_order_of_one_micro_batch_is_said_to_be_none() -> None:
    notes = load_config({"train": {"accumulation_order": "layer"}}).notes
    assert has_line(
        list(notes), ["train.accumulation_order", "has no effect with train.gradient_accumulation_steps = 1"]
    )
    assert not load_config({"train": {"accumulation_order": "layer", "gradient_accumulation_steps": 2}}).notes


def test_config_is_read_only_and_can_be_loaded_again() -> None:
    config = load_config(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        config.train.max_steps = 3
    assert values(load_config(config)) == values(config)
    changed = load_config(config, {"train": {"max_steps": 99}})
    assert changed.train.max_steps == 99
    assert changed.optimizer == config.optimizer


def test_inline_model_sets_positions_and_tokenizer() -> None:
    inline = {"model_type": "opt", "max_position_embeddings": 64, "pad_token_id": "null"}
    config = load_config({"model": {"config": inline}})
    assert config.data.seq_length == 64
    assert config.model.tokenizer_source == "builtin"
    assert config.model.config is not None
    assert config.model.config["pad_token_id"] is None
    config.require_model()
    assert load_config({"model": {"config": {**inline, "zzz": 1}}}).notes


def test_requirements_of_commands(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.name_or_path: not given"):
        load_config().require_model()
    with pytest.raises(ConfigError, match="keep the one"):
        load_config({"model": {"name_or_path": "a/b", "config": {"model_type": "opt"}}}).require_model()
    with pytest.raises(ConfigError, match="no such folder"):
        load_config({"model": {"name_or_path": str(tmp_path / "none")}}).require_model()
    load_config({"model": {"name_or_path": "facebook/opt-125m"}}).require_model()
    load_config({"model": {"name_or_path": str(tmp_path)}}).require_model()
    with pytest.raises(ConfigError, match="data.train: not given"):
        load_config().require_data()
    (tmp_path / "train.txt").write_text("x")
    load_config({"data": {"train": str(tmp_path / "train.txt")}}).require_data()
    load_config({"data": {"train": "wikitext"}}).require_data()
    with pytest.raises(ConfigError, match=r'no such file; did you mean ".*train.txt"'):
        load_config({"data": {"train": str(tmp_path / "trian.txt")}}).require_data()
    assert len(problems_of({}, require=("model", "data"))) == 2


def test_data_ranks() -> None:
    parallel = load_config({"parallel": {"pipeline": 2}}).parallel
    assert parallel.data_ranks(6) == 3
    with pytest.raises(ValueError, match="a multiple of 2"):
        parallel.data_ranks(3)
    with pytest.raises(ValueError, match="start 4 ranks"):
        load_config({"parallel": {"pipeline": 2, "data": 2}}).parallel.data_ranks(6)
