"""Data that are read while training: the same sequences as when read before, in bounded memory, resumable anywhere."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_case import PROPERTY, config, ids_of, micro_steps, tokenizer
from hypothesis import given
from hypothesis import strategies as st

import zero.data.readers as readers
import zero.data.split as split
import zero.data.streaming as streaming
from zero.config import load_config
from zero.data.loaders import build_dataloaders
from zero.data.packing import IGNORED_LABEL
from zero.data.records import Problems
from zero.data.sample import builtin_documents
from zero.data.sources import Position, ReadOptions, RecordReader
from zero.errors import ConfigError, DataError

DOCUMENTS = builtin_documents()[:30]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def prompts(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"number {i}? ", "completion": f"it is {i} " * (1 + i % 5)} for i in range(count)]


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of a few records, pieces of a few words: places fall into every part of the work."""
    monkeypatch.setattr(streaming, "GROUP_RECORDS", 3)
    monkeypatch.setattr(streaming, "GROUP_CHARS", 400)
    monkeypatch.setattr(streaming, "_GROUP_CHARS_PER_TOKEN", 1)
    monkeypatch.setattr(readers, "PIECE_CHARS", 50)
    monkeypatch.setattr(readers, "_READ_BYTES", 37)


def write_all(folder: Path) -> dict[str, Path]:
    """The same documents in every form."""
    rows = [{"text": document, "id": i} for i, document in enumerate(DOCUMENTS)]
    paths = {name: folder / f"a.{name}" for name in ("jsonl", "jsonl.gz", "json", "csv", "txt", "txt.gz", "parquet")}
    paths["jsonl"].write_text(jsonl(rows), encoding="utf-8")
    paths["jsonl.gz"].write_bytes(gzip.compress(jsonl(rows).encode()))
    paths["json"].write_text(json.dumps(rows), encoding="utf-8")
    with paths["csv"].open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows(rows)
    paths["txt"].write_text("".join(DOCUMENTS), encoding="utf-8")
    paths["txt.gz"].write_bytes(gzip.compress("".join(DOCUMENTS).encode()))
    pq.write_table(pa.Table.from_pylist(rows), paths["parquet"], row_group_size=7)
    return paths


def learned(batch: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """The sequences of a batch, without padding; those that count nothing left out."""
    assert batch["input_ids"].numel() > 0
    return [
        tuple(ids[mask == 1].tolist())
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
        if (labels != IGNORED_LABEL).any()
    ]


def bundles_of(source: Any, num_ranks: int = 1, **settings: Any) -> list[Any]:
    settings = {"streaming": True, "eval_fraction": 0, "seq_length": 16, "shuffle_buffer": 8, "batch": 2, **settings}
    return [
        build_dataloaders(config(str(source), **settings), tokenizer(), rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]


def loaders_of(source: Any, num_ranks: int = 1, **settings: Any) -> list[Any]:
    return [bundle.train_loader for bundle in bundles_of(source, num_ranks, **settings)]


def epoch_of(loaders: list[Any]) -> list[tuple[int, ...]]:
    return [ids for parts in zip(*loaders, strict=True) for batch in parts for ids in learned(batch)]


# --- what is read


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", ["jsonl", "jsonl.gz", "json", "csv", "txt", "txt.gz", "parquet"])
def test_a_stream_has_the_sequences_of_data_read_before(name: str, packing: bool, tmp_path: Path) -> None:
    path = write_all(tmp_path)[name]
    settings: dict[str, Any] = {"packing": packing, "seq_length": 64, "eval_fraction": 0}
    whole = build_dataloaders(config(str(path), **settings), tokenizer())
    (loader,) = loaders_of(path, shuffle=False, **settings)
    assert [list(ids) for ids in epoch_of([loader])] == ids_of(whole.train_dataset)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("packing", [True, False])
def test_prompts_stay_whole_and_none_is_lost(packing: bool, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl(prompts(50)))
    (loader,) = loaders_of(tmp_path / "a.jsonl", packing=packing, seq_length=80, shuffle=False)
    whole = build_dataloaders(
        config(str(tmp_path / "a.jsonl"), packing=False, seq_length=80, eval_fraction=0), tokenizer()
    )
    got = epoch_of([loader])
    assert sum(map(len, got)) == whole.num_train_tokens
    assert sorted(sum((list(ids) for ids in got), [])) == sorted(sum(ids_of(whole.train_dataset), []))
    assert max(map(len, got)) <= 80
    if not packing:
        assert [list(ids) for ids in got] == ids_of(whole.train_dataset)
    else:
        assert len(got) < 50


@PROPERTY
@given(st.text(alphabet="ab \n\r\té€😀\ufeff", max_size=300), st.integers(1, 60), st.integers(1, 50))
def test_pieces_of_a_text_are_the_text(text: str, num_chars: int, num_bytes: int) -> None:
    import tempfile

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(readers, "PIECE_CHARS", num_chars)
        patch.setattr(readers, "_READ_BYTES", num_bytes)
        path = Path(folder) / "a.txt"
        path.write_bytes(text.encode())
        given_problems = Problems()
        (whole, *_), pieces = (
            [*read(path, given_problems, list), None] for read in (readers.read_txt, readers.read_txt_pieces)
        )
        rows = [row for row in pieces if row is not None]
        if whole is None:
            assert not rows
            return
        assert "".join(row.columns["text"] for row in rows) == whole.columns["text"]
        assert [row.columns["begins"] for row in rows] == [True] + [False] * (len(rows) - 1)
        assert [row.columns["ends"] for row in rows] == [False] * (len(rows) - 1) + [True]
        for number, row in enumerate(rows):
            assert [*readers.read_txt_pieces(path, given_problems, list, row.after)][: len(rows)] == rows[number + 1 :]


@pytest.mark.usefixtures("small_groups")
def test_reading_goes_on_after_every_record_of_every_kind_of_file(tmp_path: Path) -> None:
    paths = write_all(tmp_path)
    odd = tmp_path / "odd.csv"
    odd.write_bytes('\ufeffid,text\r\n1,"two\r\nlines"\r\n\r\n2,x,y\r\n3,"é ""q"""\r\n4,last one'.encode())
    mixed = tmp_path / "mixed.jsonl"
    rows = [{"text": "one row"}, {"text": " "}, {"text": "another", "prompt": "p", "completion": "c"}, {"text": "end"}]
    mixed.write_text(jsonl(rows[:2]) + "{broken\n\n" + jsonl(rows[2:]))
    datasets.Dataset.from_list([{"text": document} for document in DOCUMENTS[:9]]).save_to_disk(str(tmp_path / "saved"))
    sources = [*map(str, paths.values()), str(odd), str(mixed), str(tmp_path / "saved"), "builtin"]
    sources.append([str(odd), str(mixed), str(paths["parquet"])])  # type: ignore[arg-type]
    num_places = 0
    for source in sources:
        reader = RecordReader(source, ReadOptions(streaming=True, max_samples=70), Problems("skip"))
        pairs = list(reader.records())
        assert len(pairs) >= 3
        for number, (_, position) in enumerate(pairs):
            again = Position.from_json(json.loads(json.dumps(position.as_json())))
            other = RecordReader(source, ReadOptions(streaming=True, max_samples=70), Problems("skip"))
            assert list(other.records(again)) == pairs[number + 1 :]
            num_places += 1
    assert num_places > 300


def test_no_more_is_read_than_the_buffer_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Stream:
        column_names = None

        def __iter__(self) -> Any:
            for i in itertools.count():
                read.append(i)
                yield {"text": f"row {i} with some more words"}

    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: Stream())
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *given: ["train"])
    (loader,) = loaders_of("owner/set", shuffle_buffer=20)
    del read[:]
    first = [learned(batch) for batch in itertools.islice(loader, 50)]
    assert len(sum(first, [])) == 100
    num_tokens = len(tokenizer()("row 10 with some more words").input_ids) + 1
    assert len(read) * num_tokens < (100 + 2 * 20) * 16 + 2 * streaming.GROUP_RECORDS * num_tokens


# --- order and ranks


@pytest.mark.usefixtures("small_groups")
def test_the_order_is_shuffled_within_blocks_and_new_in_every_epoch(tmp_path: Path) -> None:
    path = write_all(tmp_path)["jsonl"]
    straight = epoch_of(loaders_of(path, shuffle=False, max_samples=9))
    (loader,) = loaders_of(path, max_samples=9)
    epochs = [epoch_of([loader]) for _ in range(2)]
    assert loader.epochs_done == 2.0
    assert len(set(map(tuple, [*epochs, straight]))) == 3
    for epoch in epochs:
        for start in range(0, len(straight), 8):
            assert sorted(epoch[start : start + 8]) == sorted(straight[start : start + 8])
    assert epoch_of(loaders_of(path, seed=1, max_samples=9)) != epochs[0]
    assert epoch_of(loaders_of(path, max_samples=9)) == epochs[0]


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_an_epoch_is_delivered_once_over_all_ranks_in_one_order(num_ranks: int, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl(prompts(23)))
    for batch, shuffle in itertools.product((1, 2, 3), (True, False)):
        alone = epoch_of(loaders_of(tmp_path / "a.jsonl", shuffle=shuffle, packing=False))
        assert len(set(alone)) == len(alone) == 23
        loaders = loaders_of(tmp_path / "a.jsonl", num_ranks, shuffle=shuffle, packing=False, batch=batch)
        assert epoch_of(loaders) == alone


def check_interrupted(folder: Path, form: str, num_ranks: int, num_workers: int, stops: range) -> None:
    num_samples = 19 * 2 * num_ranks + 1  # of the 20th micro-batch all ranks but one get nothing
    path = folder / f"a.{'txt' if form == 'text' else 'jsonl'}"
    if form == "text":
        path.write_text(" ".join(str(i) for i in range(4 * num_samples)), encoding="utf-8")
    else:
        path.write_text(jsonl(prompts(num_samples)))

    def fresh() -> list[Any]:
        return loaders_of(path, num_ranks, num_workers=num_workers, packing=form == "text")

    straight = micro_steps(learned, fresh(), 40)
    assert straight[-1][1]["epoch"] >= 1
    if form == "prompts":
        assert straight[-1][1]["epoch"] == 2
        assert straight[-1][1]["index"] == 0
    for stop in stops:
        loaders = fresh()
        for loader in loaders:
            loader.load_state_dict(straight[stop - 1][1])
        rest = micro_steps(learned, loaders, 40 - stop) if stop < 40 else []
        assert rest == straight[stop:], f"stopped after {stop}"


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize(("form", "num_ranks"), [("text", 1), ("text", 2), ("prompts", 2)])
def test_interrupted_is_uninterrupted(form: str, num_ranks: int, tmp_path: Path) -> None:
    check_interrupted(tmp_path, form, num_ranks, 0, range(1, 41, 3 * num_ranks))


@pytest.mark.usefixtures("small_groups")
def test_interrupted_is_uninterrupted_with_a_worker(tmp_path: Path) -> None:
    check_interrupted(tmp_path, "text", 1, 2, range(1, 41, 13))


@pytest.mark.full
@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("form", ["text", "prompts"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_interrupted_is_uninterrupted_after_each_of_40_micro_steps(
    form: str, num_ranks: int, num_workers: int, tmp_path: Path
) -> None:
    check_interrupted(tmp_path, form, num_ranks, num_workers, range(1, 41))


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize(("num_ranks", "batch"), [(1, 5), (4, 1)])
def test_any_number_of_ranks_and_any_batch_size_go_on_from_a_place(num_ranks: int, batch: int, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl(prompts(29)))
    (alone,) = loaders_of(tmp_path / "a.jsonl", packing=False)
    order = [*epoch_of([alone]), *epoch_of([alone])]
    first = micro_steps(learned, loaders_of(tmp_path / "a.jsonl", 2, batch=3, packing=False), 6)
    for stop in (1, 3, 5, 6):
        done = [ids for parts, _ in first[:stop] for part in parts for ids in part]
        loaders = loaders_of(tmp_path / "a.jsonl", num_ranks, batch=batch, packing=False)
        for loader in loaders:
            loader.load_state_dict(first[stop - 1][1])
        while len(done) < len(order):
            done.extend(epoch_of(loaders))
        assert done == order


@pytest.mark.usefixtures("small_groups")
def test_a_stream_of_the_hub_goes_on_without_reading_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for number in range(3):
        files.append(str(tmp_path / f"{number}.jsonl"))
        Path(files[-1]).write_text(jsonl([{"text": f"{number} {i} words {i * 7}"} for i in range(40)]))
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset",
        lambda *given, streaming, **options: load_dataset(
            "json", data_files=files, split="train", streaming=streaming, cache_dir=str(tmp_path / "cache")
        ),
    )  # fmt: skip
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *given: ["train"])
    straight = micro_steps(learned, loaders_of("owner/set"), 40)
    assert straight[-1][1]["point"][0][2]["row"] > 60
    for stop, num_workers in ((7, 0), (23, 0), (30, 2), (39, 0)):
        loaders = loaders_of("owner/set", num_workers=num_workers)
        loaders[0].load_state_dict(straight[stop - 1][1])
        # How `datasets` writes one and the same place depends on where it began.
        assert [parts for parts, _ in micro_steps(learned, loaders, 40 - stop)] == [
            parts for parts, _ in straight[stop:]
        ]


# --- a place is one in the same data


def test_a_place_in_other_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl(prompts(29)))
    state = micro_steps(learned, loaders_of(path), 3)[-1][1]
    for changes in ({"seed": 1}, {"shuffle": False}, {"shuffle_buffer": 9}, {"seq_length": 17}, {"max_samples": 9}):
        with pytest.raises(DataError, match="have changed since the checkpoint"):
            loaders_of(path, **changes)[0].load_state_dict(state)
    with pytest.raises(DataError, match="have changed since the checkpoint"):
        loaders_of(path, streaming=False)[0].load_state_dict(state)
    path.write_text(jsonl(prompts(30)))
    with pytest.raises(DataError, match="have changed since the checkpoint"):
        loaders_of(path)[0].load_state_dict(state)


# --- what is held out, and how much there is


def test_held_out_is_a_fraction_of_the_first_records(tmp_path: Path) -> None:
    rows = [{"prompt": f"number {i}? ", "completion": f"it is {i}"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text(jsonl(rows))

    def numbers(sequences: list[tuple[int, ...]]) -> list[int]:
        return [int(tokenizer().decode(ids).split("number ")[1].split("?")[0]) for ids in sequences]

    settings: dict[str, Any] = {"packing": False, "seq_length": 64, "eval_fraction": 0.2}
    for limit, first, last in ((None, 8, 40), (20, 4, 20)):
        bundles = bundles_of(tmp_path / "a.jsonl", 2, max_samples=limit, **settings)
        held_out = [ids for bundle in bundles for batch in bundle.eval_loader for ids in learned(batch)]
        assert sorted(numbers(held_out)) == list(range(first))
        for _ in range(2):
            trained = epoch_of([bundle.train_loader for bundle in bundles])
            assert sorted(numbers(trained)) == list(range(first, last))
    assert bundles[0].num_train_tokens is None
    assert bundles[0].kind == "prompt"
    assert len(bundles[0].train_dataset) > 0
    assert "read while training" in bundles[0].summary[0]
    assert "the first records" in bundles[0].summary[1]


def test_a_text_is_divided_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_all(tmp_path)["txt"]
    monkeypatch.setattr(readers, "PIECE_CHARS", 1000)
    (bundle,) = bundles_of(path, eval_fraction=0.1, shuffle=False)
    flat = [token for ids in [*ids_of(bundle.eval_dataset), *epoch_of([bundle.train_loader])] for token in ids]
    assert flat == [*tokenizer()("".join(DOCUMENTS)).input_ids, tokenizer().eos_token_id]
    assert 0.05 < bundle.num_eval_tokens / len(flat) <= 0.1


def test_only_so_many_records_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "FIRST_RECORDS", 10)
    (tmp_path / "a.jsonl").write_text(jsonl(prompts(40)) + "{broken\n")
    (bundle,) = bundles_of(tmp_path / "a.jsonl", packing=False, eval_fraction=0.2, seq_length=64, max_samples=40)
    assert len(bundle.eval_dataset) == 2
    assert len(epoch_of([bundle.train_loader])) == 38


def test_too_little_to_divide_or_nothing_to_learn_is_refused_before_training(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl(prompts(1)))
    with pytest.raises(DataError, match="1 record is too little to hold a part out"):
        bundles_of(path, eval_fraction=0.1)
    assert len(epoch_of(loaders_of(path, seq_length=64))) == 1
    path.write_text("\n")
    for fraction in (0, 0.1):
        with pytest.raises(DataError, match=r"a\.jsonl"):
            bundles_of(path, eval_fraction=fraction)


# --- bad records


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_record_far_in_is_named_on_every_rank_when_it_is_met(num_workers: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl(prompts(60)) + "{broken\n" + jsonl(prompts(60)))
    said = []
    for loader in loaders_of(path, 2, packing=False, num_workers=num_workers):
        batches = iter(loader)
        assert len([next(batches) for _ in range(8)]) == 8
        with pytest.raises(DataError) as caught:
            list(batches)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert said[0].startswith(f"{path}:61: broken JSON")
    assert "Traceback" not in said[0]


def test_bad_records_first_are_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{broken\n" + jsonl(prompts(9)))
    with pytest.raises(DataError, match=r"a\.jsonl:1: broken JSON"):
        bundles_of(tmp_path / "a.jsonl")


def test_skipped_records_are_counted_in_every_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl(prompts(5)) + "{broken\n" + jsonl(prompts(5)) + "{}\n")
    (loader,) = loaders_of(tmp_path / "a.jsonl", on_error="skip", packing=False)
    for _ in range(2):
        caplog.clear()
        assert len(epoch_of([loader])) == 10
        (line,) = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
        assert "skipped 2 records" in line
        assert "a.jsonl:6: " in line


# --- the config


def test_streaming_needs_a_number_of_steps() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"data": {"train": "builtin", "streaming": True}})
    (problem,) = caught.value.problems
    assert problem.startswith("train.max_steps: not given; with data.streaming = true")
    given_config = load_config({"data": {"train": "builtin", "streaming": True}, "train": {"max_steps": 5}})
    bundle = build_dataloaders(given_config, tokenizer(), 512, 512)
    assert next(iter(bundle.train_loader))["input_ids"].shape[1] == 512
    with pytest.raises(TypeError, match="no length"):
        len(bundle.train_loader)
    noted = load_config({"data": {"train": "builtin", "shuffle_buffer": 5}})
    assert any("data.shuffle_buffer = 5: has no effect" in note for note in noted.notes)


def test_streams_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    (loader,) = loaders_of("builtin", num_workers=2)
    for _ in itertools.islice(loader, 3):
        pass
    assert torch.equal(before, torch.get_rng_state())
