"""What the C library's allocator keeps, and how to make it give memory back.

glibc keeps freed blocks of up to 32 MiB for later. An aligned request (all of torch's) cannot reuse a hole of its own
length, so buffers that are taken and given back again and again leave the heap full of holes: measured, 400 MB beside
24 equal chunks. Other C libraries do without all this, and the functions here do nothing for them.

Source: https://sourceware.org/glibc/manual/latest/html_node/Malloc-Tunable-Parameters.html
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from collections.abc import Iterator

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
LARGE_BYTES = 1 << 20
"""From where on a block's whereabouts matter."""
HUGE_PAGE_BYTES = 2 << 20
# Where glibc's own adaptive thresholds end in a process that frees large tensors.
_USUAL_MMAP_BYTES = 32 << 20
_USUAL_TRIM_BYTES = 64 << 20
_TIDY_MMAP_BYTES = 4 << 20
_num_tidy = 0


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc."""
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "gnu_get_libc_version") else None
    except (OSError, TypeError):
        return None


def give_back_free_memory() -> None:
    """Returns to the operating system what the allocator keeps free."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@contextlib.contextmanager
def own_mapping(num_bytes: int) -> Iterator[None]:
    """Inside, a large block of ``num_bytes`` gets a mapping of its own, which goes when it is freed.

    Unless a hole that is long enough lies in the heap. Not for computation: a fresh mapping costs a page fault for
    every 4 KiB.
    """
    library = _glibc()
    if library is None or num_bytes < LARGE_BYTES:
        yield
        return
    library.mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
    try:
        yield
    finally:
        _restore(library)


def begin_tidy() -> None:
    """From now on blocks from 4 MiB get mappings of their own, those of computation too, until :func:`end_tidy`.

    For whoever computes where the model lies: weights' gradients and gathered chunks that come and go leave a heap of
    holes, a fifth of all that a process holds. The page faults cost what shows only where such blocks are made again
    and again: what is exchanged with other ranks goes in smaller pieces.
    """
    _change_tidy(1)


def end_tidy() -> None:
    """Undoes one :func:`begin_tidy`."""
    _change_tidy(-1)


def _change_tidy(change: int) -> None:
    global _num_tidy
    _num_tidy += change
    library = _glibc()
    if library is not None:
        _restore(library)


def _restore(library: ctypes.CDLL) -> None:
    library.mallopt(_M_MMAP_THRESHOLD, _TIDY_MMAP_BYTES if _num_tidy else _USUAL_MMAP_BYTES)
    library.mallopt(_M_TRIM_THRESHOLD, _USUAL_TRIM_BYTES)


def prefer_huge_pages(address: int, num_bytes: int) -> None:
    """Asks for pages of 2 MiB under a large block that nobody has touched yet: a page fault costs about 2 us.

    Only a wish: other systems, or a kernel that is set otherwise, leave things as they are.
    """
    library = _glibc()
    start = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    length = (address + num_bytes - start) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if library is not None and length > 0 and hasattr(mmap, "MADV_HUGEPAGE"):
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
