"""Files that would run code, or lead somewhere else, are refused: nothing in them is run, nothing outside is read."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import zero
from tests.rank_case import make_model
from zero.checkpoint import CheckpointError
from zero.cli.main import main
from zero.config.loading import load_config
from zero.errors import UserError
from zero.models.build import build_model, build_tokenizer


class _Payload:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._mark}",)


Make = Callable[[Path, Path], None]


def _folder(folder: Path) -> dict[str, torch.Tensor]:
    """An ordinary model folder; returns its weights."""
    model = make_model("opt")
    model.save_pretrained(folder)
    return {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}


def _pickled(*names: str) -> Make:
    def make(folder: Path, mark: Path) -> None:
        _folder(folder)
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).write_bytes(pickle.dumps(_Payload(mark)))

    return make


def _pickled_shards(folder: Path, mark: Path) -> None:
    weights = _folder(folder)
    (folder / "model.safetensors").unlink()
    shard = "pytorch_model-00001-of-00001.bin"
    (folder / shard).write_bytes(pickle.dumps(_Payload(mark)))
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _index_to(where: Callable[[Path], str]) -> Make:
    def make(folder: Path, mark: Path) -> None:
        weights = _folder(folder)
        outside = folder.parent / "outside.safetensors"
        (folder / "model.safetensors").rename(outside)
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, where(outside))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return make


def _link_out(folder: Path, mark: Path) -> None:
    _folder(folder)
    outside = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)


def _header(change: Callable[[dict[str, Any]], None] | None, length: int | None = None) -> Make:
    def make(folder: Path, mark: Path) -> None:
        _folder(folder)
        file = folder / "model.safetensors"
        data = file.read_bytes()
        num_bytes = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + num_bytes])
        if change is not None:
            change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data[8 + num_bytes :])

    return make


def _overlap(header: dict[str, Any]) -> None:
    first, *others = [name for name in header if name.endswith("fc1.weight")]
    for name in others:
        header[name]["data_offsets"] = header[first]["data_offsets"]


def _beyond_the_end(header: dict[str, Any]) -> None:
    name = next(name for name in header if name != "__metadata__")
    start, stop = header[name]["data_offsets"]
    header[name]["data_offsets"] = [start + (1 << 40), stop + (1 << 40)]


def _remote_code(folder: Path, mark: Path) -> None:
    _folder(folder)
    (folder / "modeling_evil.py").write_text(f"import os\nos.system('touch {mark}')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    config |= {"auto_map": auto, "model_type": "evil", "architectures": ["Evil"]}
    (folder / "config.json").write_text(json.dumps(config))


FOLDERS: dict[str, Make] = {
    "a pickle as pytorch_model.bin": _pickled("pytorch_model.bin"),
    "pickled shards with an index": _pickled_shards,
    "a pickle as model.pt": _pickled("model.pt"),
    "a pickle as consolidated.00.pth": _pickled("consolidated.00.pth"),
    "pickles as adapter, optimizer and scheduler": _pickled("adapter_model.bin", "optimizer.pt", "scheduler.pt"),
    "an index that leads up": _index_to(lambda outside: f"../{outside.name}"),
    "an index with an absolute path": _index_to(str),
    "a link that leads out": _link_out,
    "a header that lies about its length": _header(None, length=1 << 50),
    "tensors that overlap": _header(_overlap),
    "a tensor beyond the end": _header(_beyond_the_end),
    "remote code": _remote_code,
}


def _load(folder: Path) -> None:
    model = build_model(load_config({"model": {"name_or_path": str(folder)}}), None)
    zero.initialize(model, torch.optim.AdamW(model.parameters()), config={"device": {"type": "cpu"}})


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_model_folder_is_refused(name: str, tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "mark"
    folder.mkdir()
    FOLDERS[name](folder, mark)
    with pytest.raises(UserError) as refused:
        _load(folder)
    assert str(folder) in str(refused.value) or folder.name in str(refused.value)
    assert not mark.exists()


def test_yaml_tags_are_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark, file = tmp_path / "mark", tmp_path / "config.yaml"
    file.write_text(f'train:\n  seed: !!python/object/apply:os.system ["touch {mark}"]\n')
    assert main(["validate", str(file)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not mark.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", ".metadata"])
def test_a_checkpoint_of_pickles_is_refused(name: str, tmp_path: Path) -> None:
    mark, checkpoint = tmp_path / "mark", tmp_path / "step-00000001"
    checkpoint.mkdir()
    (checkpoint / name).write_bytes(pickle.dumps(_Payload(mark)))
    save_file({"weight": torch.zeros(2)}, checkpoint / "model.safetensors")
    model = make_model("opt")
    engine, *_ = zero.initialize(model, torch.optim.AdamW(model.parameters()), config={"device": {"type": "cpu"}})
    with pytest.raises(CheckpointError):
        engine.load_checkpoint(tmp_path)
    assert not mark.exists()


def test_a_pickle_beside_a_good_checkpoint_is_never_read(tmp_path: Path) -> None:
    model, mark = make_model("opt"), tmp_path / "mark"
    engine, *_ = zero.initialize(model, torch.optim.AdamW(model.parameters()), config={"device": {"type": "cpu"}})
    saved = engine.save_checkpoint(tmp_path)
    (saved / "optimizer.pt").write_bytes(pickle.dumps(_Payload(mark)))
    engine.load_checkpoint(tmp_path)
    assert not mark.exists()


def test_a_tokenizer_of_pickles_is_never_read(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    _folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(pickle.dumps(_Payload(mark)))
    with pytest.raises(UserError):
        build_tokenizer(load_config({"model": {"name_or_path": str(tmp_path)}}))
    assert not mark.exists()
