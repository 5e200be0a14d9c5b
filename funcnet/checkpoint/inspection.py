"""What a file holds, without its tensors."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch

from funcnet.checkpoint.errors import CheckpointError
from funcnet.checkpoint.reading import Header
from funcnet.checkpoint.structure import children, decode, is_tensor, kind_of, parts
from funcnet.layer import Layer


@dataclass(frozen=True, repr=False)
class Inspection:
    """A file's header, made by `inspect`. Printed, it is a table."""

    _header: Header

    @property
    def structure(self) -> Any:
        """The tree with tensors on the meta device, which have shape and dtype but no values.

        It may be given to `load` as `like`. Raises CheckpointError if a class is not known here.
        """
        entries = self._header.entries

        def without_values(name: str) -> torch.Tensor:
            entry = entries[name]
            return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

        return decode(self._header.structure, without_values)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by name, in the order of the tree."""
        return {name: entry.shape for name, entry in self._header.entries.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each tensor by name, in the order of the tree."""
        return {name: entry.dtype for name, entry in self._header.entries.items()}

    @property
    def architecture(self) -> Layer | None:
        """The network of a file that `save_model` wrote, else None.

        Raises CheckpointError if a class is not known here, or refuses its fields.
        """
        if self._header.architecture is None:
            return None
        net = decode(self._header.architecture, dict[str, torch.Tensor]().__getitem__)
        if not isinstance(net, Layer):
            raise CheckpointError(f"the network: expected a layer, got {type(net).__name__}")
        return net

    @property
    def metadata(self) -> dict[str, Any]:
        """The user's metadata, {} if there is none."""
        return self._header.metadata or {}

    def __repr__(self) -> str:
        return f"<Inspection of {len(self._header.entries)} tensors>"

    def __str__(self) -> str:
        return "\n".join([*_table(self._header), *_notes(self._header)])


def _table(header: Header) -> list[str]:
    rows = [("name", "dtype", "shape", "elements", "bytes")]
    for name, entry in header.entries.items():
        count, size = math.prod(entry.shape), entry.size
        dtype = str(entry.dtype).removeprefix("torch.")
        rows.append((_printable(name), dtype, str(entry.shape), f"{count:,}", f"{size:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = "  ".join(f"{{:{side}{width}}}" for side, width in zip("<<<>>", widths, strict=True))
    return [aligned.format(*row) for row in rows]


def _notes(header: Header) -> list[str]:
    entries = header.entries.values()
    count = sum(math.prod(entry.shape) for entry in entries)
    size = sum(entry.size for entry in entries)
    notes = [f"{len(entries):,} tensors, {count:,} elements, {size:,} bytes"]
    values = [
        f"{_printable(part.name)} = {_printable(json.dumps(part.json))}"
        for part in parts(header.structure)
        if not is_tensor(kind_of(part.json)) and children(part.json, part.name) is None
    ]
    if values:
        notes += ["", "values:", *values[:20]]
        notes += [f"… and {len(values) - 20:,} more"] if len(values) > 20 else []
    if header.architecture is not None:
        notes += ["", "architecture:", _source(header.architecture)]
    if header.metadata is not None:
        notes += ["", "metadata:", json.dumps(header.metadata, indent=2)]
    return notes


def _source(node: Any) -> str:
    """Code that builds a network, from its JSON alone: its classes need not be known here."""
    items = children(node, "")
    if items is None:
        return repr(node)
    kind = kind_of(node)
    if kind == "class":
        return f"{_printable(node['class'])}({', '.join(_arguments(node['class'], items))})"
    if kind == "tuple":
        nodes = [_source(child) for _, child in items]
        return f"({', '.join(nodes)}{',' * (len(nodes) == 1)})"
    return json.dumps(node)


def _arguments(cls: str, fields: list[tuple[Any, Any]]) -> list[str]:
    if cls == "Sequential" and [key for key, _ in fields] == ["layers"]:
        layers = children(fields[0][1], "")
        if layers is not None:
            return [_source(layer) for _, layer in layers]
    return [f"{key}={_source(value)}" for key, value in fields]


def _printable(text: str) -> str:
    """Without characters that would move the cursor of whoever looks at a foreign file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
