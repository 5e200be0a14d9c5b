"""The tensors' data, written and read, with one CRC-32 for each block.

Up to eight threads compute the checksums while the file is written or read.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from mmap import ACCESS_COPY, mmap
from typing import Any, BinaryIO

import torch
from torch import Tensor

from funcnet.checkpoint.container import ALIGNMENT, BLOCK, Entry, Header, as_bytes, block_count
from funcnet.checkpoint.structure import CheckpointError, label

_GROUP = 2**23
"""Bytes to work on at a time: enough for many threads, few enough for a cache."""

_THREADS = min(8, os.cpu_count() or 1)


def write_data(
    file: BinaryIO, tensors: Mapping[str, Tensor], entries: Mapping[str, Entry]
) -> dict[str, str]:
    """Write the data and return their checksums. A tensor is copied only if it must be."""
    checksums = dict.fromkeys(entries, "")
    with ThreadPoolExecutor(_THREADS) as pool:
        for group in _groups(entries):
            data = [as_bytes(tensors[name]) for name, _ in group]
            found = _digits(data, pool)
            for one in data:
                write_all(file, one)
            checksums.update(zip((name for name, _ in group), found, strict=True))
    return checksums


def read_data(file: BinaryIO, header: Header, *, mapped: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors in the order of the data, each checked against its checksum.

    A mapped tensor lies in a private memory map of the file. Raises CheckpointError.
    """
    view = memoryview(mmap(file.fileno(), 0, access=ACCESS_COPY)) if mapped else None
    if view is not None and len(view) != header.size + header.data_size:
        raise CheckpointError("the file changed while it was read")
    with ThreadPoolExecutor(_THREADS) as pool:
        for group, found in _one_ahead(_read_groups(file, header, view, pool)):
            for (name, tensor, _), checksums in zip(group, found, strict=True):
                _check(name, checksums, header.checksums[name])
                yield name, tensor


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write to an unbuffered file, which may take only a part at a time."""
    data = memoryview(data)
    while data:
        data = data[file.write(data) :]


def _groups(entries: Mapping[str, Entry]) -> Iterator[list[tuple[str, Entry]]]:
    """Yield names and entries in the order of the data, some at a time."""
    group, size = [], 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        group.append((name, entry))
        size += entry.size
        if size >= _GROUP:
            yield group
            group, size = [], 0
    yield group


def _read_groups(
    file: BinaryIO, header: Header, view: memoryview | None, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[tuple[str, Tensor, memoryview]], Iterator[str]]]:
    """Yield names, tensors and their bytes, with checksums that threads may still compute."""
    for entries in _groups(header.entries):
        group = [(name, *_read(name, entry, file, header, view)) for name, entry in entries]
        yield group, _digits([data for _, _, data in group], pool)


def _one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yield each item after the next has been fetched."""
    previous = next(items)
    for item in items:
        yield previous
        previous = item
    yield previous


def _read(
    name: str, entry: Entry, file: BinaryIO, header: Header, view: memoryview | None
) -> tuple[Tensor, memoryview]:
    """Return a tensor and its bytes, in the memory map if it is aligned there."""
    start = header.size + entry.start
    if view is not None and entry.size and start % ALIGNMENT == 0:
        data = view[start : start + entry.size]
        return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape), data
    tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    data = rest = as_bytes(tensor)
    file.seek(start)
    while rest:
        count = file.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{label(name)}: the file was truncated while it was read")
        rest = rest[count:]
    return tensor, data


def _check(name: str, found: str, expected: str) -> None:
    if found == expected:
        return
    blocks = [slice(start, start + 8) for start in range(0, len(expected), 8)]
    damaged = sum(found[block] != expected[block] for block in blocks)
    raise CheckpointError(
        f"{label(name)}: the data does not match its checksum: it is damaged "
        f"in {damaged} of its {len(blocks)} blocks of {BLOCK} bytes"
    )


def _digits(data: Sequence[memoryview], pool: ThreadPoolExecutor) -> Iterator[str]:
    """Start to compute checksums, and return an iterator over those of each tensor.

    The threads share all blocks, whether they belong to many tensors or to one.
    """
    blocks = [one[start : start + BLOCK] for one in data for start in range(0, len(one), BLOCK)]
    # To start threads takes longer than a checksum of one block.
    count = _THREADS if sum(map(len, blocks)) > BLOCK else 1
    shares = [blocks[first::count] for first in range(count)]
    parts: Iterable[list[int]] = map(_checksums, shares)
    if count > 1:
        with suppress(RuntimeError):  # no thread can be started while Python exits
            parts = pool.map(_checksums, shares)
    return _in_order(data, parts, count)


def _checksums(blocks: list[memoryview]) -> list[int]:
    return [zlib.crc32(block) for block in blocks]


def _in_order(data: Sequence[memoryview], parts: Iterable[list[int]], count: int) -> Iterator[str]:
    found = [0] * sum(block_count(len(one)) for one in data)
    for first, part in enumerate(parts):
        found[first::count] = part
    rest = iter(found)
    for one in data:
        yield "".join(f"{checksum:08x}" for checksum in islice(rest, block_count(len(one))))
