"""CRC-32s of tensors' data, one for each block, computed by as many threads as there are CPUs."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice

BLOCK = 2**22
"""Bytes that one CRC-32 covers."""


def threads() -> ThreadPoolExecutor:
    """Those that `digits` needs, to be closed after use."""
    return ThreadPoolExecutor(_count())


def block_count(size: int) -> int:
    """How many checksums data of this many bytes has."""
    return -(-size // BLOCK)


def digits(data: Sequence[memoryview], pool: ThreadPoolExecutor) -> Iterator[str]:
    """The checksums of each tensor's data, as a file has them. The threads start at once.

    They share out the blocks, be they many tensors' or one's.
    """
    blocks = [one[start : start + BLOCK] for one in data for start in range(0, len(one), BLOCK)]
    count = _count() if sum(map(len, blocks)) > BLOCK else 1  # a little is done sooner than shared
    shares = [blocks[first::count] for first in range(count)]
    parts: Iterable[list[int]] = map(_checksums, shares)
    if count > 1:
        with suppress(RuntimeError):  # where Python is about to end, no thread can be started
            parts = pool.map(_checksums, shares)
    return _in_order(data, parts, count)


def _count() -> int:
    return min(8, os.cpu_count() or 1)


def _checksums(blocks: list[memoryview]) -> list[int]:
    return [zlib.crc32(block) for block in blocks]


def _in_order(data: Sequence[memoryview], parts: Iterable[list[int]], count: int) -> Iterator[str]:
    found = [0] * sum(block_count(len(one)) for one in data)
    for first, part in enumerate(parts):
        found[first::count] = part
    rest = iter(found)
    for one in data:
        yield "".join(f"{checksum:08x}" for checksum in islice(rest, block_count(len(one))))
