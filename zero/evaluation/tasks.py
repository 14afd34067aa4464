"""lm-eval's tasks: the sixteen of the OPT paper by name, and any other."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from zero.engine import Engine
from zero.errors import UserError
from zero.evaluation.scoring import Scorer
from zero.evaluation.writing import Writer

PAPER_TASKS = {
    "HellaSwag": "hellaswag",
    "StoryCloze": "storycloze_2016",
    "PIQA": "piqa",
    "ARC-e": "arc_easy",
    "ARC-c": "arc_challenge",
    "OpenBookQA": "openbookqa",
    "Winograd": "wsc273",
    "WinoGrande": "winogrande",
    "BoolQ": "boolq",
    "CB": "cb",
    "COPA": "copa",
    "WiC": "wic",
    "WSC": "wsc",
    "MultiRC": "multirc",
    "RTE": "rte",
    "ReCoRD": "record",
}
"""Names of the OPT paper, and lm-eval's."""

PAPER_SHOTS = (0, 1, 32)

_NOT_AVERAGED = ("MultiRC", "WiC")
_METRICS = ("acc", "acc_norm", "exact_match", "em", "f1", "perplexity", "word_perplexity", "bits_per_byte")
_ALL = "opt-paper"


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: lm-eval's name.
        metric: lm-eval's name.
        value: As lm-eval has it; accuracies are 0 to 1.
        error: Standard error, None where lm-eval gives none.
    """

    task: str
    metric: str
    value: float
    error: float | None


@dataclass(frozen=True, slots=True)
class TasksResult:
    """Of several tasks.

    Attributes:
        num_shots: Examples in each prompt; None for each task's own default.
        scores: In the order of the tasks.
        average: Mean accuracy over the 14 tasks of the paper's average, if all were there; 0 to 1.
    """

    num_shots: int | None
    scores: list[TaskScore] = field(default_factory=list)
    average: float | None = None


def task_names(words: list[str]) -> list[str]:
    """lm-eval's names of what a user wrote: names of the paper or of lm-eval, commas or blanks between them.

    "opt-paper" stands for all sixteen.
    """
    known = {name.lower(): task for name, task in PAPER_TASKS.items()}
    found: list[str] = []
    for word in (part for given in words for part in given.split(",") if part):
        found += PAPER_TASKS.values() if word.lower() == _ALL else [known.get(word.lower(), word)]
    return list(dict.fromkeys(found))


def require_harness() -> None:
    """Refuses where lm-eval is not installed.

    Raises:
        UserError: with the command that installs it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            '--tasks needs the package lm-eval: pip install -c constraints.txt -e ".[eval]" in the folder of this project'
        )


@dataclass(frozen=True, slots=True)
class TaskWish:
    """What tasks are to be run, and how.

    Attributes:
        tasks: lm-eval's names.
        num_shots: Examples in each prompt; None for each task's own default.
        limit: Most documents of each task; None for all.
        folder: With task definitions of the user's own.
    """

    tasks: list[str]
    num_shots: int | None = None
    limit: int | None = None
    folder: Path | None = None


def check_tasks(wish: TaskWish) -> None:
    """Refuses tasks that lm-eval does not know, before a model is loaded.

    Raises:
        UserError: lm-eval is missing, or does not know one.
    """
    require_harness()
    if wish.folder is not None and not wish.folder.is_dir():
        raise UserError(f"--task-path {wish.folder}: no such folder")
    known = set(_manager(wish.folder).all_tasks)
    unknown = [name for name in wish.tasks if name not in known]
    if unknown:
        raise UserError(
            f"--tasks {unknown[0]}: neither a task of the OPT paper ({', '.join(PAPER_TASKS)}; {_ALL} for all) nor one "
            "of lm-eval's (lm-eval ls tasks)"
        )


@lru_cache(maxsize=1)  # it reads thousands of files
def _manager(folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if folder is None else str(folder))


def run_tasks(
    engine: Engine, scorer: Scorer, writer: Writer, tokenizer: Any, num_positions: int | None, wish: TaskWish
) -> TasksResult:
    """Runs tasks through lm-eval on a model that an engine manages.

    Raises:
        UserError: lm-eval is missing, or a data set cannot be had.
    """
    check_tasks(wish)
    import lm_eval

    from zero.evaluation.harness import EngineLM

    model = EngineLM(engine, scorer, writer, tokenizer, num_positions)
    try:
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(wish.tasks),
            num_fewshot=wish.num_shots,
            limit=wish.limit,
            bootstrap_iters=0,
            log_samples=False,
            task_manager=_manager(wish.folder),
        )
    except (OSError, ConnectionError) as error:  # datasets' ways to say that the Hub does not answer
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"--tasks: a data set cannot be had: {lines[0]} (is the Hub reachable?)") from error
    results: dict[str, dict[str, Any]] = {} if found is None else dict(found["results"])
    return TasksResult(wish.num_shots, list(_scores(results)), average_accuracy(results))


def _scores(results: dict[str, dict[str, Any]]) -> list[TaskScore]:
    found = []
    for task, values in results.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if metric in _METRICS and isinstance(value, (int, float)):
                error = values.get(f"{metric}_stderr,{kind}")
                is_number = isinstance(error, float) and math.isfinite(error)
                found.append(TaskScore(task, metric, float(value), error if is_number else None))
    return found


def average_accuracy(results: dict[str, dict[str, Any]]) -> float | None:
    """Mean over the paper's 14 tasks (all but MultiRC and WiC) of accuracy (ReCoRD: exact match); None if one lacks."""
    values = []
    for name, task in PAPER_TASKS.items():
        if name in _NOT_AVERAGED:
            continue
        of_task = {key.partition(",")[0]: value for key, value in results.get(task, {}).items()}
        value = next((of_task[metric] for metric in ("acc", "em", "exact_match") if metric in of_task), None)
        if value is None:
            return None
        values.append(float(value))
    return math.fsum(values) / len(values)
