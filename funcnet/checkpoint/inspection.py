"""The content of a file without its tensors."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch

from funcnet.checkpoint.container import Header
from funcnet.checkpoint.structure import CheckpointError, Node, decode, walk
from funcnet.fields import call
from funcnet.layer import Layer
from funcnet.summary import aligned


@dataclass(frozen=True, repr=False)
class Inspection:
    """A file's header, made by `inspect`. It prints as a table."""

    _header: Header

    @property
    def structure(self) -> Any:
        """The tree with tensors on the meta device, which have shape and dtype but no values.

        `load` takes it as `like`. Raises CheckpointError if a class is not known.
        """
        tensors = {
            name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            for name, entry in self._header.entries.items()
        }
        return decode(self._header.structure, tensors)

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

        Raises CheckpointError if a class is not known or refuses its fields.
        """
        if self._header.architecture is None:
            return None
        net = decode(self._header.architecture, {})
        if not isinstance(net, Layer):
            raise CheckpointError(f"the network: expected a layer, got {type(net).__name__}")
        return net

    @property
    def metadata(self) -> dict[str, Any]:
        """The user's metadata, or {} if there is none."""
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
    return aligned(rows)


def _notes(header: Header) -> list[str]:
    count = sum(math.prod(entry.shape) for entry in header.entries.values())
    notes = [f"{len(header.entries):,} tensors, {count:,} elements, {header.data_size:,} bytes"]
    values = [
        f"{_printable(node.name)} = {_printable(json.dumps(node.json))}"
        for node in walk(header.structure)
        if node.children is None and node.entry is None
    ]
    if values:
        notes += ["", "values:", *values[:20]]
        notes += [f"… and {len(values) - 20:,} more"] if len(values) > 20 else []
    if header.architecture is not None:
        lines = _source(header.architecture).split("\n")
        notes += ["", "architecture:", *map(_printable, lines)]
    if header.metadata is not None:
        notes += ["", "metadata:", json.dumps(header.metadata, indent=2)]
    return notes


def _source(node: Node) -> str:
    """Return code that builds a network, a line a layer. Its classes need not be known."""
    if node.children is None:
        return repr(node.json)
    if node.kind == "class":
        arguments = _arguments(node.json["class"], node.children)
        return call(
            _printable(node.json["class"]), arguments, any(map(_holds_layers, node.children))
        )
    if node.kind == "tuple":
        return call("", [*map(_source, node.children)], _holds_layers(node))
    return json.dumps(node.json)


def _holds_layers(node: Node) -> bool:
    """Whether a field is a layer or a container of layers, and not an initialiser."""
    if node.kind == "class":
        return not node.json["class"].startswith("initializers.")
    return any(map(_holds_layers, node.children or []))


_OF_SEVERAL = ("Sequential", "Sum", "Product", "Concat", "Reversible")


def _arguments(cls: str, fields: list[Node]) -> list[str]:
    arguments: list[str] = []
    for field in fields:
        name, layers = field.path[-1], field.children
        if cls in _OF_SEVERAL and name == "layers" and layers is not None:
            shown = [_source(layer) for layer in layers]
            if field.kind != "tuple":
                names = [_printable(str(layer.path[-1])) for layer in layers]
                shown = [f"{name}={code}" for name, code in zip(names, shown, strict=True)]
            arguments.extend(shown)
        elif cls == "Cast" and name == "dtype":
            arguments.append(f"dtype=torch.{field.json}")
        else:
            arguments.append(f"{_printable(str(name))}={_source(field)}")
    return arguments


def _printable(text: str) -> str:
    """Return a str without control characters, which a foreign file might send to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
