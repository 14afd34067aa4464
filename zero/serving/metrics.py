"""What the service counts, as Prometheus reads it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zero.serving.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

Labels = Mapping[str, str]


class Histogram:
    """Counts of durations, in buckets that each hold all smaller ones."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum_s = 0.0

    def add(self, value_s: float) -> None:
        """Counts one duration."""
        self._counts[bisect_left(_SECONDS, value_s)] += 1
        self._sum_s += value_s

    def lines(self, name: str) -> list[str]:
        """Buckets, sum and count."""
        total, lines = 0, []
        for bound, count in zip((*map(str, _SECONDS), "+Inf"), self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._sum_s:.6f}", f"{name}_count {total}"]


class Metrics:
    """Counters of the service; those of generation are the generator's.

    Attributes:
        requests: by endpoint and status; 499 is a client that left.
        refused: for a full queue.
        outcomes: of admitted requests: answered, left by the client, failed.
        request_s: from arrival to the last byte, of every request.
        answer_s: from admission to the last token, of answered requests.
        first_token_s: from admission to the first token.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.refused = 0
        self.outcomes: Counter[str] = Counter(answered=0, left=0, failed=0)
        self.request_s = Histogram()
        self.answer_s = Histogram()
        self.first_token_s = Histogram()

    def answered(self, answer_s: float, first_token_s: float | None) -> None:
        """Counts a request whose answer is complete."""
        self.outcomes["answered"] += 1
        self.answer_s.add(answer_s)
        if first_token_s is not None:
            self.first_token_s.add(first_token_s)

    def left(self, by_client: bool) -> None:
        """Counts a request without a complete answer."""
        self.outcomes["left" if by_client else "failed"] += 1


def metrics_text(service: Service) -> str:
    """All of it, in Prometheus' text format."""
    metrics = service.metrics
    lines = [
        *_family("zero_state", "gauge", "1 for the state that the service is in", _states(service)),
        *_family(
            "zero_requests_total",
            "counter",
            "Requests by endpoint and status; 499: the client left",
            [({"endpoint": path, "status": str(status)}, n) for (path, status), n in sorted(metrics.requests.items())],
        ),
        *_family(
            "zero_refused_total", "counter", "Requests answered 429, the queue being full", [({}, metrics.refused)]
        ),
        *_family(
            "zero_answers_total",
            "counter",
            "Admitted requests by how they ended",
            [({"outcome": outcome}, count) for outcome, count in metrics.outcomes.items()],
        ),
    ]
    for name, text, histogram in (
        ("zero_request_seconds", "From arrival to the last byte, every request", metrics.request_s),
        ("zero_answer_seconds", "From admission to the last token", metrics.answer_s),
        ("zero_first_token_seconds", "From admission to the first token", metrics.first_token_s),
    ):
        lines += [f"# HELP {name} {text}", f"# TYPE {name} histogram", *histogram.lines(name)]
    return "\n".join([*lines, *_generation_lines(service)]) + "\n"


def _states(service: Service) -> list[tuple[Labels, float]]:
    return [({"state": state.value}, float(state is service.state)) for state in type(service.state)]


def _generation_lines(service: Service) -> list[str]:
    """What the generator and the engine tell; nothing before the model is loaded."""
    loaded = service.worker.loaded
    if loaded is None:
        return []
    now, limits, memory = loaded.generator.statistics, loaded.generator.limits, service.worker.memory
    lines: list[str] = []
    for name, kind, text, value in (
        ("zero_open_choices", "gauge", "Completions that wait or run", service.num_open_choices),
        ("zero_waiting", "gauge", "Rows that wait", now.num_waiting),
        ("zero_rows", "gauge", "Rows that run", now.num_rows),
        ("zero_rows_limit", "gauge", "Rows that may run at a time", limits.max_rows),
        ("zero_queue_limit", "gauge", "Completions that may wait", service.settings.max_queue),
        ("zero_batch_fill_ratio", "gauge", "Rows that run, of those that may", now.num_rows / max(1, limits.max_rows)),
        ("zero_padding_ratio", "gauge", "Padding, of all positions computed", now.padding_fraction),
        ("zero_passes_total", "counter", "Passes through the model", now.num_passes),
        ("zero_failed_passes_total", "counter", "Passes that failed", service.worker.num_failed_passes),
        ("zero_prompt_tokens_total", "counter", "Prompt tokens read", now.num_prompt_tokens),
        ("zero_new_tokens_total", "counter", "Tokens generated", now.num_new_tokens),
        ("zero_tokens_per_second", "gauge", "Tokens generated per second, lately", now.tokens_per_s),
        ("zero_streamed_bytes_total", "counter", "Parameter bytes copied to the device", now.streamed_bytes),
        ("zero_cache_bytes", "gauge", "Keys and values of the rows that run", now.cache_bytes),
        ("zero_device_capacity_bytes", "gauge", "What the device may hold", memory.device_capacity_bytes),
        ("zero_device_peak_bytes", "gauge", "Most bytes on the device so far", memory.device_peak_bytes),
        ("zero_model_device_bytes", "gauge", "Parameters on the device", memory.model_device_bytes),
        ("zero_model_host_bytes", "gauge", "Parameters on the host", memory.model_host_bytes),
        ("zero_model_disk_bytes", "gauge", "Parameters on disk", memory.model_disk_bytes),
    ):
        lines += _family(name, kind, text, [({}, value)])
    return lines


def _family(name: str, kind: str, text: str, samples: Iterable[tuple[Labels, float]]) -> list[str]:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
        lines.append(f"{name}{{{inside}}} {_number(value)}" if inside else f"{name} {_number(value)}")
    return lines


def _number(value: float) -> str:
    """Whole numbers in full: bytes would lose digits in six significant ones."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
