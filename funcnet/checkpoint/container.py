"""The bytes of a file: a safetensors file whose every bit is covered by a checksum.

A safetensors file is an 8-byte little-endian length N, a header of N bytes of JSON padded with
spaces, and the tensors' data: row-major, little-endian, end to end. See
https://github.com/huggingface/safetensors. A file of funcnet begins, after the length, with

    {"__metadata__":{"funcnet.header_crc32":"1a2b3c4d",…

The values of the metadata are strings:

    funcnet.header_crc32  the CRC-32 (that of zip and PNG; eight hexadecimal digits) of the first
                          8 + N bytes of the file with these eight digits replaced by zeros
    funcnet.format        "1", the version of this format
    format                "pt", which some readers require
    funcnet.structure     the tree without its tensors: see funcnet.checkpoint.structure
    funcnet.architecture  in files of `save_model`: the network, in the same JSON as the structure
    funcnet.metadata      the user's metadata, in JSON, if there is any
    funcnet.crc32         a JSON object that gives, for each tensor, the CRC-32s of its data, one
                          after the other: one for each 4 MiB block, of which the last may be
                          shorter, and none for a tensor without elements

JSON is written without spaces, in UTF-8 and in the order of the tree, `__metadata__` first. N + 8
is a multiple of 64. The data begin with the tensors whose size is a multiple of 64 bytes, so each
of these starts at a multiple of 64. The others follow. Both groups are sorted by the size of their
elements, the largest first, then by the order of the tree.

A CRC-32 finds every flipped bit and all damage within 32 consecutive bits. It misses other damage
with a probability of 2⁻³².
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from funcnet.checkpoint.structure import (
    MAX_NODES,
    CheckpointError,
    Node,
    label,
    parse,
    shorten,
    unexpected,
    walk,
)

MAX_HEADER = 100_000_000
"""The longest header that safetensors readers accept."""

MAX_VALUES = 20 * MAX_NODES
"""The most JSON values in a header."""

MAX_RANK = 64
"""The most dimensions of a tensor. Most functions of torch have this limit."""

BLOCK = 2**22
"""The bytes that one CRC-32 covers."""

ALIGNMENT = 64  # torch's own: numbers at another alignment may be rounded otherwise
_VERSION = "1"
_PREFIX = b'{"__metadata__":{"funcnet.header_crc32":"'
_CHECKSUM = slice(8 + len(_PREFIX), 8 + len(_PREFIX) + 8)
_KEYS = {"funcnet.header_crc32", "funcnet.format", "format", "funcnet.structure", "funcnet.crc32"}
_OPTIONAL_KEYS = {"funcnet.architecture", "funcnet.metadata"}

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""The dtypes that files can hold, by their names in safetensors."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PAIRED = {torch.float4_e2m1fn_x2}
"""The dtypes with two numbers in a byte. safetensors counts the numbers, torch counts the pairs."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Entry(NamedTuple):
    """One tensor in a file. `start` and `stop` count bytes from the beginning of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """The content of the bytes before the data. `size` counts them, `data_size` the others."""

    size: int
    data_size: int
    entries: dict[str, Entry]
    checksums: dict[str, str]
    structure: Node
    architecture: Node | None
    metadata: dict[str, Any] | None


def as_integers(tensor: Tensor) -> Tensor:
    """Return a view of a tensor as integers, whose copies keep every bit; NaNs may change."""
    return tensor.view(_INTEGERS[tensor.dtype.itemsize])


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, row-major: its own memory if it can serve, else a copy."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    bits = as_integers(tensor).cpu().contiguous().reshape(-1)
    if bits.stride() != (1,):  # a single element, or none, may have any stride
        bits = bits.clone(memory_format=torch.contiguous_format)
    return memoryview(bits.view(torch.uint8).numpy())  # type: ignore[arg-type]


def block_count(size: int) -> int:
    """Return the number of checksums of this many bytes."""
    return -(-size // BLOCK)


# Each function that writes a part of the header stands before the one that reads it.


def build_header(
    entries: Mapping[str, Entry], checksums: Mapping[str, str], strings: Mapping[str, str]
) -> bytes:
    """Return the bytes before the data. Raises ValueError if a reader would refuse them."""
    metadata = {"funcnet.header_crc32": "0" * 8, "funcnet.format": _VERSION, "format": "pt"}
    metadata |= {**strings, "funcnet.crc32": to_json(checksums)}
    content = {name: _entry_to_json(entry) for name, entry in entries.items()}
    text = to_json({"__metadata__": metadata, **content}).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER or _count_values(text) > MAX_VALUES:
        raise ValueError(
            f"expected names and structure of at most {MAX_HEADER} bytes and {MAX_VALUES} "
            f"values of JSON, got {len(text)} and {_count_values(text)}"
        )
    header = bytearray(len(text).to_bytes(8, "little") + text)
    header[_CHECKSUM] = b"%08x" % zlib.crc32(header)
    return bytes(header)


def read_header(file: BinaryIO) -> Header:
    """Read and check a file's header and length. Raises CheckpointError."""
    file_size = os.fstat(file.fileno()).st_size
    head = _read_head(file, file_size)
    content = _from_json("the header", head[8:])
    metadata = content.pop("__metadata__")
    _check_keys(metadata)
    entries = {name: _entry_from_json(name, value) for name, value in content.items()}
    _check_layout(entries, file_size - len(head))

    def value(key: str) -> Any:
        return _from_json(key, metadata[key]) if key in metadata else None

    architecture = value("funcnet.architecture")
    header = Header(
        size=len(head),
        data_size=file_size - len(head),
        entries=entries,
        checksums=value("funcnet.crc32"),
        structure=parse(value("funcnet.structure")),
        architecture=None if architecture is None else parse(architecture),
        metadata=value("funcnet.metadata"),
    )
    _check_values(header)
    return header


def _read_head(file: BinaryIO, file_size: int) -> bytes:
    head = file.read(_CHECKSUM.stop)
    if head[8 : _CHECKSUM.start] != _PREFIX:
        raise CheckpointError(
            f"expected a file that funcnet wrote, got {_guess(head)} ({file_size} bytes)"
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
    if _count_values(head) > MAX_VALUES:
        raise CheckpointError(f"the header: expected at most {MAX_VALUES} values of JSON, got more")
    return head


def _guess(head: bytes) -> str:
    """Return what the file may be that begins with these bytes."""
    if not head:
        return "an empty one"
    if head[:2] == b"PK":
        return "a zip archive, perhaps of torch.save"
    if head[:1] == b"\x80":
        return "a pickle"
    if _PREFIX.startswith(head[8:]):
        return "the first bytes of one, or something else: the file may be truncated"
    if head[8:9] == b"{":
        return "a safetensors file that funcnet did not write, or one whose first bytes are damaged"
    return "something else, or one whose first bytes are damaged"


def _count_values(text: bytes) -> int:
    """Return an upper bound of the number of JSON values, without parsing."""
    return sum(text.count(mark) for mark in (b",", b":", b"[", b"{"))


def to_json(value: Any) -> str:
    """Return JSON without spaces."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _from_json(what: str, text: str | bytes) -> Any:
    try:
        # json.loads would guess the encoding of bytes, and accept half of a surrogate pair.
        text = str(text, "utf-8") if isinstance(text, bytes) else text
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_int64
        )
        if r"\ud" in text or r"\uD" in text:
            to_json(value).encode()  # an escape may stand for half of a pair as well
        return value
    except RecursionError:
        raise CheckpointError(f"{what}: expected JSON, got it nested too deep") from None
    except ValueError as error:
        raise CheckpointError(
            f"{what}: expected JSON, got an error: {shorten(str(error))}"
        ) from None


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(items)
    if len(values) != len(items):
        raise ValueError("a key appears twice in one object")
    return values


def _int64(digits: str) -> int:
    # The time to read a number grows with the square of its digits.
    if len(digits) > 20:
        raise ValueError(f"a number of more than 64 bits: {shorten(digits)}")
    return int(digits)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    shape = entry.shape
    if entry.dtype in PAIRED:
        shape = (*shape[:-1], 2 * shape[-1])
    offsets = [entry.start, entry.stop]
    return {"dtype": DTYPE_NAMES[entry.dtype], "shape": shape, "data_offsets": offsets}


def _entry_from_json(name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise unexpected(name, "dtype, shape and data_offsets", value)
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise unexpected(name, "a known dtype", value["dtype"])
    shape, offsets = value["shape"], value["data_offsets"]
    if not _are_sizes(shape) or len(shape) > MAX_RANK or _strides_overflow(shape):
        raise unexpected(name, "a shape that a tensor can have", shape)
    if dtype in PAIRED:
        if not shape or shape[-1] % 2:
            raise CheckpointError(
                f"{label(name)}: expected an even number in each row, got {shape}"
            )
        shape = [*shape[:-1], shape[-1] // 2]
    size = math.prod(shape) * dtype.itemsize
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise unexpected(name, f"data_offsets {size} bytes apart", offsets)
    return Entry(dtype, tuple(shape), *offsets)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and {*map(type, value)} <= {int} and min(value, default=0) >= 0


def _strides_overflow(shape: list[int]) -> bool:
    # torch computes strides as if a size of 0 were 1.
    return math.prod(filter(None, shape)) * 8 >= 2**63


def lay_out(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Return the entries of tensors, in their order."""

    def aligned_first(name: str) -> tuple[bool, int]:
        return tensors[name].nbytes % ALIGNMENT != 0, -tensors[name].dtype.itemsize

    entries = dict[str, Entry]()
    end = 0
    for name in sorted(tensors, key=aligned_first):
        start, end = end, end + tensors[name].nbytes
        entries[name] = Entry(tensors[name].dtype, tuple(tensors[name].shape), start, end)
    return {name: entries[name] for name in tensors}


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


def _check_keys(metadata: dict[str, Any]) -> None:
    version = metadata.get("funcnet.format")
    if version != _VERSION:
        got = shorten(repr(version))
        raise CheckpointError(f"expected format {_VERSION!r}, which this funcnet reads, got {got}")
    if not _KEYS <= metadata.keys() <= _KEYS | _OPTIONAL_KEYS:
        raise unexpected("the metadata", str(sorted(_KEYS)), sorted(metadata))
    if not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("the metadata: expected every value to be a str, got another type")


def _check_values(header: Header) -> None:
    """Raise CheckpointError unless each tensor has a checksum and is one leaf of the tree."""
    checksums, entries = header.checksums, header.entries
    if not isinstance(checksums, dict) or checksums.keys() != entries.keys():
        raise CheckpointError("funcnet.crc32: expected a checksum for each tensor, got others")
    for name, digits in checksums.items():
        if not isinstance(digits, str) or len(digits) != 8 * block_count(entries[name].size):
            raise unexpected(name, "a CRC-32 for each block", digits)
    names = [node.entry for node in walk(header.structure) if node.entry is not None]
    if len(names) != len(entries) or set(names) != entries.keys():
        raise CheckpointError(
            "funcnet.structure: expected each tensor of the file once, got others"
        )
    if header.architecture and any(node.entry is not None for node in walk(header.architecture)):
        raise CheckpointError("funcnet.architecture: expected no tensor, got one")
    if not isinstance(header.metadata, dict | None):
        raise unexpected("funcnet.metadata", "an object", header.metadata)
