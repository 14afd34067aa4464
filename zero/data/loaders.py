"""From the config to the two loaders of a run."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from zero.data.collate import Collator, pad_id
from zero.data.hub import eval_split
from zero.data.locate import is_hub_name
from zero.data.packing import TokenDataset
from zero.data.records import Problems
from zero.data.resumable import Batch, ResumableLoader, worker_seed
from zero.data.sampler import RankBatches, ResumableSampler, longest_first
from zero.data.settings import DataSettings, Settings, Sources
from zero.data.sources import BUILTIN, Position, ReadOptions, RecordReader, RecordSet, load_records
from zero.data.split import hold_out, hold_out_first
from zero.data.stream_loader import StreamingLoader
from zero.data.streaming import SequenceStream, ShuffledStream
from zero.data.tokenise import EncodeOptions, EncodeReport, encode_records, is_text, pack
from zero.errors import DataError

logger = logging.getLogger("zero")


@dataclass(frozen=True, slots=True)
class DataBundle:
    """Everything a run reads.

    Attributes:
        train_loader: This rank's batches to learn, with ``state_dict`` and ``load_state_dict``.
        eval_loader: This rank's held-out batches, every token once over all ranks; None where nothing is held out.
        train_dataset: All ranks' sequences; ``train_dataset[0]`` is a sample to show. With ``data.streaming`` only the
            first ones, which are read ahead so that data that cannot be used are refused before training.
        eval_dataset: All ranks' sequences for evaluation.
        kind: "text", "prompt" or "messages".
        summary: A line on each of the two for the log.
        problems: Records that were skipped.
        report: What tokenising did to the training records.
    """

    train_loader: ResumableLoader | StreamingLoader
    eval_loader: DataLoader[Batch] | None
    train_dataset: TokenDataset
    eval_dataset: TokenDataset | None
    kind: str
    summary: tuple[str, ...]
    problems: Problems
    report: EncodeReport

    @property
    def num_train_tokens(self) -> int | None:
        """Tokens of an epoch of training, padding excluded; None where they are not known before they are read."""
        return None if isinstance(self.train_loader, StreamingLoader) else self.train_dataset.num_tokens

    @property
    def num_train_loss_tokens(self) -> int | None:
        """Those of them that are predicted in the loss."""
        return None if isinstance(self.train_loader, StreamingLoader) else self.train_dataset.num_loss_tokens

    @property
    def num_eval_tokens(self) -> int:
        """Tokens held out."""
        return 0 if self.eval_dataset is None else self.eval_dataset.num_tokens

    @property
    def num_eval_loss_tokens(self) -> int:
        """Those of them that are predicted in the evaluation's loss."""
        return 0 if self.eval_dataset is None else self.eval_dataset.num_loss_tokens


def build_dataloaders(
    config: Settings,
    tokenizer: Any,
    model_max_positions: int | None = None,
    vocab_size: int | None = None,
    rank: int = 0,
    num_ranks: int = 1,
) -> DataBundle:
    """Reads, tokenises and packs what the config names; with ``data.streaming`` only the first of it.

    Every rank reads the data itself and needs no other for it, so that all of them meet the same errors.

    Args:
        config: With sections ``data`` and ``train``.
        tokenizer: A transformers tokenizer.
        model_max_positions: Most tokens the model reads at once. None: no limit.
        vocab_size: Rows of the model's embedding. None: not checked.
        rank: The number of the rank that the loaders are for.
        num_ranks: How many ranks share the data.

    Raises:
        DataError: The data cannot be trained on; says file, line and what to do.
    """
    data = config.data
    options = EncodeOptions(data.seq_length, data.packing, data.loss_on_prompt, vocab_size, model_max_positions)
    options.check()
    builder = _Builder(config, tokenizer, options, pad_id(tokenizer, vocab_size), rank, num_ranks)
    return builder.streamed() if data.streaming else builder.read()


@dataclass(frozen=True, slots=True)
class _Builder:
    config: Settings
    tokenizer: Any
    options: EncodeOptions
    pad_token_id: int
    rank: int
    num_ranks: int

    def read(self) -> DataBundle:
        """All data are read before training."""
        data, options = self.config.data, self.options
        problems = Problems(data.on_error)
        train_set = load_records(data.train, _read_options(data, data.train_split, data.max_samples), problems=problems)
        eval_set = _load_eval(data, problems)
        encoded, report = encode_records(train_set.records, self.tokenizer, options, problems)
        if eval_set is not None:
            train_dataset = pack(encoded, is_text(train_set.records), options)
            held_out, _ = encode_records(eval_set.records, self.tokenizer, options, problems)
            eval_dataset: TokenDataset | None = pack(held_out, is_text(eval_set.records), options)
        elif data.eval_fraction > 0:
            train_dataset, eval_dataset = hold_out(encoded, is_text(train_set.records), data.eval_fraction, options)
        else:
            train_dataset, eval_dataset = pack(encoded, is_text(train_set.records), options), None
        _log(problems, report, data.seq_length)
        summary = [_summary("train", train_set.source, train_dataset)]
        if eval_dataset is not None:
            eval_source = f"a part of {train_set.source}" if eval_set is None else eval_set.source
            summary.append(_summary("eval", eval_source, eval_dataset))
        train_loader = self._train_loader(train_dataset)
        eval_loader = self._eval_loader(eval_dataset)
        return DataBundle(
            train_loader, eval_loader, train_dataset, eval_dataset, train_set.kind, tuple(summary), problems, report
        )

    def streamed(self) -> DataBundle:
        """Only what is held out and the first sequences are read now."""
        config, data, options = self.config, self.config.data, self.options
        # What is met ahead of training is met again in it, and counted there anew.
        problems = Problems(data.on_error, at_once=True)
        ahead = RecordReader(data.train, _read_options(data, data.train_split, data.max_samples), problems)
        start, records, eval_source = Position(), [], f"the first records of {ahead.source}"
        eval_set = _load_eval(data, problems)
        if eval_set is not None:
            records, eval_source = eval_set.records, eval_set.source
        elif data.eval_fraction > 0:
            records, start = hold_out_first(ahead, data.eval_fraction)
        eval_dataset = None
        if records:
            encoded, _ = encode_records(records, self.tokenizer, options, problems)
            eval_dataset = pack(encoded, is_text(records), options)
        peek = SequenceStream(ahead, self.tokenizer, options, problems, start)
        first = next(peek.sequences(), None)
        if first is None:
            raise DataError(f"{ahead.source}: no record to train on has a token to learn")
        _log(problems, peek.report, data.seq_length)
        own_problems = Problems(data.on_error, at_once=True)
        reader = RecordReader(data.train, _read_options(data, data.train_split, data.max_samples), own_problems)
        source = SequenceStream(reader, self.tokenizer, options, own_problems, start)
        train_loader = StreamingLoader(
            ShuffledStream(source, config.train.seed, data.shuffle_buffer if data.shuffle else 1),
            Collator(self.pad_token_id),
            config.train.per_device_train_batch_size,
            _identity(config, options, reader, start, first.dataset),
            rank=self.rank,
            num_ranks=self.num_ranks,
            num_workers=data.num_workers,
            num_records=data.max_samples,
        )
        summary = [f"train: sequences of up to {data.seq_length:,} tokens, read while training from {reader.source}"]
        if eval_dataset is not None:
            summary.append(_summary("eval", eval_source, eval_dataset))
        eval_loader = self._eval_loader(eval_dataset)
        return DataBundle(
            train_loader, eval_loader, first.dataset, eval_dataset, peek.kind, tuple(summary), problems, peek.report
        )

    def _train_loader(self, dataset: TokenDataset) -> ResumableLoader:
        data, train = self.config.data, self.config.train
        first = longest_first(dataset.lengths, train.seed) if data.shuffle else None
        return ResumableLoader(
            dataset,
            ResumableSampler(len(dataset), train.seed, shuffle=data.shuffle, first=first),
            train.seed,
            batch_size=train.per_device_train_batch_size,
            rank=self.rank,
            num_ranks=self.num_ranks,
            collate_fn=Collator(self.pad_token_id),
            num_workers=data.num_workers,
        )

    def _eval_loader(self, dataset: TokenDataset | None) -> DataLoader[Batch] | None:
        if dataset is None:
            return None
        data, train = self.config.data, self.config.train
        return DataLoader(
            dataset,
            batch_sampler=EvaluationBatches(len(dataset), train.per_device_eval_batch_size, self.rank, self.num_ranks),
            collate_fn=Collator(self.pad_token_id),
            num_workers=data.num_workers,
            generator=torch.Generator().manual_seed(worker_seed(train.seed, 0)),
        )


class EvaluationBatches(RankBatches):
    """Every sequence once over all ranks, in order; a rank may have a batch fewer than another, or none."""

    def __init__(self, num_samples: int, batch_size: int, rank: int, num_ranks: int) -> None:
        super().__init__(ResumableSampler(num_samples, shuffle=False), batch_size, rank, num_ranks, fill=False)

    def __iter__(self) -> Iterator[list[int]]:
        self.place.seek(0, 0)  # each pass is a whole one, also after one that was broken off
        return super().__iter__()


def _read_options(data: DataSettings, split: str, max_samples: int | None) -> ReadOptions:
    return ReadOptions(data.dataset_config, split, data.format, data.text_column, data.streaming, max_samples)


def _load_eval(data: DataSettings, problems: Problems) -> RecordSet | None:
    """The evaluation's own records; None where a part of the training data is to be held out, or nothing."""
    source = data.eval
    split = data.eval_split
    if source is None:
        if split is None and data.eval_fraction == 0:
            return None
        source = data.train
        name = _hub_name(source)
        if name is None:
            if split is not None:
                logger.warning('data.eval_split = "%s" has no effect: data.train is no Hub dataset', split)
            return None
        split = split or eval_split(name, data.dataset_config, data.train_split)
        if split is None:
            return None
    elif split is None:
        name = _hub_name(source)
        split = (eval_split(name, data.dataset_config, "") if name else None) or "train"
    # Without streaming the whole of it is read: perplexity is that of the whole evaluation set.
    options = _read_options(data, split, data.max_samples if data.streaming else None)
    return load_records(source, options, problems=problems)


def _hub_name(source: Sources) -> str | None:
    """The Hub dataset that a source is; None where it is anything else, or several."""
    names = [source] if isinstance(source, str) else [str(one) for one in source or ()]
    if len(names) == 1 and names[0] != BUILTIN and is_hub_name(names[0]):
        return names[0]
    return None


def _identity(
    config: Settings, options: EncodeOptions, reader: RecordReader, start: Position, first: TokenDataset
) -> dict[str, Any]:
    """By what a stream is known again: what a place in it hangs on. Files count by name and length."""
    data = config.data
    units = [
        [unit.name, unit.stat().st_size if unit.is_file() else 0] if isinstance(unit, Path) else unit
        for unit in reader.units()
    ]
    settings = [
        [data.dataset_config, data.train_split, data.format, data.text_column, data.max_samples, data.on_error],
        [options.seq_length, options.packing, options.loss_on_prompt],
        [units, start.num_records, first.fingerprint],
    ]
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()
    return {
        "seed": config.train.seed,
        "shuffle": data.shuffle,
        "shuffle_buffer": data.shuffle_buffer if data.shuffle else 1,
        "fingerprint": digest,
    }


def _summary(name: str, source: str, dataset: TokenDataset) -> str:
    return (
        f"{name}: {len(dataset):,} sequences of up to {dataset.longest:,} tokens, {dataset.num_tokens:,} tokens, "
        f"{dataset.num_loss_tokens:,} of them in the loss, from {source}"
    )


def _log(problems: Problems, report: EncodeReport, seq_length: int) -> None:
    if report.num_truncated:
        logger.warning(
            "data: %d of %d records are longer than data.seq_length = %d; %d tokens at their ends are cut off",
            report.num_truncated,
            report.num_records,
            seq_length,
            report.num_tokens_cut,
        )
    skipped = problems.summary()
    if skipped:
        logger.warning("%s", skipped)
