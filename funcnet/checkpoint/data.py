"""The tensors' data, written and read, with one CRC-32 for each block.

Up to eight threads compute the checksums while the file is written or read. A block is copied, and
the copy is both written and summed: another thread may change the tensor meanwhile.
"""

from __future__ import annotations

import errno
import mmap
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from funcnet.checkpoint.container import ALIGNMENT, BLOCK, Entry, Header, as_bytes, block_count
from funcnet.checkpoint.storable import check_memory
from funcnet.checkpoint.structure import CheckpointError, label

_Item = TypeVar("_Item")

_THREADS = min(8, os.cpu_count() or 1)

_GROUP = max(2**23, _THREADS * BLOCK)
"""Bytes to work on at a time: a block for each thread, and few enough for a cache."""


def write_data(
    file: BinaryIO, tensors: Mapping[str, Tensor], entries: Mapping[str, Entry]
) -> dict[str, str]:
    """Write the data and return their checksums.

    Raises ValueError for a tensor whose memory has been freed meanwhile.
    """
    checksums = dict.fromkeys(entries, "")
    with ThreadPoolExecutor(_THREADS) as pool:
        copied = (
            ([name for name, _ in group], _in_threads(_copy_and_sum, [b for _, b in group], pool))
            for group in _grouped(_blocks_of(tensors, entries), lambda item: len(item[1]))
        )
        for names, copies in _one_ahead(copied):
            for name, (copy, checksum) in zip(names, copies, strict=True):
                write_all(file, copy)
                checksums[name] += checksum
    return checksums


def read_data(file: BinaryIO, header: Header, *, mapped: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors in the order of the data, each checked against its checksum.

    A mapped tensor lies in a private memory map of the file. Raises CheckpointError.
    """
    view = _map(file) if mapped else None
    if view is not None and len(view) != header.size + header.data_size:
        raise CheckpointError("the file changed while it was read")
    with ThreadPoolExecutor(_THREADS) as pool:
        for group, found in _one_ahead(_read_groups(file, header, view, pool)):
            for (name, tensor, _), checksums in zip(group, found, strict=True):
                _check(name, checksums, header.checksums[name])
                yield name, tensor


def matches(file: BinaryIO, header: Header) -> bool:
    """Return whether all data match their checksums. Maps nothing, and keeps no tensor."""
    file.seek(header.size)
    in_order = _by_start(header.entries)
    blocks = (
        memoryview(file.read(min(BLOCK, entry.size - start)))
        for _, entry in in_order
        for start in range(0, entry.size, BLOCK)
    )
    with ThreadPoolExecutor(_THREADS) as pool:
        groups = (_in_threads(_sum, group, pool) for group in _grouped(blocks, len))
        found = "".join(chain.from_iterable(_one_ahead(groups)))
    return found == "".join(header.checksums[name] for name, _ in in_order)


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write to an unbuffered file, which may take only a part at a time."""
    data = memoryview(data)
    while data:
        count = file.write(data)
        if not count:
            raise OSError(errno.EIO, f"expected {len(data)} more bytes to be written, got none")
        data = data[count:]


def _blocks_of(
    tensors: Mapping[str, Tensor], entries: Mapping[str, Entry]
) -> Iterator[tuple[str, memoryview]]:
    """Yield the blocks of the data in their order, each behind the name of its tensor."""
    for name, _ in _by_start(entries):
        check_memory(name, tensors[name])
        for block in _cut(as_bytes(tensors[name])):
            yield name, block


def _by_start(entries: Mapping[str, Entry]) -> list[tuple[str, Entry]]:
    """Names and entries in the order of the data."""
    return sorted(entries.items(), key=lambda item: item[1].start)


def _grouped(items: Iterable[_Item], size_of: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    """Yield items some at a time, about `_GROUP` bytes."""
    group: list[_Item] = []
    size = 0
    for item in items:
        group.append(item)
        size += size_of(item)
        if size >= _GROUP:
            yield group
            group, size = [], 0
    yield group


def _cut(data: memoryview) -> Iterator[memoryview]:
    return (data[start : start + BLOCK] for start in range(0, len(data), BLOCK))


def _map(file: BinaryIO) -> memoryview | None:
    """Return a private memory map of the file, or None if it must be read instead."""
    try:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except (OSError, ValueError):  # a file system may lack maps; an empty file has none
        return None


def _read_groups(
    file: BinaryIO, header: Header, view: memoryview | None, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[tuple[str, Tensor, memoryview]], Iterator[str]]]:
    """Yield names, tensors and their bytes, with checksums that threads may still compute."""
    for entries in _grouped(_by_start(header.entries), lambda item: item[1].size):
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
    """Start to compute checksums, and return an iterator over those of each tensor."""
    found = _in_threads(_sum, [block for one in data for block in _cut(one)], pool)
    return ("".join(islice(found, block_count(len(one)))) for one in data)


def _sum(block: bytes | memoryview) -> str:
    return f"{zlib.crc32(block):08x}"


def _copy_and_sum(block: memoryview) -> tuple[bytes, str]:
    copy = bytes(block)
    return copy, _sum(copy)


def _in_threads(
    function: Callable[[memoryview], Any], blocks: Sequence[memoryview], pool: ThreadPoolExecutor
) -> Iterator[Any]:
    """Start to call a function with each block, and return an iterator over the results.

    The threads share all blocks, whether they belong to many tensors or to one.
    """

    def results_of(share: Sequence[memoryview]) -> list[Any]:
        return list(map(function, share))

    # To start threads takes longer than a checksum of one block.
    count = _THREADS if sum(map(len, blocks)) > BLOCK else 1
    shares = [blocks[first::count] for first in range(count)]
    parts: Iterable[list[Any]] = map(results_of, shares)
    if count > 1:
        with suppress(RuntimeError):  # no thread can be started while Python exits
            parts = pool.map(results_of, shares)
    return _in_order(parts, count, len(blocks))


def _in_order(parts: Iterable[list[Any]], count: int, size: int) -> Iterator[Any]:
    found: list[Any] = [None] * size
    for first, part in enumerate(parts):
        found[first::count] = part
    yield from found
