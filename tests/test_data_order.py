"""The order of batches, where a run stands in it, and the way from a config to loaders."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_case import PROPERTY, config, ids_of, tokenizer
from hypothesis import given
from hypothesis import strategies as st

from zero.data.collate import Collator
from zero.data.loaders import build_dataloaders
from zero.data.packing import IGNORED_LABEL, TokenRecord, pack_stream
from zero.data.resumable import ResumableLoader
from zero.data.sample import builtin_documents
from zero.data.sampler import ResumableSampler, epoch_order, longest_first
from zero.data.split import hold_out
from zero.data.tokenise import EncodeOptions, pack
from zero.errors import DataError

WIKITEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext-2" / "valid.txt"
EOS = 2


# --- order


def test_order_is_a_pure_function_of_seed_and_epoch() -> None:
    orders = {(seed, epoch): tuple(epoch_order(40, seed, epoch)) for seed in (-1, 0, 1, 2**40) for epoch in range(3)}
    assert len(set(orders.values())) == len(orders)
    assert all(sorted(order) == list(range(40)) for order in orders.values())
    assert orders[(1, 2)] == tuple(epoch_order(40, 1, 2))
    assert list(epoch_order(5, 7, 3, shuffle=False)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("shuffle", [True, False])
def test_sampler_resumes_at_every_index(shuffle: bool) -> None:
    whole = ResumableSampler(7, seed=3, shuffle=shuffle)
    straight = [index for _ in range(3) for index in whole]
    for stop in range(len(straight)):
        first = ResumableSampler(7, seed=3, shuffle=shuffle)
        taken: list[int] = []
        while len(taken) < stop:
            for index in first:
                taken.append(index)
                if len(taken) == stop:
                    break
        second = ResumableSampler(7, seed=3, shuffle=shuffle)
        second.load_state_dict(first.state_dict())
        while len(taken) < len(straight):
            taken.extend(second)
        assert taken == straight


def test_sampler_refuses_another_place_or_other_data() -> None:
    state = ResumableSampler(7, seed=3, index=4).state_dict()
    with pytest.raises(DataError, match="num_samples = 7, this run has 8"):
        ResumableSampler(8, seed=3).load_state_dict(state)
    with pytest.raises(DataError, match="seed = 3, this run has 4"):
        ResumableSampler(7, seed=4).load_state_dict(state)
    with pytest.raises(DataError, match="epoch 0, sample 9"):
        ResumableSampler(7, index=9)
    with pytest.raises(DataError, match="0 samples"):
        ResumableSampler(0)


def small_loader(num_workers: int = 0, batch: int = 3) -> ResumableLoader:
    dataset = pack_stream([TokenRecord("t", np.arange(80, dtype=np.int32))], 4)
    return ResumableLoader(
        dataset, ResumableSampler(20, seed=5), 5, batch_size=batch, collate_fn=Collator(0), num_workers=num_workers
    )


def rows_of(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    return batch["input_ids"].tolist()


def test_loader_resumes_after_every_batch_across_epochs() -> None:
    straight = [rows_of(batch) for loader in [small_loader()] for _ in range(3) for batch in loader]
    assert len(straight) == 21
    for stop in range(len(straight)):
        first, done = small_loader(), []
        while len(done) < stop:
            for batch in first:
                done.append(rows_of(batch))
                if len(done) == stop:
                    break
        second = small_loader()
        second.load_state_dict(first.state_dict())
        while len(done) < len(straight):
            done.extend(rows_of(batch) for batch in second)
        assert done == straight


def test_loader_counts_what_it_delivered_not_what_workers_read_ahead() -> None:
    straight = [rows_of(batch) for batch in small_loader()]
    first = small_loader(num_workers=2)
    done = [rows_of(batch) for batch in itertools.islice(first, 2)]
    assert done == straight[:2]
    assert first.state_dict()["index"] == 6
    second = small_loader(num_workers=2)
    second.load_state_dict(first.state_dict())
    assert [rows_of(batch) for batch in second] == straight[2:]


def test_the_same_loader_goes_on_after_a_break_whatever_its_workers_read() -> None:
    straight = [rows_of(batch) for batch in small_loader()]
    for num_workers in (0, 2):
        loader = small_loader(num_workers=num_workers)
        done = [rows_of(batch) for batch in itertools.islice(loader, 3)]
        assert done + [rows_of(batch) for batch in loader] == straight
        assert len(loader) == len(straight)


def noisy(samples: list[Any]) -> dict[str, torch.Tensor]:
    noise = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    return {"input_ids": torch.zeros(len(samples), 1), "noise": torch.tensor(noise, dtype=torch.float64)}


def test_workers_are_seeded_by_seed_and_epoch() -> None:
    def noise(seed: int) -> list[list[float]]:
        dataset = pack_stream([TokenRecord("t", np.arange(16, dtype=np.int32))], 4)
        loader = ResumableLoader(
            dataset, ResumableSampler(4, seed=seed), seed, batch_size=2, collate_fn=noisy, num_workers=2
        )
        return [batch["noise"].tolist() for _ in range(2) for batch in loader]

    first = noise(1)
    assert first == noise(1)
    assert first != noise(2)
    assert len({value for row in first for value in row}) == 12


def test_loaders_leave_the_global_random_state_alone() -> None:
    bundle = build_dataloaders(config("builtin"), tokenizer())
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for loader in (bundle.train_loader, bundle.eval_loader):
        for _ in loader:  # type: ignore[union-attr]
            pass
    build_dataloaders(config("builtin"), tokenizer())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_a_checkpoint_knows_its_data_again() -> None:
    state = small_loader().state_dict()
    other = pack_stream([TokenRecord("t", np.arange(80, dtype=np.int32)[::-1].copy())], 4)
    loader = ResumableLoader(other, ResumableSampler(20, seed=5), 5, batch_size=3, collate_fn=Collator(0))
    with pytest.raises(DataError, match="have changed since the checkpoint"):
        loader.load_state_dict(state)
    small_loader(batch=5).load_state_dict(state)


# --- the whole way


def test_bundle_is_the_same_every_time_and_counts_its_tokens() -> None:
    one, two = (build_dataloaders(config("builtin", seed=9), tokenizer()) for _ in range(2))
    for first, second in zip(one.train_loader, two.train_loader, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert one.num_train_tokens == sum(int(batch["attention_mask"].sum()) for batch in one.train_loader)
    assert one.num_train_loss_tokens == sum(
        int((batch["labels"][:, 1:] != IGNORED_LABEL).sum()) for batch in one.train_loader
    )
    assert one.eval_loader is not None
    passes = [[rows_of(batch) for batch in one.eval_loader] for _ in range(2)]
    assert passes[0] == passes[1]
    assert one.num_eval_tokens == sum(int(batch["attention_mask"].sum()) for batch in one.eval_loader)
    assert 0.03 < one.num_eval_tokens / (one.num_train_tokens + one.num_eval_tokens) <= 0.05
    assert "builtin" in one.summary[0]


def test_held_out_documents_are_whole_and_not_trained_on() -> None:
    bundle = build_dataloaders(config("builtin", packing=False, seq_length=1 << 16), tokenizer())
    assert bundle.eval_dataset is not None
    trained, held_out = ({tuple(ids) for ids in ids_of(part)} for part in (bundle.train_dataset, bundle.eval_dataset))
    assert not trained & held_out
    assert len(trained) + len(held_out) == len(builtin_documents())
    other_seed = build_dataloaders(config("builtin", packing=False, seq_length=1 << 16, seed=77), tokenizer())
    assert other_seed.eval_dataset is not None
    assert ids_of(other_seed.eval_dataset) == ids_of(bundle.eval_dataset)


@PROPERTY
@given(st.lists(st.integers(2, 60), min_size=1, max_size=40), st.floats(0.01, 0.9), st.booleans(), st.booleans())
def test_holding_out_divides_without_loss_or_overlap(
    lengths: list[int], fraction: float, text: bool, packing: bool
) -> None:
    starts = np.cumsum([0, *lengths])
    records = [TokenRecord("r", np.arange(a, a + n, dtype=np.int32)) for a, n in zip(starts, lengths, strict=False)]
    options = EncodeOptions(60, packing)
    divided_within = text and len(records) * fraction < 1
    if (len(pack(records, text, options)) if divided_within else len(records)) < 2:
        with pytest.raises(DataError, match="too little"):
            hold_out(records, text, fraction, options)
        return
    parts = hold_out(records, text, fraction, options)
    flat = [[token for ids in ids_of(part) for token in ids] for part in parts]
    assert all(flat)
    assert sorted(flat[0] + flat[1]) == list(range(sum(lengths)))


def test_one_file_is_divided_within(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(builtin_documents()[:20]), encoding="utf-8")
    bundle = build_dataloaders(config(str(tmp_path / "book.txt"), eval_fraction=0.2), tokenizer())
    assert bundle.eval_dataset is not None
    stream = sum(ids_of(bundle.train_dataset) + ids_of(bundle.eval_dataset), [])
    assert stream == [*tokenizer()("".join(builtin_documents()[:20])).input_ids, EOS]
    assert abs(len(bundle.eval_dataset) / (len(bundle.train_dataset) + len(bundle.eval_dataset)) - 0.2) < 0.02


def test_evaluation_data_of_its_own_or_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("train on this text, please", encoding="utf-8")
    (tmp_path / "b.txt").write_text("evaluate on that", encoding="utf-8")
    bundle = build_dataloaders(config(str(tmp_path / "a.txt"), eval=str(tmp_path / "b.txt")), tokenizer())
    assert bundle.eval_dataset is not None
    assert tokenizer().decode(bundle.eval_dataset[0]["input_ids"]) == "</s>evaluate on that</s>"
    assert bundle.train_dataset.num_tokens == len(tokenizer()("train on this text, please").input_ids) + 1
    none = build_dataloaders(config(str(tmp_path / "a.txt"), eval_fraction=0), tokenizer())
    assert none.eval_loader is None
    assert none.num_eval_tokens == 0
    with pytest.raises(DataError, match="too little to hold a part out.*data.eval_fraction = 0"):
        build_dataloaders(config(str(tmp_path / "a.txt")), tokenizer())


def test_the_schema_is_a_config_that_loaders_read() -> None:
    schema = pytest.importorskip("zero.config.schema")
    given_config = schema.Config.model_validate({"data": {"train": "builtin", "seq_length": 32, "max_samples": 30}})
    bundle = build_dataloaders(given_config, tokenizer(), model_max_positions=32, vocab_size=512)
    assert bundle.train_dataset.longest == 32


@pytest.mark.skipif(not WIKITEXT.is_file(), reason="the encyclopedia's text is not on this machine")
def test_an_encyclopedia_becomes_one_stream() -> None:
    bundle = build_dataloaders(config(str(WIKITEXT), eval_fraction=0.01, seq_length=128), tokenizer())
    assert bundle.eval_dataset is not None
    tokens = np.concatenate([bundle.train_dataset.token_ids, bundle.eval_dataset.token_ids])
    assert tokenizer().decode(tokens) == "</s>" + WIKITEXT.read_text(encoding="utf-8") + "</s>"


def test_a_shuffled_run_begins_with_its_longest_sequence() -> None:
    lengths = np.array([3, 9, 4, 9, 2, 5])
    for seed in range(20):
        plain, second = epoch_order(6, seed, 0), epoch_order(6, seed, 1)
        first = longest_first(lengths, seed)
        order = list(ResumableSampler(6, seed, first=first))
        assert lengths[order[0]] == 9
        assert sorted(order) == list(range(6))
        assert sum(one != other for one, other in zip(order, plain, strict=True)) == (0 if first is None else 2)
        assert list(ResumableSampler(6, seed, epoch=1, first=first)) == list(second)
    assert longest_first(np.full(6, 4), 3) is None
    with pytest.raises(DataError, match="first"):
        ResumableSampler(6, 3, first=1).load_state_dict(ResumableSampler(6, 3, index=2, first=3).state_dict())
