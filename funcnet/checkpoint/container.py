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
so that each of them starts at such a multiple; then the others, of wide dtypes first; else in the
order of the tree. CRC-32 is certain to find one flipped bit, or any damage within 32
consecutive bits, and misses other damage once in four thousand million.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funcnet.checkpoint.structure import MAX_NODES

MAX_HEADER = 100_000_000
"""The longest header that safetensors readers accept."""

MAX_VALUES = 20 * MAX_NODES
"""The most values of JSON in a header."""

MAX_RANK = 64
"""The most dimensions of a tensor, torch's own limit for most of what it does."""

_GROUP = 2**23
"""Bytes to work on at a time: enough for many threads, little enough to stay in a cache."""

VERSION = "1"
PREFIX = b'{"__metadata__":{"funcnet.header_crc32":"'
CHECKSUM = slice(8 + len(PREFIX), 8 + len(PREFIX) + 8)
ALIGNMENT = 64  # torch's own: the same numbers at another alignment may give other roundings
KEYS = {"funcnet.header_crc32", "funcnet.format", "format", "funcnet.structure", "funcnet.crc32"}
OPTIONAL_KEYS = {"funcnet.architecture", "funcnet.metadata"}

_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float4_e2m1fn_x2": "F4",
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

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PAIRED = {DTYPES[name] for name in ("F4",) if name in DTYPES}
"""dtypes with two numbers to a byte, which safetensors counts one by one, and torch in pairs."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Entry(NamedTuple):
    """One tensor in the file: `start` and `stop` count from the beginning of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start


def stored_shape(dtype: torch.dtype, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in numbers, where torch counts pairs of them."""
    return (*shape[:-1], 2 * shape[-1]) if dtype in PAIRED else tuple(shape)


def torch_shape(dtype: torch.dtype, shape: Sequence[int]) -> tuple[int, ...]:
    """The inverse of `stored_shape`."""
    return (*shape[:-1], shape[-1] // 2) if dtype in PAIRED else tuple(shape)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major: its own memory where it lies so on the CPU, else a copy."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    # Copies are made of integers, since copying may change the payload of a NaN.
    bits = tensor.view(_BITS[tensor.dtype.itemsize]).cpu().contiguous().reshape(-1)
    if bits.stride() != (1,):  # that of a single entry, or of none, can be anything
        bits = bits.clone(memory_format=torch.contiguous_format)
    return memoryview(bits.view(torch.uint8).numpy())  # type: ignore[arg-type]


def in_groups(entries: Mapping[str, Entry]) -> Iterator[list[tuple[str, Entry]]]:
    """Names and entries in the order of the data, some at a time."""
    group, size = [], 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        group.append((name, entry))
        size += entry.size
        if size >= _GROUP:
            yield group
            group, size = [], 0
    yield group


def count_values(text: bytes) -> int:
    """No fewer values than the JSON has, counted without parsing it."""
    return sum(text.count(mark) for mark in (b",", b":", b"[", b"{"))
