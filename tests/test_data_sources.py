"""Every form that training data come in gives the same records."""

from __future__ import annotations

import csv
import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_case import TALK, config, tokenizer

import zero.data.hub as hub
from zero.data.loaders import build_dataloaders
from zero.data.records import MessagesRecord, PromptRecord, TextRecord
from zero.data.sample import builtin_documents
from zero.data.sources import ReadOptions, load_records
from zero.errors import DataError

TEXTS = ['First, a "quoted" text.', "Zweiter Text: Grüße, 世界 🎉\nmit zwei Zeilen", "Third."]
ROWS: list[dict[str, Any]] = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
PAIRS = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "", "completion": "free"}]


@pytest.fixture(autouse=True)
def _no_look_at_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hub_has_address", lambda: True)


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_csv(path: Path, delimiter: str = ",", end: str = "\n") -> None:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, delimiter=delimiter, lineterminator=end)
        writer.writerow(["id", "text"])
        writer.writerows([row["id"], row["text"].replace("\n", end)] for row in ROWS)


def write_gz(path: Path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode()))


FORMS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_text(jsonl(ROWS), encoding="utf-8"),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS).encode()),
    "crlf.jsonl": lambda path: path.write_bytes(jsonl(ROWS).replace("\n", "\r\n").encode()),
    "blank-lines.ndjson": lambda path: path.write_text("\n" + jsonl(ROWS).replace("\n", "\n  \n"), encoding="utf-8"),
    "no-last-end.jsonl": lambda path: path.write_text(jsonl(ROWS).rstrip(), encoding="utf-8"),
    "a.jsonl.gz": lambda path: write_gz(path, jsonl(ROWS)),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "object.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS})),
    "lines.json": lambda path: path.write_text(jsonl(ROWS), encoding="utf-8"),
    "list.json.gz": lambda path: write_gz(path, json.dumps(ROWS)),
    "a.csv": write_csv,
    "CRLF.CSV": lambda path: write_csv(path, end="\r\n"),
    "a.tsv": lambda path: write_csv(path, delimiter="\t"),
    "a.csv.gz": lambda path: _csv_gz(path),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
}


def _csv_gz(path: Path) -> None:
    plain = path.with_suffix("")
    write_csv(plain)
    write_gz(path, plain.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_texts(name: str, tmp_path: Path) -> None:
    FORMS[name](tmp_path / name)
    result = load_records(tmp_path / name)
    assert result.kind == "text"
    assert [record.text for record in result.records if isinstance(record, TextRecord)] == TEXTS
    assert result.records[0].where.startswith(str(tmp_path / name) + ":")


def test_a_text_file_is_one_record_as_it_is(tmp_path: Path) -> None:
    text = "\n = Title = \n\n  indented\n\n\nlast \n"
    for name, data in {
        "plain.txt": text.encode(),
        "bom.txt": b"\xef\xbb\xbf" + text.encode(),
        "crlf.txt": text.replace("\n", "\r\n").encode(),
        "packed.txt.gz": gzip.compress(text.encode()),
    }.items():
        (tmp_path / name).write_bytes(data)
        assert load_records(tmp_path / name).records == [TextRecord(f"{tmp_path / name}:1", text)]


def test_folders_patterns_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "sub/a.jsonl", ".hidden/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(jsonl([{"text": name}]))
    (tmp_path / "README.md").write_text("not data")
    monkeypatch.chdir(tmp_path)

    def names(source: Any, **options: Any) -> list[str]:
        records = load_records(source, ReadOptions(**options)).records
        return [record.text for record in records if isinstance(record, TextRecord)]

    assert names(tmp_path) == ["b.jsonl", "sub/a.jsonl"]
    assert names("**/*.jsonl") == ["b.jsonl", "sub/a.jsonl"]
    assert names(["sub/a.jsonl", "b.jsonl"]) == ["sub/a.jsonl", "b.jsonl"]
    assert names(["sub/a.jsonl", "b.jsonl"], max_samples=1) == ["sub/a.jsonl"]


def test_the_sample_is_a_source() -> None:
    result = load_records("builtin", ReadOptions(max_samples=5))
    assert [record.text for record in result.records if isinstance(record, TextRecord)] == list(builtin_documents()[:5])
    assert result.records[2].where == "builtin: document 3"


def test_a_giant_line_and_a_giant_field_are_no_trouble(tmp_path: Path) -> None:
    giant = "word " * 600_000
    (tmp_path / "a.jsonl").write_text(jsonl([{"text": giant}]))
    (tmp_path / "a.csv").write_text(f"text\n{giant}\n")
    csv.field_size_limit(131072)
    for name in ("a.jsonl", "a.csv"):
        (record,) = load_records(tmp_path / name).records
        assert isinstance(record, TextRecord)
        assert len(record.text) == len(giant)
    assert csv.field_size_limit() == 131072


def test_prompts_and_instructions(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(jsonl(PAIRS))
    where = str(tmp_path / "pairs.jsonl")
    expected = [PromptRecord(f"{where}:{i}", **pair) for i, pair in enumerate(PAIRS, 1)]
    assert load_records(where).records == expected
    rows = [
        {"instruction": "Add.", "input": "2 and 2", "output": "4", "text": "unused"},
        {"instruction": "Greet.", "input": "", "output": "Hello"},
        {"instruction": "Wave.", "input": None, "output": "o/"},
    ]
    (tmp_path / "alpaca.jsonl").write_text(jsonl(rows))
    records = load_records(tmp_path / "alpaca.jsonl").records
    prompts = [record.prompt for record in records if isinstance(record, PromptRecord)]
    assert prompts == [
        "### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n### Response:\n",
        "### Instruction:\nGreet.\n\n### Response:\n",
        "### Instruction:\nWave.\n\n### Response:\n",
    ]


def test_the_form_can_be_chosen_where_columns_allow_several(tmp_path: Path) -> None:
    path = tmp_path / "both.jsonl"
    path.write_text(jsonl([{"text": "T", "prompt": "P", "completion": "C", "body": "B"}]))
    assert load_records(path).kind == "prompt"
    assert load_records(path, ReadOptions(format="text")).records == [TextRecord(f"{path}:1", "T")]
    assert load_records(path, ReadOptions(text_column="body")).records == [TextRecord(f"{path}:1", "B")]


@pytest.mark.parametrize("name", ["talk.jsonl", "talk.json", "talk.parquet"])
def test_conversations(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist([{"messages": [{**TALK[1], "name": "x"}, TALK[2]]}]), path)
    else:
        path.write_text(json.dumps({"messages": [{**TALK[1], "name": "x"}, TALK[2]]}))
    (record,) = load_records(path).records
    assert isinstance(record, MessagesRecord)
    # Tables fill what one object lacks with null, which templates would print.
    assert record.messages == ({**TALK[1], "name": "x"}, TALK[2])


def test_content_in_parts_and_calls_of_tools(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}
    (tmp_path / "a.jsonl").write_text(jsonl([{"messages": [parts, call]}]))
    (record,) = load_records(tmp_path / "a.jsonl").records
    assert isinstance(record, MessagesRecord)
    assert record.messages[0]["content"] == "one two"
    assert record.messages[1]["content"] == ""


def test_blank_records_are_passed_over_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl([{"text": ""}, {"text": "x y"}, {"text": " \n"}]))
    result = load_records(tmp_path / "a.jsonl")
    assert (len(result.records), result.num_blank) == (1, 2)


def test_skipping_is_counted_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = [json.dumps({"prompt": "p", "completion": "c" * n}) for n in range(1, 40)]
    bad = ["{broken", '{"prompt": "p"}', '{"prompt": 3, "completion": "c"}', '{"prompt": "p", "completion": " "}']
    long = json.dumps({"prompt": "long words here " * 30, "completion": "c"})
    (tmp_path / "a.jsonl").write_text("\n".join([bad[0], *good, *bad[1:], long]))
    with caplog.at_level(logging.WARNING, "zero"):
        bundle = build_dataloaders(config(str(tmp_path / "a.jsonl"), on_error="skip", packing=False), tokenizer())
    assert bundle.eval_dataset is not None
    assert len(bundle.train_dataset) + len(bundle.eval_dataset) == 39
    assert bundle.problems.num_bad == 5
    (said,) = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert "skipped 5 records" in said
    for line in (1, 41, 42, 43, 44):
        assert f"a.jsonl:{line}: " in said


# --- the Hub, without a network


def test_a_hub_dataset_is_read_by_split_with_its_own_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, config_name: str | None, split: str, streaming: bool) -> Any:
        asked.append((name, config_name, split, streaming))
        return datasets.Dataset.from_list([{"text": f"{split} {i}", "meta": i} for i in range(50)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *given: ["test", "train", "validation"])
    bundle = build_dataloaders(config("owner/set", dataset_config="small", packing=False, max_samples=7), tokenizer())
    assert asked == [("owner/set", "small", "train", False), ("owner/set", "small", "validation", False)]
    assert bundle.eval_dataset is not None
    assert (len(bundle.train_dataset), len(bundle.eval_dataset)) == (7, 50)
    asked.clear()
    build_dataloaders(config("owner/set", eval_split="test", train_split="train[:10%]"), tokenizer())
    assert [row[2] for row in asked] == ["train[:10%]", "test"]
    asked.clear()
    build_dataloaders(config("owner/set", train_split="validation"), tokenizer())
    assert [row[2] for row in asked] == ["validation", "test"]
    bundle = build_dataloaders(config("owner/set", streaming=True, max_samples=7, packing=False), tokenizer())
    assert bundle.eval_dataset is not None
    assert len(bundle.eval_dataset) == 7
    asked.clear()
    assert build_dataloaders(config("owner/set", eval_fraction=0), tokenizer()).eval_loader is None
    assert len(asked) == 1


def test_a_stream_without_a_schema_reads_no_more_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Stream:
        column_names = None

        def __iter__(self) -> Any:
            for i in range(1000):
                read.append(i)
                yield {"text": f"row {i}"}

    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: Stream())
    result = load_records("owner/set", ReadOptions(streaming=True, max_samples=3))
    assert [record.where for record in result.records] == [f"owner/set[train]: row {i}" for i in (1, 2, 3)]
    assert len(read) == 3


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Couldn't reach 'owner/set' on the Hub (LocalEntryNotFoundError)"), "Hub cannot be reached"),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'owner/set' doesn't exist on the Hub"),
            "no such dataset on the Hugging Face Hub, and no such file or folder here",
        ),
        (ValueError("Config name is missing.\nPlease pick one"), "Config name is missing.*data.dataset_config"),
        (ValueError('Unknown split "trian". Should be one of train.'), "Unknown split.*data.train_split"),
        (RuntimeError("Dataset scripts are no longer supported"), "cannot be loaded: RuntimeError: Dataset scripts"),
    ],
)
def test_what_the_hub_says_is_passed_on(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*given: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=f'dataset "owner/set".*{said}'):
        load_records("owner/set")


def test_without_a_network_only_the_cache_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def load_dataset(*given: Any, **options: Any) -> Any:
        seen.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    before = datasets.config.HF_HUB_OFFLINE
    for has_address in (False, True):
        monkeypatch.setattr(hub, "hub_has_address", lambda has_address=has_address: has_address)
        with pytest.raises(DataError):
            load_records("owner/set")
    assert seen == [True, before]
    assert before == datasets.config.HF_HUB_OFFLINE


def test_a_saved_dataset_is_a_source(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(str(tmp_path / "two"))
    for source, options, expected in (
        ("one", ReadOptions(), TEXTS),
        ("two", ReadOptions(), TEXTS),
        ("two", ReadOptions(split="test"), TEXTS[:1]),
    ):
        records = load_records(tmp_path / source, options).records
        assert [record.text for record in records if isinstance(record, TextRecord)] == expected
    with pytest.raises(DataError, match='no split "dev"; it has train, test'):
        load_records(tmp_path / "two", ReadOptions(split="dev"))
