"""Writing the bytes of a file, which `funcnet.checkpoint.container` describes."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO

from torch import Tensor

from funcnet.checkpoint.checksums import block_count, digits, threads
from funcnet.checkpoint.container import (
    ALIGNMENT,
    CHECKSUM,
    DTYPE_NAMES,
    MAX_HEADER,
    MAX_VALUES,
    VERSION,
    Entry,
    as_bytes,
    count_values,
    in_groups,
    stored_shape,
)


class Writer:
    """Lays the file out, and refuses what is too large, before a byte is written."""

    def __init__(self, tensors: Mapping[str, Tensor], texts: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self._texts = {key: _to_json(value) for key, value in texts.items()}
        self._entries = _lay_out(tensors)
        # Checksums are of fixed width: the header's size is known before the data's checksums are.
        blanks = {name: "0" * 8 * block_count(entry.size) for name, entry in self._entries.items()}
        self._size = len(self._header(blanks))

    def write(self, file: BinaryIO) -> None:
        """Write data, then the header before it. Each tensor is copied only where it must be."""
        file.seek(self._size)
        checksums = dict.fromkeys(self._entries, "")
        with threads() as pool:
            for group in in_groups(self._entries):
                data = [as_bytes(self._tensors[name]) for name, _ in group]
                found = digits(data, pool)  # while it is written
                for one in data:
                    _write_all(file, one)
                checksums.update(zip((name for name, _ in group), found, strict=True))
        file.seek(0)
        _write_all(file, memoryview(self._header(checksums)))

    def _header(self, checksums: dict[str, str]) -> bytes:
        metadata = {"funcnet.header_crc32": "0" * 8, "funcnet.format": VERSION, "format": "pt"}
        metadata |= self._texts
        metadata["funcnet.crc32"] = _to_json(checksums)
        content: dict[str, Any] = {"__metadata__": metadata}
        for name, entry in self._entries.items():
            content[name] = {
                "dtype": DTYPE_NAMES[entry.dtype],
                "shape": stored_shape(entry.dtype, entry.shape),
                "data_offsets": [entry.start, entry.stop],
            }
        text = _to_json(content).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        if len(text) > MAX_HEADER or count_values(text) > MAX_VALUES:
            raise ValueError(
                f"expected names and structure of at most {MAX_HEADER} bytes and {MAX_VALUES} "
                f"values of JSON, got {len(text)} and {count_values(text)}"
            )
        header = bytearray(len(text).to_bytes(8, "little") + text)
        header[CHECKSUM] = b"%08x" % zlib.crc32(header)
        return bytes(header)


def _lay_out(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    def aligned_first(name: str) -> tuple[bool, int]:
        return tensors[name].nbytes % ALIGNMENT != 0, -tensors[name].dtype.itemsize

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
