"""How the disk tier should reach its file: mapped, or read and written by threads, through the page cache or around it.

    python benchmarks/disk_tier.py --folder FOLDER [--gib 1] [--rounds 3]

Each way reads, changes and writes all of a file, and ends when everything is on the disk. The ways alternate.
"""

from __future__ import annotations

import argparse
import mmap
import os
import queue
import tempfile
import threading
import time

import numpy as np

BLOCK_BYTES = 16 << 20


def by_mapping(path: str, num_bytes: int) -> None:
    """One mapping, read ahead a block at a time."""
    descriptor = os.open(path, os.O_RDWR)
    mapping = mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED)
    for start in range(0, num_bytes, BLOCK_BYTES):
        if start + BLOCK_BYTES < num_bytes:
            mapping.madvise(mmap.MADV_WILLNEED, start + BLOCK_BYTES, min(BLOCK_BYTES, num_bytes - start - BLOCK_BYTES))
        values = np.frombuffer(mapping, np.float32, min(BLOCK_BYTES, num_bytes - start) // 4, start)
        values *= np.float32(1.000001)
        del values
    os.fsync(descriptor)
    mapping.close()
    os.close(descriptor)


def by_threads(path: str, num_bytes: int, flags: int) -> None:
    """One thread reads ahead, one writes behind."""
    descriptor = os.open(path, os.O_RDWR | flags)
    free: queue.Queue[mmap.mmap] = queue.Queue()
    ready: queue.Queue[tuple[int, mmap.mmap]] = queue.Queue()
    changed: queue.Queue[tuple[int, mmap.mmap]] = queue.Queue()
    for _ in range(6):
        free.put(mmap.mmap(-1, BLOCK_BYTES))  # aligned as direct input and output wants it
    starts = range(0, num_bytes, BLOCK_BYTES)

    def read() -> None:
        for start in starts:
            buffer = free.get()
            os.preadv(descriptor, [buffer], start)
            ready.put((start, buffer))

    def write() -> None:
        for _ in starts:
            start, buffer = changed.get()
            os.pwritev(descriptor, [buffer], start)
            free.put(buffer)

    threads = [threading.Thread(target=read), threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    for _ in starts:
        start, buffer = ready.get()
        values = np.frombuffer(buffer, np.float32)
        values *= np.float32(1.000001)
        changed.put((start, buffer))
    for thread in threads:
        thread.join()
    os.fsync(descriptor)
    os.close(descriptor)


def main() -> None:
    """Prints GB/s, both directions together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=".")
    parser.add_argument("--gib", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    num_bytes = options.gib << 30
    ways = {
        "mapped": lambda path: by_mapping(path, num_bytes),
        "buffered": lambda path: by_threads(path, num_bytes, 0),
        "direct": lambda path: by_threads(path, num_bytes, os.O_DIRECT),
    }
    with tempfile.NamedTemporaryFile(dir=options.folder) as file:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
        for _ in range(options.rounds):
            for name, way in ways.items():
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, num_bytes, os.POSIX_FADV_DONTNEED)
                began_s = time.perf_counter()
                way(file.name)
                print(f"{name:<9} {2 * num_bytes / (time.perf_counter() - began_s) / 1e9:.2f} GB/s", flush=True)


if __name__ == "__main__":
    main()
