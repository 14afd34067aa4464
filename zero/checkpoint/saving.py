"""Writes a checkpoint: a fresh folder aside, everything synced, the manifest last, one rename.

Whatever stops it at whatever moment, every checkpoint that stood before stands after.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemini.manager import Phase
from gemini.units import format_bytes
from zero.checkpoint.codec import JSON, dump
from zero.checkpoint.contents import Source, collect, into_files
from zero.checkpoint.files import Written, active, make_directories, remove_tree, write_file
from zero.checkpoint.finding import STATE, aside_of, is_leftover, list_candidates, rank_file, step_name, verify
from zero.checkpoint.huggingface import FOLDER, model_files, with_export_names
from zero.checkpoint.manifest import MANIFEST, FileRecord, Manifest, Slice, config_sha256, to_bytes
from zero.checkpoint.problems import CheckpointError
from zero.checkpoint.state import buffers_of, rank_state, records_of, shared_state
from zero.checkpoint.tensorfile import file_bytes, in_file_order, write_tensor_file

if TYPE_CHECKING:
    from zero.engine import Engine

logger = logging.getLogger("zero")

_RANK = 0
_SLACK_BYTES = 1 << 20


@dataclass(frozen=True)
class _Job:
    """Everything one save writes, before anything is written."""

    step: int
    run_id: str
    config: JSON
    documents: dict[str, bytes]
    """Small files by path."""
    tensor_files: list[list[Source]]

    @property
    def num_bytes(self) -> int:
        """What the file system must have room for."""
        small = sum(len(data) for data in self.documents.values())
        return sum(file_bytes(in_file_order([s.outgoing() for s in file])) for file in self.tensor_files) + small


def save_checkpoint(
    engine: Engine,
    directory: str | Path,
    *,
    extra: Mapping[str, JSON] | None = None,
    lr_scheduler: Any = None,
    save_total_limit: int | None = None,
    tokenizer: Any = None,
    include_frozen: bool = True,
) -> Path:
    """Writes the whole training state, so that a run that loads it goes on bit for bit.

    Call it after ``engine.step()``. In an open accumulation window the gradients summed so far are stored too. Host
    memory holds no second copy of the state: tensors are written in blocks of 16 MiB from where they are.

    Args:
        engine: whose state.
        directory: the folder that holds ``step-*`` folders; made if it does not exist.
        extra: the caller's own, such as the place in the data; numbers, texts, lists and dictionaries.
        lr_scheduler: its ``state_dict()`` is stored; it must be of such values too.
        save_total_limit: keep this many checkpoints of this run. Older ones go once the new one has been read back.
        tokenizer: a tokenizer, or the folder of one, that an export shall hold.
        include_frozen: store the values of frozen parameters. Without, loading needs a model that has them already
            (their hashes are compared), and only a peft adapter can be exported.

    Returns:
        The new checkpoint's folder, ``<directory>/step-00000012``.

    Raises:
        CheckpointError: something given cannot be stored, there is no room, or the file system refused; every
            checkpoint that stood before still stands.
    """
    directory = Path(directory)
    if save_total_limit is not None and save_total_limit < 1:
        raise CheckpointError(
            f"save_total_limit = {save_total_limit}: at least 1 checkpoint must be kept, or None for all"
        )
    job = _prepare(engine, extra, lr_scheduler, tokenizer, include_frozen)
    temporary = directory / f".tmp-{uuid.uuid4().hex}"
    try:
        make_directories(directory)
        _clean(directory)
        _require_room(directory, job)
        target = _write(job, directory, temporary)
    except OSError as error:
        _discard(temporary)
        raise CheckpointError(
            f"the checkpoint of step {job.step} could not be written to {directory}: {error.strerror or error}. "
            f"It needs {format_bytes(job.num_bytes)}; checkpoints written before still stand"
        ) from error
    logger.info("checkpoint of step %d written to %s (%s)", job.step, target, format_bytes(job.num_bytes))
    if save_total_limit is not None:
        _prune(directory, target, job.run_id, save_total_limit)
    return target


def _prepare(engine: Engine, extra: Any, lr_scheduler: Any, tokenizer: Any, include_frozen: bool) -> _Job:
    engine._require_open()
    if engine.manager.phase is not Phase.IDLE:
        raise CheckpointError("save_checkpoint() inside a forward or backward pass; call it after engine.step()")
    engine.synchronize()
    engine.manager.settle_idle_reads()
    parameters, buffers = with_export_names(engine.module, records_of(engine, include_frozen), buffers_of(engine))
    plain_extra = None if extra is None else dict(extra)
    state = shared_state(engine, parameters, buffers, lr_scheduler, plain_extra)
    documents = {
        **model_files(engine, tokenizer),
        STATE: dump(state),
        rank_file(_RANK): dump(rank_state(engine)),
    }
    sources = into_files(collect(engine, include_frozen))
    # Skipped steps count, so that the names of checkpoints are steps of training.
    return _Job(engine.num_steps + engine.num_skipped_steps, engine.run_id, state["config"], documents, sources)


def _require_room(directory: Path, job: _Job) -> None:
    # The manifest names every slice; its own bytes and the file system's are covered by the slack.
    needed_bytes = job.num_bytes + _SLACK_BYTES + 1024 * sum(map(len, job.tensor_files))
    free_bytes = active().free_bytes(directory)
    if free_bytes < needed_bytes:
        raise CheckpointError(
            f"the checkpoint of step {job.step} needs {format_bytes(needed_bytes)} in {directory}, where "
            f"{format_bytes(free_bytes)} are free. Nothing was written and older checkpoints stand; make room, set "
            "another folder, or keep fewer checkpoints (save_total_limit)"
        )


# -- writing ---------------------------------------------------------------------------------------------------------


def _write(job: _Job, directory: Path, temporary: Path) -> Path:
    files = active()
    files.make_directory(temporary)
    if any("/" in path for path in job.documents):
        files.make_directory(temporary / FOLDER)
    records, slices = [], []
    for number, sources in enumerate(job.tensor_files):
        path = f"tensors-r{_RANK:05d}-{number:05d}.safetensors"
        records.append(_record(path, write_tensor_file(temporary / path, [s.outgoing() for s in sources])))
        slices += [source.slice_in(path) for source in sources]
    for path, data in job.documents.items():
        records.append(_record(path, write_file(temporary / path, [data])))
    if (temporary / FOLDER).is_dir():
        files.sync_directory(temporary / FOLDER)
    write_file(temporary / MANIFEST, [to_bytes(_manifest(job, directory, records, slices))])
    files.sync_directory(temporary)
    return _publish(directory, temporary, step_name(job.step))


def _record(path: str, written: Written) -> FileRecord:
    return FileRecord(path, written.num_bytes, written.sha256, _RANK)


def _manifest(job: _Job, directory: Path, records: list[FileRecord], slices: list[Slice]) -> Manifest:
    known = [c.manifest.sequence for c in list_candidates(directory) if c.manifest is not None]
    return Manifest(
        run_id=job.run_id,
        sequence=max(known, default=0) + 1,
        step=job.step,
        world={"size": 1, "data": 1, "pipeline": 1, "tensor": 1},
        config_sha256=config_sha256(job.config),
        software=_software(),
        files=tuple(records),
        tensors=tuple(slices),
    )


@functools.cache
def _software() -> dict[str, str]:
    versions = {"torch": str(torch.__version__)}
    for name in ("gemini-zero", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _publish(directory: Path, temporary: Path, name: str) -> Path:
    """The rename that makes a checkpoint of the folder; one of the same step steps aside and goes afterwards."""
    files, target = active(), directory / name
    aside = directory / f".old-{name}-{uuid.uuid4().hex}"
    replaces = target.is_dir()
    if replaces:
        files.rename(target, aside)  # until the next rename it is found under its new name
    files.rename(temporary, target)
    files.sync_directory(directory)
    if replaces:
        _retire_if_possible(aside)
    return target


# -- clearing up -----------------------------------------------------------------------------------------------------


def _clean(directory: Path) -> None:
    """Removes what interrupted saves left, and brings back a checkpoint that was moved aside and not replaced."""
    for path in sorted(directory.iterdir()):
        if path.is_symlink() or not path.is_dir():
            continue
        name = aside_of(path.name)
        if is_leftover(path.name):
            logger.info("removing %s, which an interrupted save left", path)
            remove_tree(path)
        elif name is not None and (directory / name).is_dir():
            _retire(path)
        elif name is not None:
            active().rename(path, directory / name)
            active().sync_directory(directory)


def _retire(path: Path) -> None:
    """Removes a checkpoint: first its name, at once, so that no half of it is ever found."""
    grave = path.parent / f".tmp-{uuid.uuid4().hex}"
    active().rename(path, grave)
    active().sync_directory(path.parent)
    remove_tree(grave)


def _retire_if_possible(path: Path) -> None:
    """The new checkpoint stands already: an old one that stays is no reason to stop."""
    try:
        _retire(path)
    except OSError as error:
        logger.warning("the old checkpoint %s could not be removed: %s", path, error)


def _discard(temporary: Path) -> None:
    """Removes an unfinished save as far as that goes; the next save removes the rest."""
    try:
        if temporary.is_dir():
            remove_tree(temporary)
    except OSError as error:
        logger.warning("%s could not be removed: %s", temporary, error)


def _prune(directory: Path, newest: Path, run_id: str, limit: int) -> None:
    problems = verify(newest)
    if problems:
        raise CheckpointError(
            f"{newest} was written, but what is read back differs: {'; '.join(problems)}. Older checkpoints were kept; "
            "check the disk"
        )
    mine = [c.path for c in list_candidates(directory) if c.manifest is not None and c.manifest.run_id == run_id]
    others = [path for path in mine if path != newest]
    for path in others[limit - 1 :]:
        _retire_if_possible(path)
