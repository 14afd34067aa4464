"""No damaged or hostile checkpoint is loaded: the file is named, and the checkpoint before it is used."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import checkpoint_helpers as helpers
from tests.checkpoint_helpers import Setting, Trainer, all_files, batches, everything, forge, forge_file, tensor_file
from zero.checkpoint import CheckpointError, codec, contents, find_latest, finding, verify
from zero.checkpoint.problems import DamagedError
from zero.checkpoint.state import saved_from

STEPS = ("step-00000001", "step-00000002")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of one run, and one of another run beside the folder."""
    base = tmp_path_factory.mktemp("saved")
    tokenizer = base / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text('{"version": "1.0"}')
    (tokenizer / "code.py").write_text("raise SystemExit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contents, "MAX_FILE_BYTES", 150_000)
        for name, seed in (("mine", 0), ("other", 1)):
            trainer = Trainer(Setting("llama"))
            for batch in batches(2, seed=seed):
                trainer.run([batch])
                trainer.save(base / name, tokenizer=tokenizer, extra={"seed": seed})
    return base


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(saved / "mine", tmp_path / "mine")
    return tmp_path / "mine"


CORRUPTIONS: dict[str, Callable[[bytes], bytes | None]] = {
    **helpers.CORRUPTIONS,
    "first bit": helpers.flip(0.0, 0),
    **{f"bit at {position}": helpers.flip(position, bit) for bit, position in enumerate((0.25, 0.4, 0.6, 0.75))},
    "early bit": helpers.flip(0.1, 5),
    "middle bit": helpers.flip(0.5, 3),
    "late bit": helpers.flip(0.9, 1),
    "last bit": helpers.flip(1.0, 7),
    "zeros": lambda data: bytes(len(data)),
}


def _files(saved: Path) -> list[str]:
    newest = saved / "mine" / STEPS[1]
    return [str(path.relative_to(newest)) for path in all_files(newest)]


def _expect_named_and_previous_used(folder: Path, name: str, caplog: pytest.LogCaptureFixture, where: str) -> None:
    caplog.clear()
    assert any(problem.startswith(name) for problem in verify(folder / STEPS[1])), where
    assert find_latest(folder) == folder / STEPS[0], where
    assert f"checkpoint {STEPS[1]} is damaged and was skipped: " in caplog.text, where
    assert name in caplog.text, where


def test_every_file_in_every_way(saved: Path, folder: Path, caplog: Any, record_property: Any) -> None:
    """Each file x each corruption, and each file swapped with a stale one, another run's, another one's."""
    newest, count = folder / STEPS[1], 0
    names = _files(saved)
    for name in names:
        good = (newest / name).read_bytes()
        foreign = {
            "stale": saved / "mine" / STEPS[0] / name,
            "another run's": saved / "other" / STEPS[1] / name,
            "another file": newest / names[names.index(name) - 1],
        }
        spoiled = {how: corrupt(good) for how, corrupt in CORRUPTIONS.items()}
        spoiled |= {how: path.read_bytes() for how, path in foreign.items()}
        for how, data in spoiled.items():
            if data == good:
                continue
            (newest / name).unlink()
            if data is not None:
                (newest / name).write_bytes(data)
            _expect_named_and_previous_used(folder, name, caplog, f"{name}: {how}")
            (newest / name).write_bytes(good)
            count += 1
    assert verify(newest) == []
    record_property("corruptions", count)
    assert {"manifest.json", "state.json", "rank-00000.json", "model/config.json", "model/tokenizer.json"} <= set(names)
    assert len([name for name in names if name.endswith(".safetensors")]) >= 3
    assert count >= 150


def test_every_bit_of_a_manifest_counts(saved: Path, folder: Path) -> None:
    """One flipped bit anywhere in the manifest, white space and its own hash included, is seen."""
    path = folder / STEPS[1] / "manifest.json"
    good = path.read_bytes()
    for position in range(0, len(good), 97):
        path.write_bytes(helpers.flip(position / len(good), position % 8)(good))
        assert verify(path.parent), position


def test_load_uses_the_previous_and_says_so(saved: Path, folder: Path) -> None:
    """Loading falls back; a checkpoint named by its own path does not, and both say which file."""
    damaged = tensor_file(folder / STEPS[1])
    damaged.write_bytes(helpers.flip(0.7, 2)(damaged.read_bytes()))
    trainer = Trainer(Setting("llama"))
    state = trainer.load(folder)
    assert (state.step, state.path) == (1, folder / STEPS[0])
    assert damaged.name in state.warnings[0]
    before = everything(trainer.engine)["values model.norm.weight"]
    with pytest.raises(CheckpointError, match=rf"damaged and was not loaded:\n.*{damaged.name}"):
        trainer.load(folder / STEPS[1])
    assert torch.equal(before, everything(trainer.engine)["values model.norm.weight"])
    for step in STEPS:
        (folder / step / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no good checkpoint:(\n.*step-0000000\d.*state\.json.*){2}"):
        trainer.load(folder)


def test_a_folder_under_another_steps_name(folder: Path) -> None:
    """A copy of an old checkpoint does not pass for a new one."""
    shutil.copytree(folder / STEPS[0], folder / "step-00000009")
    assert verify(folder / "step-00000009") == ["manifest.json: it is of step 1, the folder is named step-00000009"]
    assert find_latest(folder) == folder / STEPS[1]


# -- hostile ---------------------------------------------------------------------------------------------------------


class Payload:
    """Leaves a trace when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


HUGGING_FACE = (
    *("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt"),
    *("model.ckpt", ".metadata", "adapter_model.bin", "tf_model.h5", "flax_model.msgpack", "data.pkl"),
)


def test_pickles_are_never_opened(saved: Path, folder: Path, tmp_path: Path) -> None:
    """Pickles beside our files are ignored; pickles in place of our files, hashes forged, are refused."""
    newest, mark = folder / STEPS[1], tmp_path / "executed"
    evil = pickle.dumps(Payload(mark))
    for name in HUGGING_FACE:
        (newest / name).write_bytes(evil)
        (newest / "model" / name).write_bytes(evil)
    Trainer(Setting("llama")).load(newest)
    for name in [name for name in _files(saved) if name not in ("manifest.json",) and not name.startswith("model/")]:
        good, manifest = (newest / name).read_bytes(), (newest / "manifest.json").read_bytes()
        forge_file(newest, name, evil)
        problems = verify(newest)
        assert problems, name
        assert problems[0].startswith(f"{name}: not "), problems  # "not JSON", "not a safetensors file"
        (newest / name).write_bytes(good)
        (newest / "manifest.json").write_bytes(manifest)
    (newest / "manifest.json").write_bytes(evil)
    assert verify(newest)[0].startswith("manifest.json: not JSON")
    assert not mark.exists()


def _rename_file(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def edit(body: dict[str, Any]) -> None:
        for record in body["files"]:
            record["path"] = new if record["path"] == old else record["path"]
        for part in body["tensors"]:
            part["file"] = new if part["file"] == old else part["file"]

    return edit


@pytest.mark.parametrize(
    "path",
    ["../outside.safetensors", "/etc/passwd", "model/../../outside.safetensors", "..", ".", "", "a\\..\\b", "model//x",
     "~/x", "a/b/c", ".hidden", "model/", "nul\0byte", "x" * 300, "manifest.json", "C:\\x"],
)  # fmt: skip
def test_paths_out_of_the_folder_are_refused(folder: Path, path: str) -> None:
    """Whatever a manifest names, nothing outside the checkpoint is opened, though it has the right contents."""
    newest = folder / STEPS[1]
    shutil.copy(tensor_file(newest), folder / "outside.safetensors")
    forge(newest, _rename_file(tensor_file(newest).name, path))
    assert "is not allowed in a checkpoint" in verify(newest)[0]
    assert find_latest(folder) == folder / STEPS[0]


def test_links_are_refused(folder: Path, tmp_path: Path) -> None:
    """Linked files and folders, inside and out, and pipes that would block; a linked checkpoint is not found."""
    newest = folder / STEPS[1]
    file = tensor_file(newest)
    elsewhere = tmp_path / "elsewhere"
    shutil.copy(file, elsewhere)
    file.unlink()
    file.symlink_to(elsewhere)
    assert verify(newest) == [f"{file.name} is a link; checkpoints hold files only"]
    file.unlink()
    os.mkfifo(file)
    assert verify(newest) == [f"{file.name} is not a regular file"]
    file.unlink()
    file.mkdir()
    assert file.name in verify(newest)[0]
    file.rmdir()
    shutil.copy(elsewhere, file)
    assert verify(newest) == []

    (newest / "model").rename(tmp_path / "model")
    (newest / "model").symlink_to(tmp_path / "model")
    assert all("model is a link" in problem for problem in verify(newest))
    (newest / "model").unlink()
    (tmp_path / "model").rename(newest / "model")

    newest.rename(tmp_path / "moved")
    newest.symlink_to(tmp_path / "moved")
    assert find_latest(folder) == folder / STEPS[0]


def _header(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _with_header(data: bytes, edit: Callable[[dict[str, Any], str], Any]) -> bytes:
    header, body = _header(data)
    keys = [key for key in header if key != "__metadata__"]
    text = edit(header, keys[0])
    encoded = text if isinstance(text, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + body


LIES: dict[str, Callable[[bytes], bytes]] = {
    "length beyond the file": lambda d: (1 << 40).to_bytes(8, "little") + d[8:],
    "length of 2^64-1": lambda d: b"\xff" * 8 + d[8:],
    "no header": lambda d: d[:4],
    "not JSON": lambda d: _with_header(d, lambda h, k: b"{]"),
    "a list": lambda d: _with_header(d, lambda h, k: b"[1, 2]"),
    "deep nesting": lambda d: _with_header(d, lambda h, k: b"[" * 100_000),
    "a key twice": lambda d: _with_header(d, lambda h, k: b'{"a": 1, "a": 2}'),
    "negative offset": lambda d: _with_header(d, lambda h, k: h[k].update(data_offsets=[-4, 0])),
    "overlap": lambda d: _with_header(d, lambda h, k: h[list(h)[2]].update(data_offsets=h[k]["data_offsets"])),
    "gap": lambda d: _with_header(d, lambda h, k: h.pop(k)),
    "beyond the file's end": lambda d: d[: len(d) // 2],
    "trailing bytes": lambda d: d + b"more",
    "shape too large": lambda d: _with_header(d, lambda h, k: h[k].update(shape=[1 << 62, 1 << 62])),
    "fractional shape": lambda d: _with_header(d, lambda h, k: h[k].update(shape=[0.5, 2])),
    "unknown dtype": lambda d: _with_header(d, lambda h, k: h[k].update(dtype="PICKLE")),
    "other dtype": lambda d: _with_header(d, lambda h, k: h[k].update(dtype="I32")),
    "other key": lambda d: _with_header(d, lambda h, k: h.update({"evil": h.pop(k)})),
    "swapped keys": lambda d: _with_header(d, _swap_first_two_of_different_shapes),
}


def _swap_first_two_of_different_shapes(header: dict[str, Any], key: str) -> None:
    other = next(k for k in header if k != "__metadata__" and header[k]["shape"] != header[key]["shape"])
    header[key], header[other] = header[other], header[key]


@pytest.mark.parametrize("lie", LIES)
def test_lying_safetensors_are_refused(folder: Path, lie: str) -> None:
    """Headers that lie about the file, with hashes that fit."""
    newest = folder / STEPS[1]
    file = tensor_file(newest)
    forge_file(newest, file.name, LIES[lie](file.read_bytes()))
    assert verify(newest)[0].startswith(f"{file.name}: ")
    assert find_latest(folder) == folder / STEPS[0]


def _first(body: dict[str, Any]) -> dict[str, Any]:
    return body["tensors"][0]


FORGERIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "version": lambda b: b.update(version=2),
    "format": lambda b: b.update(format="other"),
    "step as text": lambda b: b.update(step="2"),
    "negative step": lambda b: b.update(step=-2),
    "step as truth": lambda b: b.update(step=True),
    "missing list": lambda b: b.pop("files"),
    "files as number": lambda b: b.update(files=3),
    "file twice": lambda b: b["files"].append(b["files"][0]),
    "short hash": lambda b: b["files"][0].update(sha256="00"),
    "slice gap": lambda b: _first(b).update(start=1),
    "slice too short": lambda b: _first(b).update(stop=_first(b)["stop"] - 1),
    "slice backwards": lambda b: _first(b).update(start=5, stop=2),
    "shape too large": lambda b: _first(b).update(shape=[1 << 40]),
    "unknown dtype": lambda b: _first(b).update(dtype="nn.Module"),
    "other dtype": lambda b: _first(b).update(dtype="int32"),
    "unlisted file": lambda b: _first(b).update(file="else.safetensors"),
    "impossible order": lambda b: _first(b).update(order=[0, 0]),
    "state not listed": lambda b: b.update(files=[f for f in b["files"] if f["path"] != "state.json"]),
    "more ranks": lambda b: b["world"].update(size=1 << 60),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_manifests_are_refused(folder: Path, forgery: str) -> None:
    """Manifests that contradict themselves, sealed again."""
    forge(folder / STEPS[1], FORGERIES[forgery])
    assert verify(folder / STEPS[1])
    assert find_latest(folder) == folder / STEPS[0]


STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "missing counters": lambda s: s.pop("counters"),
    "counter as text": lambda s: s["counters"].update(num_steps="2"),
    "other step": lambda s: s["counters"].update(num_steps=7),
    "unknown tag": lambda s: s.update(extra={"$python": "os.system"}),
    "broken tensor": lambda s: s.update(extra={"$tensor": ["float32", [3], "AAAA"]}),
    "parameter missing": lambda s: s["parameters"].pop(),
    "other shape": lambda s: s["parameters"][0].update(shape=[1]),
    "unknown field": lambda s: s["parameters"][0].update(code="x"),
    "scalars of a stranger": lambda s: s["optimizer"]["scalars"].update(stranger={}),
    "keys as number": lambda s: s["optimizer"].update(keys=3),
}


@pytest.mark.parametrize("change", STATES)
def test_forged_states_are_refused_before_anything_is_touched(folder: Path, change: str) -> None:
    """A state.json that no program of ours writes, hashes forged."""
    newest = folder / STEPS[1]
    state = json.loads((newest / "state.json").read_text())
    STATES[change](state)
    forge_file(newest, "state.json", json.dumps(state).encode())
    trainer = Trainer(Setting("llama"))
    before = everything(trainer.engine)["values model.norm.weight"]
    with pytest.raises(CheckpointError):
        trainer.load(newest)
    assert torch.equal(before, everything(trainer.engine)["values model.norm.weight"])


def test_a_whole_state_is_read(folder: Path) -> None:
    """The forgeries above are refused for what was forged."""
    saved_from(finding.read_json(folder / STEPS[1], "state.json"))


@pytest.mark.parametrize(
    "text", ['{"$a": 1}', '{"$float": "1"}', '{"$tuple": 3}', '{"$tensor": ["__class__", [], ""]}']
)
def test_unknown_tags_are_refused(text: str) -> None:
    with pytest.raises(DamagedError):
        codec.decode(json.loads(text))
