"""What a generator has done, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from zero.generation.buckets import Bucket


@dataclass
class Counting:
    """Sums over all passes so far."""

    num_passes: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    num_positions: int = 0
    num_padding: int = 0
    streamed_bytes: int = 0
    busy_s: float = 0.0

    def add(self, bucket: Bucket) -> None:
        """A bucket has been through the model, and what it added does not count yet."""
        num_positions = bucket.num_positions * len(bucket.rows)
        self.num_positions += num_positions
        if bucket.is_new:
            self.num_padding += num_positions - sum(len(row.tokens) for row in bucket.rows)
            self.num_prompt_tokens += sum(row.job.num_prompt_tokens for row in bucket.rows if row.num_new == 0)

    @property
    def padding_fraction(self) -> float:
        """Of all positions that went through the model, the share that was padding."""
        return self.num_padding / self.num_positions if self.num_positions else 0.0

    @property
    def tokens_per_s(self) -> float:
        """New tokens over the time of passes."""
        return self.num_new_tokens / self.busy_s if self.busy_s else 0.0
