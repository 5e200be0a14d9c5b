"""The bytes of a file: a safetensors file whose every bit is covered by a checksum.

A safetensors file is an 8-byte little-endian length N, a header of N bytes of JSON padded with
spaces, and the tensors' data: row-major, little-endian, end to end. See
https://github.com/huggingface/safetensors. funcnet's begin with

    {"__metadata__":{"funcnet.header_crc32":"1a2b3c4d",…

and their metadata, texts all, are

    funcnet.header_crc32  the CRC-32 (that of zip and PNG; eight hexadecimal digits) of the first
                          8 + N bytes of the file with these eight digits replaced by zeros
    funcnet.format        "1", the version of all this
    format                "pt", which some readers want
    funcnet.structure     the tree without its tensors: see funcnet.checkpoint.structure
    funcnet.crc32         a JSON object that gives, for each tensor, the CRC-32s of its data, one
                          after the other: one for each 4 MiB block, of which the last may be
                          shorter, and none for a tensor without elements
    funcnet.architecture  in files of `save_model`: the network, in the same JSON as the structure
    funcnet.metadata      the user's metadata, in JSON

JSON is written without spaces and in UTF-8, entries in the order of the tree, `__metadata__` first.
N + 8 is a multiple of 64. In the data come first the tensors whose size is a multiple of 64 bytes,
so that they all start at one; then the others, of wide dtypes first; else in the order of the tree.
CRC-32 is certain to find one flipped bit, or any damage within 32 consecutive bits, and misses
other damage once in four thousand million.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from funcnet.checkpoint.errors import CheckpointError
from funcnet.checkpoint.structure import MAX_NODES, tensor_names

MAX_HEADER = 100_000_000
"""The longest header that safetensors readers accept."""

BLOCK = 2**22
"""Bytes that one CRC-32 covers."""

_VERSION = "1"
_PREFIX = b'{"__metadata__":{"funcnet.header_crc32":"'
_CHECKSUM = slice(8 + len(_PREFIX), 8 + len(_PREFIX) + 8)
_ALIGNMENT = 64  # torch's own: the same numbers at another alignment may give other roundings
_KEYS = {"funcnet.header_crc32", "funcnet.format", "format", "funcnet.structure", "funcnet.crc32"}
_OPTIONAL_KEYS = {"funcnet.architecture", "funcnet.metadata"}
_MAX_VALUES = 20 * MAX_NODES
_MAX_RANK = 64

_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "int64": "I64",
    "uint64": "U64",
    "float64": "F64",
    "complex64": "C64",
}
# Older versions of torch lack the newest of them.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, dtype) for dtype, name in _NAMES.items() if hasattr(torch, dtype)
}
"""The dtypes that files can hold, by the names that safetensors has for them."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Entry:
    """One tensor in the file: `start` and `stop` count from the beginning of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What stands before the data, checked: it is whole, and it fits the length of the file."""

    size: int
    entries: dict[str, Entry]
    checksums: dict[str, str]
    structure: Any
    architecture: Any
    metadata: Any


def can_hold(dtype: torch.dtype) -> bool:
    """Whether safetensors has a name for the dtype."""
    return dtype in _DTYPE_NAMES


# --- Writing


class Writer:
    """Lays the file out, and refuses what is too large, before a byte is written."""

    def __init__(self, tensors: Mapping[str, Tensor], texts: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self._texts = {key: _to_json(value) for key, value in texts.items()}
        self._entries = _lay_out(tensors)
        # Checksums are of fixed width: the header's size is known before the data's checksums are.
        blanks = {name: "0" * 8 * _blocks(entry) for name, entry in self._entries.items()}
        self._size = len(self._header(blanks))

    def write(self, file: BinaryIO) -> None:
        """Write data, then the header before it. Each tensor is copied only where it must be."""
        file.seek(self._size)
        checksums = dict.fromkeys(self._entries, "")
        with ThreadPoolExecutor(_threads()) as pool:
            for name, _ in sorted(self._entries.items(), key=lambda item: item[1].start):
                data = as_bytes(self._tensors[name])
                blocks = _in_blocks(data)
                found = pool.map(zlib.crc32, blocks) if len(blocks) > 1 else map(zlib.crc32, blocks)
                for block in blocks:
                    _write_all(file, block)
                checksums[name] = _digits(found)
        file.seek(0)
        _write_all(file, memoryview(self._header(checksums)))

    def _header(self, checksums: dict[str, str]) -> bytes:
        metadata = {"funcnet.header_crc32": "0" * 8, "funcnet.format": _VERSION, "format": "pt"}
        metadata |= self._texts
        metadata["funcnet.crc32"] = _to_json(checksums)
        content: dict[str, Any] = {"__metadata__": metadata}
        for name, entry in self._entries.items():
            content[name] = {
                "dtype": _DTYPE_NAMES[entry.dtype],
                "shape": entry.shape,
                "data_offsets": [entry.start, entry.stop],
            }
        text = _to_json(content).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        if len(text) > MAX_HEADER or _count_values(text) > _MAX_VALUES:
            raise ValueError(
                f"expected names and structure of at most {MAX_HEADER} bytes and {_MAX_VALUES} "
                f"values of JSON, got {len(text)} and {_count_values(text)}"
            )
        header = bytearray(len(text).to_bytes(8, "little") + text)
        header[_CHECKSUM] = b"%08x" % zlib.crc32(header)
        return bytes(header)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major: its own memory where it lies so on the CPU, else a copy."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    # Copies are made of integers, since copying may change the payload of a NaN.
    bits = tensor.view(_BITS[tensor.dtype.itemsize]).cpu().contiguous()
    return memoryview(bits.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _lay_out(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    def aligned_first(name: str) -> tuple[bool, int]:
        return tensors[name].nbytes % _ALIGNMENT != 0, -tensors[name].dtype.itemsize

    starts = {}
    end = 0
    for name in sorted(tensors, key=aligned_first):
        starts[name] = end
        end += tensors[name].nbytes
    return {
        name: Entry(tensor.dtype, tuple(tensor.shape), starts[name], starts[name] + tensor.nbytes)
        for name, tensor in tensors.items()
    }


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


# --- Reading


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
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if mapped else None
    with ThreadPoolExecutor(_threads()) as pool:
        for name, entry in sorted(header.entries.items(), key=lambda item: item[1].start):
            start = header.size + entry.start
            # torch's own memory is aligned, and some of its numbers depend on it.
            if memory is not None and entry.start < entry.stop and start % _ALIGNMENT == 0:
                count = math.prod(entry.shape)
                tensor = torch.frombuffer(memory, dtype=entry.dtype, count=count, offset=start)
                tensor = tensor.reshape(entry.shape)
            else:
                tensor = _read_copy(file, start, entry, name)
            _check_data(tensor, header.checksums[name], name, pool)
            yield name, tensor


def _read_head(file: BinaryIO, file_size: int) -> bytes:
    head = file.read(_CHECKSUM.stop)
    if head[8 : _CHECKSUM.start] != _PREFIX:
        raise CheckpointError(
            f"expected a file that funcnet wrote, got {_kind_of_file(head)} ({file_size} bytes)"
        )
    size = int.from_bytes(head[:8], "little")
    if not len(_PREFIX) + 8 < size <= min(MAX_HEADER, file_size - 8):
        raise CheckpointError(
            f"the header: expected {size} bytes, {MAX_HEADER} at most, in a file of {file_size}: "
            "the file is truncated, or its first bytes are damaged"
        )
    head += file.read(8 + size - len(head))
    blank = head[: _CHECKSUM.start] + b"0" * 8 + head[_CHECKSUM.stop :]
    if len(head) != 8 + size or b"%08x" % zlib.crc32(blank) != head[_CHECKSUM]:
        raise CheckpointError("the header does not match its checksum: the file is damaged")
    if _count_values(head) > _MAX_VALUES:
        raise CheckpointError(
            f"the header: expected at most {_MAX_VALUES} values of JSON, got more"
        )
    return head


def _kind_of_file(head: bytes) -> str:
    if not head:
        return "an empty one"
    if head[:2] == b"PK":
        return "a zip archive, perhaps of torch.save"
    if head[:1] == b"\x80":
        return "a pickle"
    if head[8:9] == b"{":
        return "a safetensors file that funcnet did not write, or one whose first bytes are damaged"
    return "something else, or one whose first bytes are damaged"


def _parse(what: str, text: str | bytes) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise CheckpointError(f"{what}: expected JSON, got it nested too deep") from None
    except ValueError as error:
        raise CheckpointError(f"{what}: expected JSON, got an error: {error}") from None


def _parse_optional(key: str, metadata: dict[str, str]) -> Any:
    return _parse(key, metadata[key]) if key in metadata else None


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(items)
    if len(values) != len(items):
        raise ValueError("a key appears twice in one object")
    return values


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _checked_metadata(metadata: dict[str, Any]) -> dict[str, str]:
    version = metadata.get("funcnet.format")
    if version != _VERSION:
        raise CheckpointError(
            f"expected format {_VERSION}, which this version of funcnet reads, got {version!r}"
        )
    if not _KEYS <= metadata.keys() <= _KEYS | _OPTIONAL_KEYS:
        raise CheckpointError(f"the metadata: expected {sorted(_KEYS)}, got {sorted(metadata)}")
    if not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError("the metadata: expected texts, got other values")
    return metadata


def _entry(name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{name}: expected dtype, shape and data_offsets, got {value!r}")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{name}: expected a known dtype, got {value['dtype']!r}")
    shape, offsets = value["shape"], value["data_offsets"]
    # torch computes strides as if sizes of 0 were 1.
    if not _are_sizes(shape) or len(shape) > _MAX_RANK or _bytes_of(shape, 8, least=1) >= 2**63:
        raise CheckpointError(f"{name}: expected a shape that a tensor can have, got {shape!r}")
    size = _bytes_of(shape, dtype.itemsize)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise CheckpointError(f"{name}: expected data_offsets {size} bytes apart, got {offsets!r}")
    return Entry(dtype, tuple(shape), *offsets)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _bytes_of(shape: list[int], itemsize: int, least: int = 0) -> int:
    return math.prod(max(size, least) for size in shape) * itemsize


def _check_layout(entries: dict[str, Entry], data_size: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise CheckpointError(
                f"{name}: expected data to start at {end}, where other data ends, got {entry.start}"
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
    for name, digits in checksums.items():
        if not isinstance(digits, str) or len(digits) != 8 * _blocks(entries[name]):
            raise CheckpointError(
                f"{name}: expected a checksum for each {BLOCK} bytes, got {digits!r}"
            )
    return checksums


def _check_names(header: Header) -> None:
    """Every tensor of the file is one leaf of the tree; the network and the metadata have none."""
    names = list(tensor_names(header.structure))
    if len(names) != len(header.entries) or set(names) != header.entries.keys():
        raise CheckpointError(
            "funcnet.structure: expected each tensor of the file once, got others"
        )
    if header.architecture is not None and any(tensor_names(header.architecture)):
        raise CheckpointError("funcnet.architecture: expected no tensor, got one")
    if not isinstance(header.metadata, dict | None):
        raise CheckpointError(f"funcnet.metadata: expected an object, got {header.metadata!r}")


def _read_copy(file: BinaryIO, start: int, entry: Entry, name: str) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    file.seek(start)
    missing = as_bytes(tensor)
    while missing:
        count = file.readinto(missing)  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{name}: the file was truncated while it was read")
        missing = missing[count:]
    return tensor


def _check_data(tensor: Tensor, checksums: str, name: str, pool: ThreadPoolExecutor) -> None:
    blocks = _in_blocks(as_bytes(tensor))
    found = _digits(pool.map(zlib.crc32, blocks) if len(blocks) > 1 else map(zlib.crc32, blocks))
    if found == checksums:
        return
    damaged = [
        i for i in range(len(blocks)) if found[8 * i : 8 * i + 8] != checksums[8 * i : 8 * i + 8]
    ]
    raise CheckpointError(
        f"{name}: the data does not match its checksum: it is damaged "
        f"in {len(damaged)} of its {len(blocks)} blocks of {BLOCK} bytes"
    )


# --- Both


def _blocks(entry: Entry) -> int:
    return -(-(entry.stop - entry.start) // BLOCK)


def _in_blocks(data: memoryview) -> list[memoryview]:
    return [data[start : start + BLOCK] for start in range(0, len(data), BLOCK)]


def _digits(checksums: Any) -> str:
    return "".join(f"{checksum:08x}" for checksum in checksums)


def _count_values(text: bytes) -> int:
    """No fewer values than the JSON has, counted without parsing it."""
    return sum(text.count(mark) for mark in (b",", b":", b"[", b"{"))


def _threads() -> int:
    return min(8, os.cpu_count() or 1)
