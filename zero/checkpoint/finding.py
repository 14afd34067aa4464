"""Which checkpoints a folder holds, and which of them are whole."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from zero.checkpoint.codec import dtype_of, parse
from zero.checkpoint.files import length_bytes, open_plain, read_exactly
from zero.checkpoint.manifest import MANIFEST, FileRecord, Manifest, Slice, read_manifest
from zero.checkpoint.problems import CheckpointError, DamagedError
from zero.checkpoint.tensorfile import Incoming, read_header

logger = logging.getLogger("zero")

STATE = "state.json"
RUN_FOLDER = "checkpoints"
"""Folder of a run that holds its checkpoints."""
_STEP = re.compile(r"step-(\d{8,18})")
# A checkpoint of a step that is being written once more is moved aside under such a name for an instant.
_ASIDE = re.compile(r"\.old-(step-\d{8,18})-[0-9a-f]{32}")
_LEFTOVER = re.compile(r"\.tmp-[0-9a-f]{32}")
_MOST_THREADS = 4
_BYTES_WORTH_THREADS = 64 << 20


def step_name(step: int) -> str:
    """Name of a step's folder."""
    return f"step-{step:08d}"


def aside_of(name: str) -> str | None:
    """The name that a folder moved aside had; None if it is none."""
    match = _ASIDE.fullmatch(name)
    return match[1] if match else None


def is_leftover(name: str) -> bool:
    """Whether a folder is one that a save did not finish."""
    return _LEFTOVER.fullmatch(name) is not None


def rank_file(rank: int) -> str:
    """Name of the file with what each rank has of its own."""
    return f"rank-{rank:05d}.json"


@dataclass(frozen=True)
class Candidate:
    """A folder that may be a checkpoint, and its manifest or what is wrong with it."""

    path: Path
    manifest: Manifest | None
    problem: str | None

    @property
    def age_key(self) -> tuple[int, int]:
        """Later checkpoints have higher ones. A folder without a readable manifest goes by its name."""
        if self.manifest is not None:
            return self.manifest.sequence, self.manifest.step
        match = _STEP.search(self.path.name)
        return 1 << 62, int(match[1]) if match else 0


def list_candidates(directory: Path) -> list[Candidate]:
    """The checkpoints in a folder, newest first; only manifests are read. Links are not followed."""
    found: dict[str, Path] = {}
    if not directory.is_dir():
        return []
    for entry in os.scandir(directory):
        if not entry.is_dir(follow_symlinks=False):
            continue
        if _STEP.fullmatch(entry.name):
            found[entry.name] = Path(entry.path)
        elif (name := aside_of(entry.name)) is not None and not (directory / name).is_dir():
            found.setdefault(name, Path(entry.path))
    return sorted(map(_candidate, found.values()), key=lambda candidate: candidate.age_key, reverse=True)


def _candidate(path: Path) -> Candidate:
    try:
        return Candidate(path, _named_manifest(path), None)
    except DamagedError as error:
        return Candidate(path, None, str(error))


# -- verifying -------------------------------------------------------------------------------------------------------


def verify(checkpoint: Path) -> list[str]:
    """Reads a checkpoint whole and compares it with its manifest.

    Args:
        checkpoint: a ``step-*`` folder.

    Returns:
        What is wrong, one line for each file; empty if the checkpoint is good.
    """
    checkpoint = Path(checkpoint)
    try:
        manifest = _named_manifest(checkpoint)
    except DamagedError as error:
        return [str(error)]
    problems = _file_problems(checkpoint, manifest)
    if problems:
        return problems
    for what in (lambda: _check_tensors(checkpoint, manifest), lambda: _check_needed(checkpoint, manifest)):
        problem = _problem(what)
        problems += [problem] if problem is not None else []
    return problems


def file_problems(checkpoint: Path, manifest: Manifest, paths: set[str]) -> list[str]:
    """What is wrong with some files of a checkpoint, one line for each."""
    chosen = [record for record in manifest.files if record.path in paths]
    missing = [f"{MANIFEST}: {path} is not listed" for path in sorted(paths - {record.path for record in chosen})]
    found = (_problem(functools.partial(_check_file, checkpoint, record)) for record in chosen)
    return missing + [problem for problem in found if problem is not None]


def _file_problems(checkpoint: Path, manifest: Manifest) -> list[str]:
    def check(record: FileRecord) -> str | None:
        return _problem(lambda: _check_file(checkpoint, record))

    if manifest.total_bytes < _BYTES_WORTH_THREADS:
        results = [check(record) for record in manifest.files]
    else:
        with ThreadPoolExecutor(_MOST_THREADS) as pool:  # hashing lets other threads run
            results = list(pool.map(check, manifest.files))
    problems = [problem for problem in results if problem is not None]
    if len(results) > 1 and 2 * len(problems) >= len(results):
        problems.insert(
            0, f"{MANIFEST}: half of the files or more are not those it names; it may be another checkpoint's"
        )
    return problems


def _problem(check: Callable[[], None]) -> str | None:
    try:
        check()
    except DamagedError as error:
        return str(error)
    return None


def _named_manifest(checkpoint: Path) -> Manifest:
    """The manifest, unless the folder's name says another step: a copy of an old one must not pass for a new one."""
    manifest = read_manifest(checkpoint)
    match = _STEP.search(checkpoint.name)
    if match is not None and int(match[1]) != manifest.step:
        raise DamagedError(f"{MANIFEST}: it is of step {manifest.step}, the folder is named {checkpoint.name}")
    return manifest


def _check_file(checkpoint: Path, record: FileRecord) -> None:
    try:
        with open_plain(checkpoint, record.path) as handle:
            num_bytes = length_bytes(handle)
            if num_bytes != record.num_bytes:
                raise DamagedError(f"{record.path} has {num_bytes} bytes, {record.num_bytes} were written")
            if hashlib.file_digest(handle, "sha256").hexdigest() != record.sha256:
                raise DamagedError(f"{record.path} has changed since it was written (its SHA-256 differs)")
    except OSError as error:
        raise DamagedError(f"{record.path} cannot be read: {error.strerror or error}") from error


def _check_tensors(checkpoint: Path, manifest: Manifest) -> None:
    """Every slice must be what its file's header says."""
    headers: dict[str, dict[str, Incoming]] = {}
    for part in manifest.tensors:
        if part.file not in headers:
            headers[part.file] = header_in(checkpoint, part.file)
        stored_as(part, headers[part.file])


def header_in(checkpoint: Path, path: str) -> dict[str, Incoming]:
    """The header of one of a checkpoint's tensor files.

    Raises:
        DamagedError: it has none, or one that does not fit.
    """
    try:
        with open_plain(checkpoint, path) as handle:
            return read_header(handle)
    except DamagedError as error:
        raise DamagedError(f"{path}: {error}") from error


def stored_as(part: Slice, header: dict[str, Incoming]) -> Incoming:
    """Where a slice lies in its file.

    Raises:
        DamagedError: it does not, or in another dtype or length.
    """
    stored = header.get(part.key)
    if stored is None:
        raise DamagedError(f"{part.file}: it holds no {part.key}")
    if stored.dtype != dtype_of(part.dtype) or stored.numel != part.stop - part.start:
        raise DamagedError(f"{part.file}: {part.key} is not the {part.dtype} slice that the manifest names")
    return stored


def _check_needed(checkpoint: Path, manifest: Manifest) -> None:
    listed = {record.path for record in manifest.files}
    num_ranks = manifest.world.get("size", 1)
    for path in (STATE, *(rank_file(rank) for rank in range(min(num_ranks, len(listed) + 1)))):
        if path not in listed:
            raise DamagedError(f"{MANIFEST}: {path} is not listed")
        read_json(checkpoint, path)


def read_json(checkpoint: Path, path: str) -> dict[str, object]:
    """A JSON file of a checkpoint.

    Raises:
        DamagedError: it is none, or no dictionary.
    """
    try:
        with open_plain(checkpoint, path) as handle:
            data = bytearray(length_bytes(handle))
            read_exactly(handle, memoryview(data))
        value = parse(bytes(data))
        if not isinstance(value, dict):
            raise DamagedError("not a JSON object")
    except DamagedError as error:
        raise DamagedError(f"{path}: {error}") from error
    return value


# -- choosing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A checkpoint that verified, and what was said of those passed over."""

    path: Path
    warnings: tuple[str, ...] = ()


def newest_good(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a folder that verifies, and a line for each newer one that does not."""
    warnings: list[str] = []
    for candidate in list_candidates(Path(directory)):
        problems = [candidate.problem] if candidate.problem is not None else verify(candidate.path)
        if not problems:
            return candidate.path, warnings
        warnings.append(f"checkpoint {candidate.path.name} is damaged and was skipped: {'; '.join(problems)}")
    return None, warnings


def find_latest(directory: Path) -> Path | None:
    """The newest checkpoint in a folder whose files are what its manifest says; damaged ones are warned of.

    Args:
        directory: the folder that holds ``step-*`` folders; it need not exist.
    """
    path, warnings = newest_good(directory)
    for warning in warnings:
        logger.warning("%s", warning)
    return path


def choose(directory: Path) -> Choice:
    """The checkpoint that a user means by a path.

    Args:
        directory: a checkpoint, a folder that holds some (the newest good one of them), or a run's folder.

    Raises:
        CheckpointError: there is none, or the one named is damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no folder; give a step-* folder, or one that holds some")
    if os.path.lexists(directory / MANIFEST) or _STEP.fullmatch(directory.name):
        problems = verify(directory)
        if problems:
            lines = "\n".join(f"  - {problem}" for problem in problems)
            raise CheckpointError(
                f"checkpoint {directory} is damaged and was not loaded:\n{lines}\n"
                f"give {directory.parent} to take the newest good one there"
            )
        return Choice(directory)
    if not list_candidates(directory) and (directory / RUN_FOLDER).is_dir():
        directory = directory / RUN_FOLDER
    path, warnings = newest_good(directory)
    for warning in warnings:
        logger.warning("%s", warning)
    if path is None:
        why = "\n".join(f"  - {warning}" for warning in warnings)
        raise CheckpointError(
            f"{directory} holds no {'good ' if warnings else ''}checkpoint" + (f":\n{why}" if why else "")
        )
    return Choice(path, tuple(warnings))
