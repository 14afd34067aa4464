"""Reading safetensors files: what the reference library wrote, and what nobody should have written."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from zero import safetensors_reader
from zero.errors import UserError
from zero.safetensors_reader import SafetensorsFile
from zero.weights_folder import ShardedWeights

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64,
]  # fmt: skip


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        real = torch.float32 if dtype.itemsize < 4 else dtype
        return torch.randn(shape, generator=generator, dtype=real).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=generator).to(dtype)


def _file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header and data whatever."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def _entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# -- good files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {f"t{i}": _random(s, dtype, i) for i, s in enumerate([(3, 5), (), (0, 4), (7,), (2, 1, 3)])}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert sorted(file.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        assert (file.shape(name), file.dtype(name)) == (tensor.shape, dtype)
        back = file.read(name)
        assert back.dtype == dtype
        assert torch.equal(back.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


_FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@given(
    stored=st.sampled_from(_FLOATS),
    through=st.sampled_from([None, *_FLOATS]),
    targets=st.lists(st.sampled_from(_FLOATS), min_size=1, max_size=3),
    shape=st.lists(st.integers(0, 40), max_size=3),
    transposed=st.booleans(),
    part_bytes=st.sampled_from([8, 24, 1 << 20]),
    block=st.sampled_from([1, 5, 1 << 15]),
)
@settings(max_examples=60, deadline=None)
def test_casts_are_those_of_the_whole_tensor(
    stored: torch.dtype,
    through: torch.dtype | None,
    targets: list[torch.dtype],
    shape: list[int],
    transposed: bool,
    part_bytes: int,
    block: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("casts") / "a.safetensors"
    value = _random(tuple(shape), stored) * 1000
    save_file({"before": torch.ones(3), "x": value}, path)
    outs = [torch.full(tuple(shape), 7.0, dtype=dtype) for dtype in targets]
    if transposed and len(shape) > 1:
        outs[0] = torch.full(tuple(reversed(shape)), 7.0, dtype=targets[0]).permute(*reversed(range(len(shape))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_reader, "_PART_BYTES", part_bytes)
        patch.setattr(safetensors_reader, "_SERIAL_NUMEL", block)
        file = SafetensorsFile(path)
        file.read_into("x", *outs, through=through)
        blocks = [block.clone() for _, block in file.blocks("x", through)]
    seen = value.to(through or stored)
    for out in outs:
        assert torch.equal(out, seen.to(out.dtype))
    assert torch.equal(torch.cat([seen.reshape(-1)[:0], *blocks]), seen.reshape(-1))


def test_reading_writes_nothing_beside_the_target(tmp_path: Path) -> None:
    save_file({"x": _random((1000,), torch.bfloat16)}, tmp_path / "a.safetensors")
    buffer = torch.full((1200,), -1.0)
    SafetensorsFile(tmp_path / "a.safetensors").read_into("x", buffer[100:1100])
    assert (buffer[:100] == -1).all()
    assert (buffer[1100:] == -1).all()
    assert torch.equal(buffer[100:1100], _random((1000,), torch.bfloat16).float())


def test_a_target_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        SafetensorsFile(tmp_path / "a.safetensors").read_into("x", torch.ones(3, 2))


# -- hostile files -----------------------------------------------------------------------------------------------------

_PAIR = {"a": _entry(), "b": _entry(offsets=(8, 16))}

HOSTILE: dict[str, tuple[Any, bytes, int | None, str]] = {
    "header longer than the file": (_PAIR, b"", 10_000, "the whole file has"),
    "header longer than is allowed": (_PAIR, b"", 100_000_001, "are allowed"),
    "header as long as it gets": (_PAIR, b"", 2**64 - 1, "are allowed"),
    "not UTF-8": (b'{"\xff": 1}', b"", None, "UTF-8"),
    "not JSON": (b"{", b"", None, "JSON"),
    "NaN": (b'{"a": NaN}', b"", None, "NaN"),
    "nested too deeply": (b"[" * 100_000, b"", None, "JSON"),
    "a number of many digits": (b'{"a": ' + b"9" * 10_000 + b"}", b"", None, "JSON"),
    "empty header": (b"", b"", None, "JSON"),
    "a list": (b"[]", b"", None, "list"),
    "the same name twice": (
        b'{"a": %s, "a": %s}' % ((json.dumps(_entry()).encode(),) * 2),
        bytes(8),
        None,
        "twice",
    ),
    "the same key twice in an entry": (
        b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        bytes(8),
        None,
        "twice",
    ),
    "metadata that is no object": ({"__metadata__": [1]}, b"", None, "__metadata__"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
    "an entry that is no object": ({"a": 3}, b"", None, "described"),
    "an entry without offsets": ({"a": {"dtype": "F32", "shape": []}}, b"", None, "described"),
    "an entry with more": ({"a": {**_entry(), "more": 1}}, bytes(8), None, "described"),
    "unknown dtype": ({"a": _entry(dtype="F31")}, bytes(8), None, "F31"),
    "dtype that is no text": ({"a": _entry(dtype=["F32"])}, bytes(8), None, "dtype"),
    "negative shape": ({"a": _entry(shape=(-2, -1))}, bytes(8), None, "shape"),
    "shape of fractions": ({"a": _entry(shape=(2.0,))}, bytes(8), None, "shape"),
    "shape of booleans": ({"a": _entry(shape=(True, 2))}, bytes(8), None, "shape"),
    "shape that is no list": ({"a": {**_entry(), "shape": 2}}, bytes(8), None, "shape"),
    "shape of many dimensions": ({"a": _entry(shape=(1,) * 1000 + (2,))}, bytes(8), None, "shape"),
    "shape beyond all memory": ({"a": _entry(shape=(2**62, 2**62))}, bytes(8), None, "needs"),
    "shape that wraps around to the right number": ({"a": _entry(shape=(2**32, 2**32, 2))}, bytes(8), None, "needs"),
    "shape and bytes differ": ({"a": _entry(shape=(3,))}, bytes(8), None, "needs 12"),
    "negative offset": ({"a": _entry(offsets=(-8, 0))}, bytes(8), None, "data_offsets"),
    "backward offsets": ({"a": _entry(offsets=(8, 0))}, bytes(8), None, "data_offsets"),
    "three offsets": ({"a": _entry(offsets=(0, 4, 8))}, bytes(8), None, "data_offsets"),
    "offsets that are text": ({"a": _entry(offsets=("0", "8"))}, bytes(8), None, "data_offsets"),
    "offset beyond 63 bits": ({"a": _entry(offsets=(2**63, 2**63 + 8))}, bytes(8), None, "data_offsets"),
    "overlap": ({"a": _entry(), "b": _entry(offsets=(4, 12))}, bytes(12), None, "overlaps"),
    "the same bytes twice": ({"a": _entry(), "b": _entry()}, bytes(8), None, "overlaps"),
    "an empty tensor inside another": ({"a": _entry(), "b": _entry((0,), (4, 4))}, bytes(8), None, "overlaps"),
    "a gap": ({"a": _entry(), "b": _entry(offsets=(12, 20))}, bytes(20), None, "no one's"),
    "a gap at the start": ({"a": _entry(offsets=(4, 12))}, bytes(12), None, "no one's"),
    "bytes at the end": (_PAIR, bytes(17), None, "1 bytes after"),
    "cut off": (_PAIR, bytes(15), None, "cut off"),
    "data and no tensors": ({}, bytes(3), None, "no one's"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused(case: str, tmp_path: Path) -> None:
    header, data, length, message = HOSTILE[case]
    path = _file(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(UserError) as caught:
        SafetensorsFile(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("content", [b"", b"\0" * 7])
def test_a_file_too_short_for_a_length_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(UserError, match="fewer than the 8"):
        SafetensorsFile(tmp_path / "bad")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it must not wait for a writer
    for path, message in (
        (tmp_path, "not a file"),
        (tmp_path / "pipe", "not a file"),
        (tmp_path / "nothing", "No such file"),
    ):
        with pytest.raises(UserError, match=message):
            SafetensorsFile(path)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damage_is_refused_or_harmless(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A changed byte of the header: refused, or read exactly as the reference library reads it."""
    path = tmp_path_factory.mktemp("damage") / "a.safetensors"
    raw = bytearray(save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.int16)}))
    header_bytes = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, header_bytes - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw))
    try:
        mine = SafetensorsFile(path)
        read = {name: mine.read(name) for name in mine.names()}
    except UserError:
        return
    try:
        with safe_open(path, framework="pt") as theirs:
            reference = {name: theirs.get_tensor(name) for name in theirs.keys()}  # noqa: SIM118
    except SafetensorError:
        pytest.fail("accepted what the reference library refuses")
    assert read.keys() == reference.keys()
    for name, tensor in read.items():
        assert tensor.dtype == reference[name].dtype
        assert torch.equal(tensor.nan_to_num(), reference[name].nan_to_num())


def test_a_file_cut_off_while_it_is_open_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(1000)}, path)
    file = SafetensorsFile(path)
    os.truncate(path, 500)
    with pytest.raises(UserError, match="ended early"):
        file.read("x")


def test_no_descriptor_is_left_open_by_a_refusal(tmp_path: Path) -> None:
    path = _file(tmp_path / "bad.safetensors", _PAIR, bytes(3))
    before = os.open(path, os.O_RDONLY)
    os.close(before)
    for _ in range(3):
        with pytest.raises(UserError):
            SafetensorsFile(path)
    after = os.open(path, os.O_RDONLY)
    os.close(after)
    assert after == before


# -- folders -----------------------------------------------------------------------------------------------------------


def _shards(folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, folder / "m-1.safetensors")
    save_file({"c": torch.full((4,), 2.0)}, folder / "m-2.safetensors")
    weight_map = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}
    index: dict[str, Any] = {"metadata": {"total_size": 36}, "weight_map": weight_map}
    if change is not None:
        change(index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_one_set_of_tensors(tmp_path: Path) -> None:
    weights = ShardedWeights(_shards(tmp_path))
    assert sorted(weights.names()) == ["a", "b", "c"]
    assert weights.file_of("c").path.name == "m-2.safetensors"
    assert (weights.shape("b"), weights.dtype("b")) == ((3,), torch.float32)
    assert torch.equal(weights.read("c"), torch.full((4,), 2.0))


def test_a_shard_in_a_folder_below_is_read(tmp_path: Path) -> None:
    _shards(tmp_path, lambda index: index["weight_map"].update(c="below/m-2.safetensors"))
    (tmp_path / "below").mkdir()
    (tmp_path / "m-2.safetensors").rename(tmp_path / "below" / "m-2.safetensors")
    assert "c" in ShardedWeights(tmp_path).names()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../m-2.safetensors", "only files inside the folder"),
        ("below/../../m-2.safetensors", "only files inside the folder"),
        ("/etc/passwd", "only files inside the folder"),
        ("//host/m-2.safetensors", "only files inside the folder"),
        ("C:\\m-2.safetensors", "only files inside the folder"),
        ("..\\m-2.safetensors", "only files inside the folder"),
        ("m\0.safetensors", "only files inside the folder"),
        ("", "only files inside the folder"),
        (7, "only files inside the folder"),
        (None, "only files inside the folder"),
        ("pytorch_model.bin", "not a safetensors file"),
        ("m-3.safetensors", "is missing"),
    ],
)
def test_a_shard_that_an_index_must_not_name_is_refused(file: Any, message: str, tmp_path: Path) -> None:
    _shards(tmp_path / "model", lambda index: index["weight_map"].update(c=file))
    (tmp_path / "m-2.safetensors").write_bytes((tmp_path / "model" / "m-2.safetensors").read_bytes())
    with pytest.raises(UserError, match=message):
        ShardedWeights(tmp_path / "model")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{", "not the JSON"),
        (b"\xff", "not the JSON"),
        (b"[" * 100_000, "not the JSON"),
        (b"[]", "weight_map"),
        (b"{}", "weight_map"),
        (b'{"weight_map": {}}', "weight_map"),
        (b'{"weight_map": ["a"]}', "weight_map"),
    ],
)
def test_an_index_that_is_none_is_refused(index: bytes, message: str, tmp_path: Path) -> None:
    _shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(UserError, match=message):
        ShardedWeights(tmp_path)


def test_an_index_that_names_a_tensor_the_file_has_not_is_refused(tmp_path: Path) -> None:
    _shards(tmp_path, lambda index: index["weight_map"].update(d="m-1.safetensors"))
    with pytest.raises(UserError, match="'d' is in m-1.safetensors, where it is not"):
        ShardedWeights(tmp_path)


def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "elsewhere.safetensors")
    link = tmp_path / "model" / "model.safetensors"
    link.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match="leads to"):
        ShardedWeights(tmp_path / "model")
    link.unlink()
    link.symlink_to("model.safetensors")
    with pytest.raises(UserError, match="cannot be opened"):
        ShardedWeights(tmp_path / "model")
    link.unlink()
    link.symlink_to("nowhere")
    with pytest.raises(UserError, match="is missing"):
        ShardedWeights(tmp_path / "model")


def test_links_within_the_folder_and_to_the_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "model" / "real.safetensors")
    (tmp_path / "model" / "model.safetensors").symlink_to("real.safetensors")
    (tmp_path / "link").symlink_to("model")
    assert ShardedWeights(tmp_path / "link").names() == ["a"]


def test_a_hub_snapshot_may_only_lead_into_its_own_repository(tmp_path: Path) -> None:
    for name in ("models--a--mine", "models--a--other"):
        (tmp_path / name / "blobs").mkdir(parents=True)
        save_file({"a": torch.ones(2)}, tmp_path / name / "blobs" / "1")
    snapshot = tmp_path / "models--a--mine" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    link = snapshot / "model.safetensors"
    link.symlink_to("../../blobs/1")
    assert ShardedWeights(snapshot).names() == ["a"]
    link.unlink()
    link.symlink_to("../../../models--a--other/blobs/1")
    with pytest.raises(UserError, match="leads to"):
        ShardedWeights(snapshot)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "tf_model.h5", "flax_model.msgpack"])
def test_other_formats_are_refused_with_the_way_out(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match="save_pretrained") as caught:
        ShardedWeights(tmp_path)
    assert file in str(caught.value)


def test_a_folder_without_weights_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        ShardedWeights(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        ShardedWeights(tmp_path / "nothing")


def test_threads_read_side_by_side(tmp_path: Path) -> None:
    tensors = {f"t{i}": _random((50_000,), torch.float32, i) for i in range(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    weights, wrong = ShardedWeights(tmp_path), []

    def read(name: str) -> None:
        for _ in range(20):
            if not torch.equal(weights.read(name), tensors[name]):
                wrong.append(name)

    threads = [threading.Thread(target=read, args=(name,)) for name in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
