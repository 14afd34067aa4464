"""What a run achieved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemini.units import format_bytes


@dataclass
class RunResult:
    """What a run achieved, as written to ``summary.json``."""

    num_steps: int = 0
    num_skipped_steps: int = 0
    eval_perplexity_before: float | None = None
    eval_perplexity_after: float | None = None
    num_eval_tokens: int = 0
    train_loss_first: float | None = None
    train_loss_last: float | None = None
    tokens_per_s: float = 0.0
    device_capacity_bytes: int = 0
    device_peak_bytes: int = 0
    predicted_device_peak_bytes: int = 0
    dry_run_device_peak_bytes: int | None = None
    host_bytes: int = 0
    pinned_bytes: int = 0
    model_data_bytes: int = 0
    wall_s: float = 0.0
    cost: dict[str, Any] | None = None

    def rows(self, folder: Path, map_file: Path) -> list[tuple[str, str]]:
        """For a person, as names and values.

        Args:
            folder: that the model was written to.
            map_file: picture of the memory, if it was drawn.
        """
        rows = []
        if self.eval_perplexity_before is not None and self.eval_perplexity_after is not None:
            rows.append(
                (
                    "held-out perplexity",
                    f"{self.eval_perplexity_before:.2f} before, {self.eval_perplexity_after:.2f} after "
                    f"({self.num_eval_tokens:,} tokens)",
                )
            )
        rows += [
            ("model data", f"{format_bytes(self.model_data_bytes)}"),
            ("device capacity", format_bytes(self.device_capacity_bytes)),
        ]
        if self.predicted_device_peak_bytes:  # a plan was made: not where the first step was the last
            rows.append(("device peak, predicted", format_bytes(self.predicted_device_peak_bytes)))
        rows.append(("steps", f"{self.num_steps}, of them skipped {self.num_skipped_steps}"))
        if self.tokens_per_s:  # a resume that found nothing to do has measured nothing
            rows += [
                ("device peak, measured", format_bytes(self.device_peak_bytes)),
                ("host", f"{format_bytes(self.host_bytes)}, of it pinned {format_bytes(self.pinned_bytes)}"),
                ("speed", f"{self.tokens_per_s:,.0f} tokens/s, {self.wall_s:.0f} s in all"),
            ]
        rows.append(("model folder", str(folder)))
        if map_file.is_file():
            rows.append(("memory map", str(map_file)))
        return rows
