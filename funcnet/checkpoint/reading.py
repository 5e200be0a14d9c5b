"""Reading the bytes that `funcnet.checkpoint.container` describes, and trusting none of them."""

from __future__ import annotations

import json
import math
import mmap
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from funcnet.checkpoint.checksums import BLOCK, block_count, digits, threads
from funcnet.checkpoint.container import (
    ALIGNMENT,
    CHECKSUM,
    DTYPES,
    KEYS,
    MAX_HEADER,
    MAX_RANK,
    MAX_VALUES,
    OPTIONAL_KEYS,
    PAIRED,
    PREFIX,
    VERSION,
    Entry,
    as_bytes,
    count_values,
    in_groups,
    torch_shape,
)
from funcnet.checkpoint.errors import CheckpointError
from funcnet.checkpoint.structure import Json, label, shorten, tensor_names


@dataclass(frozen=True)
class Header:
    """What stands before the data, checked: it is whole, and it fits the length of the file."""

    size: int
    entries: dict[str, Entry]
    checksums: dict[str, str]
    structure: Json
    architecture: Json
    metadata: Json


def read_header(file: BinaryIO) -> Header:
    """The header of a file, after all that can be checked without reading the data.

    Raises CheckpointError.
    """
    file_size = os.fstat(file.fileno()).st_size
    head = _read_head(file, file_size)
    content = _parse("the header", head[8:])
    metadata = _checked_metadata(content.pop("__metadata__"))
    entries = {name: _entry(name, value) for name, value in content.items()}
    _check_layout(entries, file_size - len(head))
    checksums = _parse("funcnet.crc32", metadata["funcnet.crc32"])
    header = Header(
        size=len(head),
        entries=entries,
        checksums=_checked_checksums(checksums, entries),
        structure=_parse("funcnet.structure", metadata["funcnet.structure"]),
        architecture=_parse_optional("funcnet.architecture", metadata),
        metadata=_parse_optional("funcnet.metadata", metadata),
    )
    _check_names(header)
    return header


def read_tensors(file: BinaryIO, header: Header, *, mapped: bool) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors in the order of the data, each checked against its checksum.

    A mapped tensor is a private memory map of the file, others are read into memory of their own.
    Raises CheckpointError.
    """
    view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)) if mapped else None
    data_end = header.size + max((entry.stop for entry in header.entries.values()), default=0)
    if view is not None and len(view) != data_end:
        raise CheckpointError("the file changed while it was read")
    with threads() as pool:
        groups = _groups(file, header, view, pool)
        for names, tensors, found in _one_ahead(groups):
            for name, tensor, checksums in zip(names, tensors, found, strict=True):
                _check(name, checksums, header.checksums[name])
                yield name, tensor


def _groups(
    file: BinaryIO, header: Header, view: memoryview | None, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[str], list[Tensor], Iterator[str]]]:
    """Names, tensors and their checksums, of which the last may still be in the making."""
    for group in in_groups(header.entries):
        tensors = [_tensor(name, entry, file, header, view) for name, entry in group]
        found = digits([data for _, data in tensors], pool)
        yield [name for name, _ in group], [tensor for tensor, _ in tensors], found


def _one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Each of the items, once the next has been asked for."""
    previous = next(items)
    for item in items:
        yield previous
        previous = item
    yield previous


def _tensor(
    name: str, entry: Entry, file: BinaryIO, header: Header, view: memoryview | None
) -> tuple[Tensor, memoryview]:
    """A tensor and its bytes: in the map of the file where it can stay there, else its own."""
    start = header.size + entry.start
    # torch's own memory is aligned, and some of its numbers depend on it.
    if view is not None and entry.size and start % ALIGNMENT == 0:
        data = view[start : start + entry.size]
        return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape), data
    tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    data = as_bytes(tensor)
    _read_into(data, file, start, name)
    return tensor, data


def _read_head(file: BinaryIO, file_size: int) -> bytes:
    head = file.read(CHECKSUM.stop)
    if head[8 : CHECKSUM.start] != PREFIX:
        raise CheckpointError(
            f"expected a file that funcnet wrote, got {_kind_of_file(head)} ({file_size} bytes)"
        )
    size = int.from_bytes(head[:8], "little")
    if not len(PREFIX) + 8 < size <= min(MAX_HEADER, file_size - 8):
        raise CheckpointError(
            f"the header: expected {size} bytes, {MAX_HEADER} at most, in a file of {file_size}: "
            "the file is truncated, or its first bytes are damaged"
        )
    head += file.read(8 + size - len(head))
    blank = head[: CHECKSUM.start] + b"0" * 8 + head[CHECKSUM.stop :]
    if len(head) != 8 + size or b"%08x" % zlib.crc32(blank) != head[CHECKSUM]:
        raise CheckpointError("the header does not match its checksum: the file is damaged")
    if count_values(head) > MAX_VALUES:
        raise CheckpointError(f"the header: expected at most {MAX_VALUES} values of JSON, got more")
    return head


def _kind_of_file(head: bytes) -> str:
    if not head:
        return "an empty one"
    if head[:2] == b"PK":
        return "a zip archive, perhaps of torch.save"
    if head[:1] == b"\x80":
        return "a pickle"
    if PREFIX.startswith(head[8:]):
        return "the first bytes of one, or of something else: it may be truncated"
    if head[8:9] == b"{":
        return "a safetensors file that funcnet did not write, or one whose first bytes are damaged"
    return "something else, or one whose first bytes are damaged"


def _parse(what: str, text: str | bytes) -> Any:
    try:
        # As a str: of bytes, json.loads would guess the encoding, and let half surrogates pass.
        text = str(text, "utf-8") if isinstance(text, bytes) else text
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_int64
        )
    except RecursionError:
        raise CheckpointError(f"{what}: expected JSON, got it nested too deep") from None
    except ValueError as error:
        raise CheckpointError(
            f"{what}: expected JSON, got an error: {shorten(str(error))}"
        ) from None


def _parse_optional(key: str, metadata: dict[str, str]) -> Any:
    return _parse(key, metadata[key]) if key in metadata else None


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(items)
    if len(values) != len(items):
        raise ValueError("a key appears twice in one object")
    return values


def _int64(digits: str) -> int:
    # Time to read a number grows with the square of its digits.
    if len(digits) > 20:
        raise ValueError(f"a number of more than 64 bits: {shorten(digits)}")
    return int(digits)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _checked_metadata(metadata: dict[str, Any]) -> dict[str, str]:
    version = metadata.get("funcnet.format")
    if version != VERSION:
        got = shorten(repr(version))
        raise CheckpointError(f"expected format {VERSION!r}, which this funcnet reads, got {got}")
    if not KEYS <= metadata.keys() <= KEYS | OPTIONAL_KEYS:
        raise CheckpointError(
            f"the metadata: expected {sorted(KEYS)}, got {shorten(str(sorted(metadata)))}"
        )
    if not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError("the metadata: expected texts, got other values")
    return metadata


def _entry(name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{label(name)}: expected dtype, shape and data_offsets, got {shorten(repr(value))}"
        )
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{label(name)}: expected a known dtype, got {shorten(repr(value['dtype']))}"
        )
    shape, offsets = value["shape"], value["data_offsets"]
    if not _are_sizes(shape) or len(shape) > MAX_RANK or _strides_overflow(shape):
        raise CheckpointError(
            f"{label(name)}: expected a shape that a tensor can have, got {shorten(repr(shape))}"
        )
    if dtype in PAIRED and (not shape or shape[-1] % 2):
        raise CheckpointError(f"{label(name)}: expected an even number in each row, got {shape}")
    own_shape = torch_shape(dtype, shape)
    size = math.prod(own_shape) * dtype.itemsize
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise CheckpointError(
            f"{label(name)}: expected data_offsets {size} bytes apart, got {shorten(repr(offsets))}"
        )
    return Entry(dtype, own_shape, *offsets)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and {*map(type, value)} <= {int} and min(value, default=0) >= 0


def _strides_overflow(shape: list[int]) -> bool:
    """Whether 64 bits are too few. torch computes strides as if sizes of 0 were 1."""
    return math.prod(filter(None, shape)) * 8 >= 2**63


def _check_layout(entries: dict[str, Entry], data_size: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise CheckpointError(
                f"{label(name)}: expected data to start at {end}, where other data ends, "
                f"got {entry.start}"
            )
        end = entry.stop
    if end != data_size:
        raise CheckpointError(
            f"expected {end} bytes of data, got {data_size}: "
            + ("the file is truncated" if data_size < end else "something was added to the file")
        )


def _checked_checksums(checksums: Any, entries: dict[str, Entry]) -> dict[str, str]:
    if not isinstance(checksums, dict) or checksums.keys() != entries.keys():
        raise CheckpointError("funcnet.crc32: expected a checksum for each tensor, got others")
    for name, text in checksums.items():
        if not isinstance(text, str) or len(text) != 8 * block_count(entries[name].size):
            got = shorten(repr(text))
            raise CheckpointError(f"{label(name)}: expected a CRC-32 a block, got {got}")
    return checksums


def _check_names(header: Header) -> None:
    """Every tensor of the file is one leaf of the tree; the network and the metadata have none."""
    names = list(tensor_names(header.structure))
    if len(names) != len(header.entries) or set(names) != header.entries.keys():
        raise CheckpointError(
            "funcnet.structure: expected each tensor of the file once, got others"
        )
    if header.architecture is not None and list(tensor_names(header.architecture)):
        raise CheckpointError("funcnet.architecture: expected no tensor, got one")
    if not isinstance(header.metadata, dict | None):
        raise CheckpointError(
            f"funcnet.metadata: expected an object, got {shorten(repr(header.metadata))}"
        )


def _read_into(data: memoryview, file: BinaryIO, start: int, name: str) -> None:
    file.seek(start)
    while data:
        count = file.readinto(data)  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{label(name)}: the file was truncated while it was read")
        data = data[count:]


def _check(name: str, found: str, expected: str) -> None:
    if found == expected:
        return
    blocks = [slice(start, start + 8) for start in range(0, len(expected), 8)]
    damaged = sum(found[block] != expected[block] for block in blocks)
    raise CheckpointError(
        f"{label(name)}: the data does not match its checksum: it is damaged "
        f"in {damaged} of its {len(blocks)} blocks of {BLOCK} bytes"
    )
