"""The figures of one optimizer step, and the plain line that shows them."""

from __future__ import annotations

from dataclasses import dataclass

from gemini.units import format_bytes
from zero.report.scale import format_used_of

# In the line of a step whose update was not made. Logs are searched for it.
SKIPPED_MARK = "SKIPPED (non-finite)"

_MEMORY_FIELDS = ("device", "host", "fetches", "evictions")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """What happened in one optimizer step. Counters and transferred bytes are those of this step alone.

    Attributes:
        step: Number of the step, from 1.
        num_steps: Steps of the whole run.
        epoch: Passes over the training data so far, as a fraction.
        loss: Mean training loss per token that counts; NaN or infinite in a skipped step.
        lr: Learning rate used by the step (of the first parameter group).
        grad_norm: Global gradient norm before clipping; None where it was not computed.
        loss_scale: Loss scale used by the step; None unless training is fp16.
        tokens: Tokens of the step, over all ranks and micro-batches.
        tokens_per_s: ``tokens / step_s``.
        step_s: Wall time of the step in seconds.
        device_bytes: Most bytes in use on the device during the step.
        device_peak_bytes: Most bytes in use on the device since the run began.
        device_capacity_bytes: Bytes the device may use; None where there is no limit (plain CPU).
        host_bytes: Bytes this project holds on the host.
        pinned_bytes: The part of ``host_bytes`` that is pinned.
        num_fetches: Chunks brought to the device.
        num_evictions: Chunks taken off the device to make room.
        h2d_bytes: Bytes moved from host to device.
        d2h_bytes: Bytes moved from device to host.
        skipped: Whether the update was left out because the loss or a gradient was not finite.
    """

    step: int
    num_steps: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float | None
    loss_scale: float | None
    tokens: int
    tokens_per_s: float
    step_s: float
    device_bytes: int
    device_peak_bytes: int
    device_capacity_bytes: int | None
    host_bytes: int
    pinned_bytes: int
    num_fetches: int
    num_evictions: int
    h2d_bytes: int
    d2h_bytes: int
    skipped: bool = False


def step_fields(record: StepRecord) -> list[tuple[str, str]]:
    """Return the (name, value) pairs that a step's line shows, in order."""
    fields = [
        ("step", f"{record.step}/{record.num_steps}"),
        ("loss", f"{record.loss:.4f}"),
        ("lr", f"{record.lr:.2e}"),
        ("grad_norm", "-" if record.grad_norm is None else f"{record.grad_norm:.3g}"),
    ]
    if record.loss_scale is not None:
        fields.append(("loss_scale", f"{record.loss_scale:g}"))
    return [
        *fields,
        ("tokens/s", f"{record.tokens_per_s:.0f}" if record.tokens_per_s >= 10 else f"{record.tokens_per_s:.2f}"),
        ("device", format_used_of(record.device_bytes, record.device_capacity_bytes)),
        ("host", format_bytes(record.host_bytes)),
        ("fetches", str(record.num_fetches)),
        ("evictions", str(record.num_evictions)),
    ]


def step_line(record: StepRecord, *, with_memory: bool = True) -> str:
    """Return one line for one step: names and values separated by two blanks, stable enough to be searched and parsed.

    Example: ``step 12/200  loss 3.2145  lr 5.00e-05  grad_norm 1.23  tokens/s 1234  device 3.1/4.0 MiB  host 12.3 MiB
    fetches 24  evictions 3``. A step whose update was left out says so behind its number.

    Args:
        record: The figures.
        with_memory: Whether to include bytes, fetches and evictions.
    """
    fields = step_fields(record)
    parts = [f"{name} {value}" for name, value in fields if with_memory or name not in _MEMORY_FIELDS]
    if record.skipped:
        parts.insert(1, SKIPPED_MARK)
    return "  ".join(parts)
