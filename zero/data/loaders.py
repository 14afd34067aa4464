"""From the config to the two loaders of a run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from zero.data.collate import Collator, pad_id
from zero.data.hub import eval_split
from zero.data.locate import is_hub_name
from zero.data.packing import TokenDataset
from zero.data.records import Problems
from zero.data.resumable import Batch, ResumableLoader, worker_seed
from zero.data.sampler import ResumableSampler
from zero.data.settings import DataSettings, Settings, Sources
from zero.data.sources import BUILTIN, ReadOptions, RecordSet, load_records
from zero.data.split import hold_out
from zero.data.tokenise import EncodeOptions, EncodeReport, encode_records, is_text, pack

logger = logging.getLogger("zero")


@dataclass(frozen=True, slots=True)
class DataBundle:
    """Everything a run reads.

    Attributes:
        train_loader: Batches to learn, with ``state_dict`` and ``load_state_dict``.
        eval_loader: Held-out batches, in order, every token once; None where nothing is held out.
        train_dataset: Its sequences; ``train_dataset[0]`` is a sample to show.
        eval_dataset: Those of ``eval_loader``.
        kind: "text", "prompt" or "messages".
        summary: A line on each of the two for the log.
        problems: Records that were skipped.
        report: What tokenising did to the training records.
    """

    train_loader: ResumableLoader
    eval_loader: DataLoader[Batch] | None
    train_dataset: TokenDataset
    eval_dataset: TokenDataset | None
    kind: str
    summary: tuple[str, ...]
    problems: Problems
    report: EncodeReport

    @property
    def num_train_tokens(self) -> int:
        """Tokens of an epoch of training, padding excluded."""
        return self.train_dataset.num_tokens

    @property
    def num_train_loss_tokens(self) -> int:
        """Those of them that are predicted in the loss."""
        return self.train_dataset.num_loss_tokens

    @property
    def num_eval_tokens(self) -> int:
        """Tokens held out."""
        return 0 if self.eval_dataset is None else self.eval_dataset.num_tokens

    @property
    def num_eval_loss_tokens(self) -> int:
        """Those of them that are predicted in the evaluation's loss."""
        return 0 if self.eval_dataset is None else self.eval_dataset.num_loss_tokens


def build_dataloaders(
    config: Settings, tokenizer: Any, model_max_positions: int | None = None, vocab_size: int | None = None
) -> DataBundle:
    """Reads, tokenises and packs what the config names.

    Args:
        config: With sections ``data`` and ``train``.
        tokenizer: A transformers tokenizer.
        model_max_positions: Most tokens the model reads at once. None: no limit.
        vocab_size: Rows of the model's embedding. None: not checked.

    Raises:
        DataError: The data cannot be trained on; says file, line and what to do.
    """
    data = config.data
    options = EncodeOptions(data.seq_length, data.packing, data.loss_on_prompt, vocab_size, model_max_positions)
    options.check()
    problems = Problems(data.on_error)
    train_set = load_records(data.train, _read_options(data, data.train_split, data.max_samples), problems=problems)
    eval_set = _load_eval(data, problems)
    encoded, report = encode_records(train_set.records, tokenizer, options, problems)
    if eval_set is not None:
        train_dataset = pack(encoded, is_text(train_set.records), options)
        held_out, _ = encode_records(eval_set.records, tokenizer, options, problems)
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
    train_loader, eval_loader = _loaders(config, train_dataset, eval_dataset, pad_id(tokenizer, vocab_size))
    return DataBundle(
        train_loader, eval_loader, train_dataset, eval_dataset, train_set.kind, tuple(summary), problems, report
    )


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


def _loaders(
    config: Settings, train_dataset: TokenDataset, eval_dataset: TokenDataset | None, pad_token_id: int
) -> tuple[ResumableLoader, DataLoader[Batch] | None]:
    data, train = config.data, config.train
    collate = Collator(pad_token_id)
    sampler = ResumableSampler(len(train_dataset), train.seed, shuffle=data.shuffle)
    train_loader = ResumableLoader(
        train_dataset,
        sampler,
        train.seed,
        batch_size=train.per_device_train_batch_size,
        collate_fn=collate,
        num_workers=data.num_workers,
    )
    if eval_dataset is None:
        return train_loader, None
    eval_loader: DataLoader[Batch] = DataLoader(
        eval_dataset,
        batch_size=train.per_device_eval_batch_size,
        collate_fn=collate,
        num_workers=data.num_workers,
        generator=torch.Generator().manual_seed(worker_seed(train.seed, 0)),
    )
    return train_loader, eval_loader


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
