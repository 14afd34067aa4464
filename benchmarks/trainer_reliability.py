"""Saves that are killed and files that are damaged: transformers' Trainer and this project, side by side.

    python benchmarks/trainer_reliability.py [--every N] [--only PROGRAM]

Both fine-tune the same tiny OPT for six steps and save at steps 2, 4 and 6. In the first matrix a process is killed with
SIGKILL at a file operation of its last save (opening for writing, making a directory, renaming, fsync), one operation
after the other; then the same program is started once more and asked to go on from the newest checkpoint. In the second
one, each file of the newest checkpoint is deleted, emptied, halved, has a bit flipped at two places, or is an older
checkpoint's. Counted is who goes on, who refuses, and who goes on silently with other weights than the run that was left
alone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

NUM_STEPS = 6
SAVE_STEPS = 2

# -- the two programs ----------------------------------------------------------------------------------------------------


def _model() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=64, num_attention_heads=2, max_position_embeddings=16, **shape))


def _rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 64, (24, 12), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def run_trainer(folder: Path, resume: bool) -> str:
    """transformers' Trainer; a hash of the weights it ends with."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=NUM_STEPS,
        save_steps=SAVE_STEPS,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    model = _model()
    Trainer(model=model, args=arguments, train_dataset=_rows()).train(  # type: ignore[arg-type]
        resume_from_checkpoint=resume and any(folder.glob("checkpoint-*"))
    )
    return _digest(model.state_dict())


def run_ours(folder: Path, resume: bool) -> str:
    """This project's engine around a plain loop; a hash of the weights it ends with."""
    import zero
    from zero.checkpoint import find_latest

    model, rows = _model(), _rows()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    engine, *_ = zero.initialize(model, optimizer, config={"device": {"type": "cpu"}})
    step = 0
    if resume and find_latest(folder) is not None:
        step = int((engine.load_checkpoint(folder).extra or {})["step"])
    while step < NUM_STEPS:
        batch = {key: torch.stack([rows[(2 * step + i) % 24][key] for i in range(2)]) for key in rows[0]}
        engine.zero_grad()
        engine.backward(engine(**batch).loss)
        engine.step()
        step += 1
        if step % SAVE_STEPS == 0:
            engine.save_checkpoint(folder, extra={"step": step})
    return _digest(engine.module.state_dict())


def _digest(weights: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(weights[name].contiguous().numpy().tobytes())
    return found.hexdigest()


Program = Callable[[Path, bool], str]
PROGRAMS: dict[str, Program] = {"transformers' Trainer": run_trainer, "gemini-zero": run_ours}

# -- in a process of its own ---------------------------------------------------------------------------------------------


def _in_child(work: Callable[[], str]) -> str | None:
    """What a forked process returned; None if it failed or was killed."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            os.dup2(devnull, 2)
            os.write(write_end, work().encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    return said if status == 0 else None


def _watched(program: Program, folder: Path, die_at: int | None) -> str:
    """Runs a program, counting file operations of its last save; dies at one of them, or returns their number."""
    count, last = 0, f"{NUM_STEPS}"

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        named = [str(a) for a in arguments[:2] if isinstance(a, str | bytes | os.PathLike)]
        writes = event in ("os.mkdir", "os.rename") or (event == "open" and _is_write(arguments))
        if not writes or not any(str(folder) in name for name in named):
            return
        if not any(f"checkpoint-{last}" in name or ".tmp-" in name or "step-" in name for name in named):
            return
        if len(list(folder.iterdir())) < NUM_STEPS // SAVE_STEPS - 1:
            return  # an earlier save
        if count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    folder.mkdir(exist_ok=True)
    sys.addaudithook(watch)
    program(folder, False)
    return str(count)


def _is_write(arguments: tuple[Any, ...]) -> bool:
    mode, flags = arguments[1], arguments[2]
    return (isinstance(mode, str) and any(c in mode for c in "wax+")) or bool(
        isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )


# -- the matrices --------------------------------------------------------------------------------------------------------


def kill_matrix(program: Program, every: int) -> Counter[str]:
    """Killed at each file operation of the last save, then started again."""
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as home:
        whole = _in_child(lambda: program(Path(home) / "whole", False))
        points = int(_in_child(lambda: _watched(program, Path(home) / "counted", None)) or 0)
        for point in range(0, points, every):
            folder = Path(home) / f"killed-{point}"
            _in_child(lambda folder=folder, point=point: _watched(program, folder, point))  # type: ignore[misc]
            outcomes[_outcome(_in_child(lambda folder=folder: program(folder, True)), whole)] += 1  # type: ignore[misc]
    return outcomes


def _outcome(ended: str | None, whole: str | None) -> str:
    if ended is None:
        return "fails until a person helps"
    return "goes on, same weights" if ended == whole else "goes on silently with other weights"


def _damages(newest: Path, older: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    for file in sorted(p for p in newest.rglob("*") if p.is_file()):
        name = str(file.relative_to(newest))
        yield name, lambda path: path.unlink()
        yield name, lambda path: path.write_bytes(b"")
        yield name, lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        for share in (0.5, 0.9):
            yield name, lambda path, share=share: _flip(path, share)  # type: ignore[misc]
        if (older / name).is_file():
            yield name, lambda path, name=name: shutil.copy(older / name, path)  # type: ignore[misc]


def _flip(path: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[int(len(data) * share)] ^= 16
    path.write_bytes(bytes(data))


def corruption_matrix(program: Program) -> Counter[str]:
    """Each file of the checkpoint of step 4 damaged, as if the run had stopped there; then started again."""
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as home:
        first = Path(home) / "first"
        whole = _in_child(lambda: program(first, False))
        folders = sorted(p for p in first.iterdir() if p.is_dir() and p.name.split("-")[0] in ("checkpoint", "step"))
        shutil.rmtree(folders[-1])
        newest, older = folders[1], folders[0]
        for number, (name, damage) in enumerate(_damages(newest, older)):
            folder = Path(home) / f"damaged-{number}"
            shutil.copytree(first, folder)
            damage(folder / newest.name / name)
            outcomes[_outcome(_in_child(lambda folder=folder: program(folder, True)), whole)] += 1  # type: ignore[misc]
            shutil.rmtree(folder)
    return outcomes


def main() -> None:
    """Prints both matrices of both programs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th kill point (1)")
    parser.add_argument("--only", choices=sorted(PROGRAMS), help="one of the two")
    given = parser.parse_args()
    every = given.every
    torch.set_num_threads(1)
    for name, program in PROGRAMS.items():
        if given.only not in (None, name):
            continue
        for what, outcomes in (("killed", kill_matrix(program, every)), ("damaged", corruption_matrix(program))):
            rows = ", ".join(f"{outcome}: {count}" for outcome, count in outcomes.most_common())
            sys.stdout.write(f"{name}, {what}, {sum(outcomes.values())} cases: {rows}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
