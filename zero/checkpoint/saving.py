"""Writes a checkpoint: a fresh folder aside, everything synced, the manifest last, one rename.

Whatever stops it at whatever moment, every checkpoint that stood before stands after. Of several ranks each writes what
it owns into the same folder; rank 0 makes the folder, writes the manifest and renames. Between these three stages all
ranks hear how it went on every rank, and all stop if it failed on one.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from gemini.manager import Phase
from gemini.units import format_bytes
from zero.checkpoint.background import Gate
from zero.checkpoint.codec import JSON, dump
from zero.checkpoint.contents import Source, collect, copied, into_files, names_with_gradient
from zero.checkpoint.files import Written, active, make_directories, write_file
from zero.checkpoint.finding import STATE, list_candidates, rank_file, step_name
from zero.checkpoint.folders import clean, discard, prune, publish, temporary_name
from zero.checkpoint.huggingface import FOLDER, model_files, with_export_names
from zero.checkpoint.manifest import MANIFEST, FileRecord, Manifest, config_sha256, file_from, slice_from, to_bytes
from zero.checkpoint.problems import CheckpointError
from zero.checkpoint.ranks import SavingRanks
from zero.checkpoint.state import ParameterRecord, buffers_of, optimizer_facts, rank_state, records_of, shared_state
from zero.checkpoint.tensorfile import file_bytes, in_file_order, write_tensor_file

if TYPE_CHECKING:
    from zero.engine import Engine

logger = logging.getLogger("zero")

_SLACK_BYTES = 1 << 20
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class _Job:
    """What one rank writes in one save, before anything is written.

    Attributes:
        step: the name of the checkpoint.
        run_id: the run that it is of.
        config_sha256: of the resolved config.
        directory: the folder that shall hold the checkpoint.
        limit: how many of this run may stay; None: all.
        rank: this one.
        documents: small files by path.
        gradients: files with tensors that the next micro-batch changes.
        states: files with all others.
    """

    step: int
    run_id: str
    config_sha256: str
    directory: Path
    limit: int | None
    rank: int
    documents: dict[str, bytes]
    gradients: list[list[Source]]
    states: list[list[Source]]

    @property
    def num_bytes(self) -> int:
        """What the file system must have room for."""
        small = sum(len(data) for data in self.documents.values())
        files = (*self.gradients, *self.states)
        return sum(file_bytes(in_file_order([s.outgoing() for s in file])) for file in files) + small

    @property
    def manifest_bytes(self) -> int:
        """What this rank's part of the manifest may take."""
        return 1024 * sum(map(len, (*self.gradients, *self.states)))


def save_checkpoint(
    engine: Engine,
    directory: str | Path,
    *,
    extra: Mapping[str, JSON] | None = None,
    lr_scheduler: Any = None,
    save_total_limit: int | None = None,
    tokenizer: Any = None,
    include_frozen: bool = True,
    asynchronous: bool = False,
) -> Path:
    """Writes the whole training state, so that a run that loads it goes on bit for bit.

    Call it after ``engine.step()``, on all ranks. In an open accumulation window the gradients summed so far are stored
    too. Host memory holds no second copy of the state: tensors are written in blocks of 16 MiB from where they are.

    Args:
        engine: whose state.
        directory: the folder that holds ``step-*`` folders; made if it does not exist. All ranks must see the same.
        extra: the caller's own, such as the place in the data; numbers, texts, lists and dictionaries. Rank 0's counts.
        lr_scheduler: its ``state_dict()`` is stored; it must be of such values too.
        save_total_limit: keep this many checkpoints of this run. Older ones go once the new one has been read back.
        tokenizer: a tokenizer, or the folder of one, that an export shall hold.
        include_frozen: store the values of frozen parameters. Without, loading needs a model that has them already
            (their hashes are compared), and only a peft adapter can be exported.
        asynchronous: return as soon as the state of this moment is certain to be stored, and write it while training
            goes on. What then fails is raised by the next save, ``engine.synchronize()`` or ``engine.close()``.

    Returns:
        The new checkpoint's folder, ``<directory>/step-00000012``; with ``asynchronous`` it will stand there.

    Raises:
        CheckpointError: something given cannot be stored, there is no room, or the file system refused, on whichever
            rank; every checkpoint that stood before still stands.
    """
    _require_possible(engine, save_total_limit)
    engine._agreement.meet("save_checkpoint()")
    engine.synchronize()
    engine.manager.settle_idle_reads()
    ranks = SavingRanks.of(engine)
    parameters = records_of(engine, include_frozen)
    jobs: list[_Job] = []

    def prepare() -> JSON:
        given = (extra, lr_scheduler, tokenizer, include_frozen)
        jobs.append(_prepare(engine, ranks, Path(directory), save_total_limit, parameters, facts, *given))
        return {"num_bytes": jobs[0].num_bytes, "manifest_bytes": jobs[0].manifest_bytes}

    facts = ranks.together(lambda: {"gradients": names_with_gradient(engine), "optimizer": optimizer_facts(engine)})
    needs = ranks.together(prepare)
    save = _Save(jobs[0], ranks, sum(need["num_bytes"] for need in needs))
    save.make_folder(sum(need["manifest_bytes"] for need in needs))
    if not asynchronous:
        return save.run()
    if jobs[0].gradients or any(fact["gradients"] for fact in facts):
        save.write_gradients()
    return save.run_in_background(engine)


def _require_possible(engine: Engine, limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise CheckpointError(f"save_total_limit = {limit}: at least 1 checkpoint must be kept, or None for all")
    engine._require_open()
    if engine.manager.phase is not Phase.IDLE:
        raise CheckpointError("save_checkpoint() inside a forward or backward pass; call it after engine.step()")


def _prepare(
    engine: Engine,
    ranks: SavingRanks,
    directory: Path,
    limit: int | None,
    parameters: list[ParameterRecord],
    facts: list[JSON],
    extra: Mapping[str, JSON] | None,
    lr_scheduler: Any,
    tokenizer: Any,
    include_frozen: bool,
) -> _Job:
    documents = {rank_file(ranks.rank): dump(rank_state(engine, ranks.rank))}
    if ranks.is_first:
        named, buffers = with_export_names(engine.module, parameters, buffers_of(engine))
        plain_extra = None if extra is None else dict(extra)
        of_optimizer = [fact["optimizer"] for fact in facts]
        state = shared_state(engine, named, buffers, lr_scheduler, plain_extra, of_optimizer)
        documents = {**model_files(engine, tokenizer), STATE: dump(state), **documents}
    with_gradient = {name for fact in facts for name in fact["gradients"]}
    contents = collect(engine, include_frozen, ranks, with_gradient)
    return _Job(
        # Skipped steps count, so that the names of checkpoints are steps of training.
        step=engine.num_steps + engine.num_skipped_steps,
        run_id=engine.run_id,
        config_sha256=config_sha256(engine.config.model_dump(mode="json")),
        directory=directory,
        limit=limit,
        rank=ranks.rank,
        documents=documents,
        gradients=into_files(contents.gradients),
        states=into_files(contents.buffers + contents.states),
    )


class _Save:
    """One save on one rank, stage by stage.

    Args:
        job: what this rank writes.
        ranks: those that save.
        total_bytes: what all ranks write.
    """

    def __init__(self, job: _Job, ranks: SavingRanks, total_bytes: int) -> None:
        self._job = job
        self._ranks = ranks
        self._total_bytes = total_bytes
        self._temporary = job.directory
        self._gate: Gate | None = None
        self._gradients: JSON = None

    def make_folder(self, manifest_bytes: int) -> None:
        """Rank 0 makes the temporary folder, if there is room in it for what all ranks will write."""
        name = temporary_name()
        self._temporary = self._job.directory / name

        def make() -> JSON:
            if not self._ranks.is_first:
                return None
            files, directory = active(), self._job.directory
            make_directories(directory)
            clean(directory)
            self._require_room(self._total_bytes + manifest_bytes + _SLACK_BYTES)
            files.make_directory(self._temporary)
            if any("/" in path for path in self._job.documents):
                files.make_directory(self._temporary / FOLDER)
            return name

        said = self._stage(make)
        self._temporary = self._job.directory / said[0]

    def _require_room(self, needed_bytes: int) -> None:
        directory = self._job.directory
        free_bytes = active().free_bytes(directory)
        if free_bytes < needed_bytes:
            raise CheckpointError(
                f"the checkpoint of step {self._job.step} needs {format_bytes(needed_bytes)} in {directory}, where "
                f"{format_bytes(free_bytes)} are free. Nothing was written and older checkpoints stand; make room, set "
                "another folder, or keep fewer checkpoints (save_total_limit)"
            )

    # -- running -----------------------------------------------------------------------------------------------------

    def write_gradients(self) -> None:
        """Writes now what the next micro-batch will change."""

        def write() -> JSON:
            self._gradients = self._write_tensors(self._job.gradients, 0)

        self._stage(write, may_last=True)

    def run_in_background(self, engine: Engine) -> Path:
        """Goes on in a thread; returns where the checkpoint will stand."""
        job = self._job
        states = [copied(file) for file in job.states]
        sources = [source for file in states for source in file]
        self._gate = Gate(s.chunk_tensor.chunk for s in sources if s.chunk_tensor is not None)
        self._job = _Job(**{**vars(job), "states": states})
        self._ranks = SavingRanks.of(engine, in_background=True)
        engine._saves.start(self.run)
        return job.directory / step_name(job.step)

    def run(self) -> Path:
        """Writes everything that has not been written, and publishes it.

        Raises:
            CheckpointError: see :func:`save_checkpoint`.
        """
        job = self._job
        target = job.directory / step_name(job.step)
        try:
            said = self._stage(self._write_own, may_last=True)
        finally:
            if self._gate is not None:
                self._gate.give_up()
        self._stage(lambda: self._publish(said))
        if self._ranks.is_first:
            logger.info("checkpoint of step %d written to %s (%s)", job.step, target, format_bytes(self._total_bytes))
        if job.limit is not None:
            limit = job.limit
            # Removing needs no words of its own: what cannot be removed is no reason to stop.
            self._ranks.together(
                lambda: prune(job.directory, target, job.run_id, limit) if self._ranks.is_first else None, may_last=True
            )
        return target

    def _stage(self, work: Callable[[], JSON], may_last: bool = False) -> list[JSON]:
        """One stage on all ranks; where it fails, rank 0 removes the unfinished folder."""
        try:
            return self._ranks.together(functools.partial(self._in_words, work), may_last)
        except Exception:
            if self._ranks.is_first:
                discard(self._temporary)
            raise

    def _in_words(self, work: Callable[[], _Result]) -> _Result:
        try:
            return work()
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint of step {self._job.step} could not be written to {self._job.directory}: "
                f"{error.strerror or error}. It needs {format_bytes(self._total_bytes)}; checkpoints written before "
                "still stand"
            ) from error

    # -- writing -----------------------------------------------------------------------------------------------------

    def _write_own(self) -> JSON:
        """This rank's files; returns their records and slices."""
        try:
            parts = [self._gradients] if self._gradients else [self._write_tensors(self._job.gradients, 0)]
            parts.append(self._write_tensors(self._job.states, len(self._job.gradients)))
        finally:
            if self._gate is not None:
                self._gate.give_up()  # whatever became of it, training need not wait for other ranks
        files = [record for part in parts for record in part["files"]]
        for path, data in self._job.documents.items():
            files.append(self._record(path, write_file(self._temporary / path, [data])))
        if self._ranks.is_first and any("/" in path for path in self._job.documents):
            active().sync_directory(self._temporary / FOLDER)
        return {"files": files, "slices": [part for written in parts for part in written["slices"]]}

    def _write_tensors(self, groups: list[list[Source]], first: int) -> JSON:
        files, slices = [], []
        for number, sources in enumerate(groups, start=first):
            path = f"tensors-r{self._job.rank:05d}-{number:05d}.safetensors"
            with torch.no_grad():
                outgoing = [source.outgoing(self._gate) for source in sources]
                files.append(self._record(path, write_tensor_file(self._temporary / path, outgoing)))
            slices += [asdict(source.slice_in(path)) for source in sources]
        return {"files": files, "slices": slices}

    def _record(self, path: str, written: Written) -> JSON:
        return asdict(FileRecord(path, written.num_bytes, written.sha256, self._job.rank))

    def _publish(self, said: list[JSON]) -> JSON:
        """Rank 0 writes the manifest of what all ranks have written, and renames."""
        if not self._ranks.is_first:
            return
        job = self._job
        known = [c.manifest.sequence for c in list_candidates(job.directory) if c.manifest is not None]
        size = self._ranks.size
        manifest = Manifest(
            run_id=job.run_id,
            sequence=max(known, default=0) + 1,
            step=job.step,
            world={"size": size, "data": size, "pipeline": 1, "tensor": 1},
            config_sha256=job.config_sha256,
            software=_software(),
            files=tuple(file_from(record) for part in said for record in part["files"]),
            tensors=tuple(slice_from(entry) for part in said for entry in part["slices"]),
        )
        write_file(self._temporary / MANIFEST, [to_bytes(manifest)])
        active().sync_directory(self._temporary)
        publish(job.directory, self._temporary, step_name(job.step))


@functools.cache
def _software() -> dict[str, str]:
    versions = {"torch": str(torch.__version__)}
    for name in ("gemini-zero", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
