"""Data over several ranks: the same order for every number of them, each sample once, and resumable at every step."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from data_case import config, micro_steps, tokenizer
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, SequentialSampler

from tests.ranks import run_ranks
from zero.data.collate import Collator
from zero.data.loaders import EvaluationBatches, build_dataloaders
from zero.data.packing import IGNORED_LABEL, TokenDataset
from zero.data.resumable import ResumableLoader
from zero.data.sampler import RankBatches, ResumableSampler, epoch_order, rank_part
from zero.errors import UserError
from zero.loader import shard_loader

Batch = dict[str, torch.Tensor]


def dataset_of(num_samples: int) -> TokenDataset:
    """Sample i begins with the token i, and is 2 to 4 tokens long."""
    rows = [[i] + [0] * (1 + i % 3) for i in range(num_samples)]
    return TokenDataset(
        np.array(sum(rows, []), np.int32), None, np.cumsum([0, *map(len, rows)], dtype=np.int64)
    )  # fmt: skip


def loader_of(
    num_samples: int, rank: int, num_ranks: int, batch: int, shuffle: bool = True, num_workers: int = 0
) -> ResumableLoader:
    return ResumableLoader(
        dataset_of(num_samples),
        ResumableSampler(num_samples, seed=5, shuffle=shuffle),
        5,
        batch_size=batch,
        rank=rank,
        num_ranks=num_ranks,
        collate_fn=Collator(0),
        num_workers=num_workers,
    )


def learned(batch: Batch) -> list[int]:
    """The samples of a batch that count; a batch is never empty."""
    assert batch["input_ids"].numel() > 0
    assert (batch["attention_mask"].sum(1) >= 2).all()
    is_blank = (batch["labels"] == IGNORED_LABEL).all(1)
    assert len(batch["labels"]) == 1 or not is_blank.any()
    return [int(ids[0]) for ids, skip in zip(batch["input_ids"], is_blank, strict=True) if not skip]


MATRIX = list(itertools.product((1, 2, 3, 4), (1, 2, 3), (1, 5, 7, 13), (True, False)))


def check_epoch(num_ranks: int, batch: int, num_samples: int, shuffle: bool, num_workers: int) -> None:
    loaders = [loader_of(num_samples, rank, num_ranks, batch, shuffle, num_workers) for rank in range(num_ranks)]
    num_steps = math.ceil(num_samples / (batch * num_ranks))
    assert [len(loader) for loader in loaders] == [num_steps] * num_ranks
    for epoch in range(2):
        steps = [[learned(part) for part in parts] for parts in zip(*loaders, strict=True)]
        assert len(steps) == num_steps
        order = epoch_order(num_samples, 5, epoch, shuffle).tolist()
        for number, parts in enumerate(steps):
            whole = order[number * batch * num_ranks : (number + 1) * batch * num_ranks]
            assert sum(parts, []) == whole
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            if len(whole) == batch * num_ranks:
                assert [len(part) for part in parts] == [batch] * num_ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_an_epoch_is_delivered_once_over_all_ranks_in_one_order(num_ranks: int) -> None:
    cases = [case for case in MATRIX if case[0] == num_ranks]
    assert len(cases) == 24
    for case in cases:
        check_epoch(*case, num_workers=0)


def test_workers_change_nothing() -> None:
    check_epoch(3, 2, 13, True, num_workers=2)


@pytest.mark.full
def test_workers_change_nothing_anywhere() -> None:
    for case in MATRIX:
        check_epoch(*case, num_workers=2)


def test_parts_are_even_and_contiguous() -> None:
    for count, num_ranks in itertools.product(range(12), range(1, 6)):
        parts = [rank_part(list(range(count)), rank, num_ranks) for rank in range(num_ranks)]
        assert sum(parts, []) == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ValueError, match="rank 2 of 2"):
        RankBatches(ResumableSampler(3), 1, 2, 2)


def test_a_rank_without_a_sample_gets_one_that_counts_nothing() -> None:
    batches = [next(iter(loader_of(1, rank, 3, 2))) for rank in range(3)]
    for name in ("input_ids", "attention_mask"):
        assert all(torch.equal(batch[name], batches[0][name]) for batch in batches)
    assert [int((batch["labels"] != IGNORED_LABEL).sum()) for batch in batches] == [2, 0, 0]
    assert all(batch["labels"].shape == batches[0]["labels"].shape for batch in batches)


def check_interrupted(num_ranks: int, num_workers: int, stops: range) -> None:
    batch = 2
    num_samples = 19 * batch * num_ranks + 1  # the 20th micro-batch of an epoch has one sample for all ranks

    def fresh() -> list[ResumableLoader]:
        return [loader_of(num_samples, rank, num_ranks, batch, num_workers=num_workers) for rank in range(num_ranks)]

    straight = micro_steps(learned, fresh(), 40)
    for stop in stops:
        loaders = fresh()
        for loader in loaders:
            loader.load_state_dict(straight[stop - 1][1])
        rest = micro_steps(learned, loaders, 40 - stop) if stop < 40 else []
        assert rest == straight[stop:], f"stopped after {stop}"


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_interrupted_is_uninterrupted_after_each_of_40_micro_steps(num_ranks: int) -> None:
    check_interrupted(num_ranks, 0, range(1, 41))


def test_interrupted_is_uninterrupted_with_workers() -> None:
    check_interrupted(2, 2, range(1, 41, 9))


@pytest.mark.full
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_interrupted_is_uninterrupted_with_workers_after_each_step(num_ranks: int) -> None:
    check_interrupted(num_ranks, 2, range(1, 41))


@pytest.mark.parametrize(("num_ranks", "batch"), [(1, 1), (1, 5), (3, 2), (4, 3)])
def test_any_number_of_ranks_and_any_batch_size_go_on_from_a_place(num_ranks: int, batch: int) -> None:
    num_samples = 29
    order = [sample for epoch in range(2) for sample in epoch_order(num_samples, 5, epoch).tolist()]
    first = micro_steps(learned, [loader_of(num_samples, rank, 2, 3) for rank in range(2)], 7)
    for stop in range(1, 8):
        done = [sample for parts, _ in first[:stop] for part in parts for sample in part]
        loaders = [loader_of(num_samples, rank, num_ranks, batch) for rank in range(num_ranks)]
        for loader in loaders:
            loader.load_state_dict(first[stop - 1][1])
        while len(done) < len(order):
            for parts in zip(*loaders, strict=True):
                done.extend(sample for part in parts for sample in learned(part))
        assert done == order
        assert {loader.epochs_done for loader in loaders} == {2.0}


# --- evaluation


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_every_held_out_sequence_is_there_once(num_ranks: int) -> None:
    data = {"seq_length": 32, "eval_fraction": 0.01}
    alone = build_dataloaders(config("builtin", **data), tokenizer())
    assert alone.eval_dataset is not None
    want = [alone.eval_dataset[i]["input_ids"].tolist() for i in range(len(alone.eval_dataset))]
    for batch in (1, 3, 50):
        loaders: list[Any] = [eval_loader(alone.eval_dataset, batch, rank, num_ranks) for rank in range(num_ranks)]
        for _ in range(2):  # a second pass is as the first, also where that was broken off
            got = [
                row[: int(mask.sum())].tolist()
                for loader in loaders
                for part in loader
                for row, mask in zip(part["input_ids"], part["attention_mask"], strict=True)
            ]
            assert sorted(got) == sorted(want)
            next(iter(loaders[0]))


def eval_loader(dataset: TokenDataset, batch: int, rank: int, num_ranks: int) -> DataLoader[Any]:
    sampler = EvaluationBatches(len(dataset), batch, rank, num_ranks)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=Collator(0))


def test_the_bundles_of_all_ranks_hold_one_set_of_data() -> None:
    bundles = [build_dataloaders(config("builtin", batch=50), tokenizer(), rank=rank, num_ranks=2) for rank in range(2)]
    assert bundles[0].train_dataset.fingerprint == bundles[1].train_dataset.fingerprint
    assert bundles[0].summary == bundles[1].summary
    num_tokens = [sum(int(b["attention_mask"].sum()) for b in bundle.eval_loader or ()) for bundle in bundles]
    assert sum(num_tokens) == bundles[0].num_eval_tokens
    assert min(num_tokens) > 0
    num_tokens = [
        sum(
            int(((b["labels"] != IGNORED_LABEL).any(1) * b["attention_mask"].sum(1)).sum()) for b in bundle.train_loader
        )
        for bundle in bundles
    ]
    assert sum(num_tokens) == bundles[0].num_train_tokens


def evaluate_ranks(num_sequences: int) -> list[tuple[float, int]]:
    """Held-out loss on this rank's part, twice: the engine goes on after it."""
    import torch.distributed as dist
    import transformers

    import zero
    from zero.evaluate import evaluate

    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32}
    model = transformers.OPTForCausalLM(
        transformers.OPTConfig(vocab_size=64, word_embed_proj_dim=16, max_position_embeddings=16, dropout=0.0, **shape)
    )
    engine, *_ = zero.initialize(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        config={"device": {"type": "cpu"}, "parallel": {"replicate": "1KiB"}},
    )
    batches = eval_loader(dataset_of(num_sequences), 2, rank, size)
    results = [evaluate(engine, batches)]
    ids = torch.arange(8).reshape(1, 8)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    return [*results, evaluate(engine, batches)]


@pytest.mark.parametrize("num_sequences", [1, 11])
def test_ranks_evaluate_as_one_process(num_sequences: int) -> None:
    alone = run_ranks(evaluate_ranks, 1, num_sequences, own_group=False)[0]
    ranks = run_ranks(evaluate_ranks, 2, num_sequences)
    assert ranks[0] == ranks[1]
    assert alone[0][0] != alone[1][0]
    for (loss, num_tokens), (want, num_wanted) in zip(ranks[0], alone, strict=True):
        assert num_tokens == num_wanted == sum(1 + i % 3 for i in range(num_sequences))
        assert math.exp(loss) == pytest.approx(math.exp(want), rel=1e-6)


# --- loaders of the user's own


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 21

    def __getitem__(self, index: int) -> int:
        return index


class NumberStream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(21))


class OddBatches:
    """Batches of different lengths, and nothing that says so."""

    batch_size = 4

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Any:
        return iter([[0], [1, 2], [3, 4, 5], [6], [7, 8, 9, 10]])


def shard_all() -> dict[str, Any]:
    """What this rank gets of each kind of loader, over two epochs."""
    from accelerate.data_loader import BatchSamplerShard

    from zero import world

    ranks = world.join(60.0)
    assert ranks is not None
    torch.manual_seed(100 + ranks.rank)  # ranks need not be seeded alike
    numbers = Numbers()
    distributed = DataLoader(numbers, 4, sampler=DistributedSampler(numbers, ranks.size, ranks.rank))
    prepared = DataLoader(
        numbers, batch_sampler=BatchSamplerShard(BatchSampler(SequentialSampler(numbers), 4, False), 2, ranks.rank)
    )
    plain = [1, 2, 3]
    as_they_are = {
        "distributed": distributed, "prepared": prepared, "list": plain, "none": None,
        "own": loader_of(9, ranks.rank, ranks.size, 2),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(ranks.rank)
    loaders = {
        "sequential": DataLoader(numbers, 4),
        "whole": DataLoader(numbers, 3, drop_last=True),
        "shuffled": DataLoader(numbers, 4, shuffle=True),
        "generator": DataLoader(numbers, 4, shuffle=True, generator=generator),
        # Ranks of tests are forked from a server, whose way of starting processes is slow.
        "workers": DataLoader(numbers, 4, shuffle=True, num_workers=2, multiprocessing_context="fork"),
        "items": DataLoader(numbers, None),
        "batch sampler": DataLoader(numbers, batch_sampler=BatchSampler(SequentialSampler(numbers), 4, False)),
        "odd batches": DataLoader(numbers, batch_sampler=OddBatches()),
        "stream": DataLoader(NumberStream(), 4),
        "stream of items": DataLoader(NumberStream(), None),
    }
    result: dict[str, Any] = {
        "as they are": {name: shard_loader(one, ranks) is one for name, one in as_they_are.items()},
        "alone": shard_loader(loaders["sequential"], None) is loaders["sequential"],
    }
    for name, loader in loaders.items():
        sharded = shard_loader(loader, ranks)
        assert sharded is not loader
        epochs = [[torch.as_tensor(batch).reshape(-1).tolist() for batch in sharded] for _ in range(2)]
        length = len(sharded) if "stream" not in name else len(epochs[0])
        result[name] = {"epochs": epochs, "length": length}
    return result


@pytest.fixture(scope="module")
def shards() -> list[dict[str, Any]]:
    return run_ranks(shard_all, 2)


def test_what_the_user_has_divided_is_used_as_it_is(shards: list[dict[str, Any]]) -> None:
    for rank in shards:
        assert all(rank["as they are"].values()), rank["as they are"]
        assert rank["alone"]


def interleaved(shards: list[dict[str, Any]], name: str, epoch: int) -> list[list[int]]:
    """Batches of all ranks in the order of one process; all have as many, and as long ones."""
    parts = [rank[name]["epochs"][epoch] for rank in shards]
    assert len({len(part) for part in parts}) == 1
    assert all(rank[name]["length"] == len(parts[0]) for rank in shards)
    return [batch for pair in zip(*parts, strict=True) for batch in pair]


@pytest.mark.parametrize("name", ["sequential", "batch sampler", "stream"])
def test_batches_go_round_the_ranks_in_order(shards: list[dict[str, Any]], name: str) -> None:
    for epoch in range(2):
        flat = sum(interleaved(shards, name, epoch), [])
        assert flat[:21] == list(range(21))
        assert flat[21:] == [0, 1, 2]  # the last batch is made up with the first samples


@pytest.mark.parametrize("name", ["shuffled", "generator", "workers"])
def test_shuffled_orders_are_the_same_on_all_ranks(shards: list[dict[str, Any]], name: str) -> None:
    epochs = [sum(interleaved(shards, name, epoch), []) for epoch in range(2)]
    for flat in epochs:
        assert sorted(flat[:21]) == list(range(21))
        assert flat[21:] == flat[:3]
    assert epochs[0] != epochs[1]


def test_the_users_generator_is_that_of_rank_0(shards: list[dict[str, Any]]) -> None:
    alone = DataLoader(Numbers(), 4, shuffle=True, generator=torch.Generator().manual_seed(0))
    for epoch in range(2):
        want = [batch.tolist() for batch in alone]
        assert interleaved(shards, "generator", epoch)[:5] == want[:5]


def test_other_forms_of_loaders_are_divided_too(shards: list[dict[str, Any]]) -> None:
    assert sum(interleaved(shards, "whole", 0), []) == list(range(18))[: 3 * 6]
    for name in ("items", "stream of items"):
        assert sum(interleaved(shards, name, 0), []) == [*range(21), 0]
    assert interleaved(shards, "odd batches", 0) == [*OddBatches(), [0]]


def shard_unequal() -> str:
    from zero import world

    ranks = world.join(60.0)
    assert ranks is not None
    with pytest.raises(UserError) as caught:
        shard_loader(DataLoader(list(range(10 + 4 * ranks.rank)), 2), ranks)
    return str(caught.value)


def test_loaders_of_different_lengths_are_refused_on_all_ranks() -> None:
    said = run_ranks(shard_unequal, 2)
    assert said[0] == said[1]
    assert "rank 0 has 5 batches, rank 1 has 7" in said[0]
