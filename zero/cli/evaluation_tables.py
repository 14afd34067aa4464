"""What ``zero eval`` shows and writes: results beside published numbers, and speed and memory."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gemini.units import format_bytes
from zero.engine import Engine
from zero.evaluation import references
from zero.evaluation.dialogue import DialogueResult
from zero.evaluation.perplexity import PerplexityResult
from zero.evaluation.scoring import Scorer
from zero.evaluation.tasks import TasksResult
from zero.evaluation.writing import Writer

Row = tuple[str, str, str]
"""What, its value here, and the published one."""

_NO_SHARES = ("perplexity", "word_perplexity", "bits_per_byte")


def perplexity_json(result: PerplexityResult) -> dict[str, Any]:
    """For machines."""
    return asdict(result) | {
        "nats_per_token": result.nats_per_token,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "word_perplexity": result.word_perplexity,
    }


def perplexity_rows(result: PerplexityResult, words: bool, reference: references.Reference | None) -> list[Row]:
    """Of text; per word only where ``words``."""
    texts = "1 text" if result.num_texts == 1 else f"{result.num_texts} texts"
    context = f"{texts}, window {result.window}, stride {result.stride}"
    unscored = f" ({result.num_unscored} first tokens not scored)" if result.num_unscored else ""
    rows = [
        ("tokens", f"{result.num_tokens:,}{unscored}; {context}", ""),
        ("nats per token", f"{result.nats_per_token:.4f}", ""),
        ("perplexity", f"{result.perplexity:.3f}", _published(reference, named=True)),
        ("bits per byte", f"{result.bits_per_byte:.4f}", ""),
    ]
    if words:
        counted = f"{result.num_words:,} words and {result.num_lines:,} line ends"
        rows.append(("perplexity per word", f"{result.word_perplexity:.2f} ({counted})", ""))
    return rows


def dialogue_rows(result: DialogueResult, published: list[references.Reference]) -> list[Row]:
    """Of answers, and what was published of other models."""
    rows = [
        ("answers", f"{result.num_answers:,}, {result.num_tokens:,} tokens", ""),
        ("dialogue perplexity", f"{result.perplexity:.3f}", ""),
    ]
    if result.normalised_perplexity is not None:
        rows.append(("the same, normalised", f"{result.normalised_perplexity:.3f}", ""))
    rows.append(("unigram F1", f"{result.unigram_f1:.3f}", ""))
    return [*rows, *((reference.what, "", reference.text) for reference in published)]


def _published(reference: references.Reference | None, named: bool = False) -> str:
    if reference is None:
        return ""
    return f"{reference.what}: {reference.text}" if named else reference.text


def task_rows(result: TasksResult, size: str | None) -> list[Row]:
    """Each metric of each task, and the average of the paper's.

    Args:
        result: of the tasks.
        size: of OPT, if the model has the shape of one.
    """
    rows = []
    for score in result.scores:
        reference = references.of_task(size, score.task, score.metric, result.num_shots or 0)
        factor, unit, digits = (1, "", 3) if score.metric in _NO_SHARES else (100, " %", 1)
        error = "" if score.error is None else f" +- {factor * score.error:.1f}"
        value = f"{factor * score.value:.{digits}f}{unit}{error}"
        rows.append((f"{score.task}, {score.metric}", value, _published(reference)))
    return [*rows, *_average_rows(result)]


def _average_rows(result: TasksResult) -> list[Row]:
    if result.average is None:
        return []
    return [("14-task average", f"{100 * result.average:.1f} %", "")]


def run_figures(engine: Engine, scorer: Scorer, writer: Writer) -> dict[str, float]:
    """Speed and memory, for machines; a speed only where there was one."""
    report = engine.memory_report()
    speeds = {
        "read_tokens_per_s": (scorer.num_read, scorer.elapsed_s),
        "written_tokens_per_s": (writer.num_new, writer.elapsed_s),
    }
    return {
        **{name: number / elapsed_s for name, (number, elapsed_s) in speeds.items() if number},
        "device_capacity_bytes": report.device_capacity_bytes,
        "device_peak_bytes": report.device_peak_bytes,
        "counts_activations": not engine.device.is_host,
        "predicted_device_peak_bytes": report.predicted_device_peak_bytes,
        "host_bytes": report.host_bytes,
        "pinned_bytes": report.pinned_bytes,
    }


def figure_rows(figures: dict[str, float], num_ranks: int) -> list[tuple[str, str]]:
    """The same for people, as names and values."""

    def amount(name: str) -> str:
        return format_bytes(int(figures[name]))

    rows = [
        (f"speed, {what}", f"{figures[name]:{',.0f' if figures[name] >= 100 else '.3g'}} tokens/s")
        for what, name in (("read", "read_tokens_per_s"), ("written", "written_tokens_per_s"))
        if name in figures
    ]
    rows.append(("device capacity", amount("device_capacity_bytes")))
    if figures["predicted_device_peak_bytes"]:
        rows.append(("device peak, predicted", amount("predicted_device_peak_bytes")))
    rows += [
        (
            "device peak, measured" if figures["counts_activations"] else "model at the highest",
            amount("device_peak_bytes"),
        ),
        ("host", f"{amount('host_bytes')}, of it pinned {amount('pinned_bytes')}"),
    ]
    return rows if num_ranks == 1 else [*rows, ("ranks", f"{num_ranks}; figures of memory are rank 0's")]
