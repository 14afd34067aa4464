"""Do the books of all chunks together balance?"""

from __future__ import annotations

from collections.abc import Sequence

from gemini.chunk import Chunk


def check_chunks(chunks: Sequence[Chunk]) -> None:
    """Raises RuntimeError unless each chunk is sound, and each parameter in one chunk."""
    seen: set[int] = set()
    for position, chunk in enumerate(chunks):
        if chunk.index != position:
            raise RuntimeError(f"chunk {chunk.index} stands at position {position}")
        chunk.check_integrity()
        for tensor in chunk.tensors:
            if id(tensor.parameter) in seen:
                raise RuntimeError(f"parameter {tensor.name} is in two chunks")
            seen.add(id(tensor.parameter))
