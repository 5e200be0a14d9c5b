"""The tree that a file should hold: compared with what it holds, and merged with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from funcnet.checkpoint.container import Entry, as_integers
from funcnet.checkpoint.structure import (
    CheckpointError,
    Node,
    Path,
    decode,
    encode,
    label,
    parse,
    walk,
)
from funcnet.layer import Tree

Entries: TypeAlias = "Mapping[str, Tensor] | Mapping[str, Entry]"
"""The dtypes and shapes of a tree's tensors, by name."""


class Expected:
    """A tree that a file is expected to hold: its structure, and its tensors by name."""

    def __init__(self, like: Tree) -> None:
        json, self.tensors = encode(like)
        self.structure = parse(json)

    def differences(self, structure: Node, entries: Entries) -> dict[Path, tuple[str, str]]:
        """Return the name and the difference of each path that differs, in this tree's order.

        Tensors differ in shape or dtype, other leaves in type, containers in kind. The order of a
        dict makes no difference.
        """
        expected_nodes = {node.path: node for node in walk(self.structure)}
        got_nodes = {node.path: node for node in walk(structure)}
        found = {}
        for path, node in expected_nodes.items():
            difference = ""
            if path in got_nodes:
                difference = _difference(node, self.tensors, got_nodes[path], entries)
            elif not node.children:  # else its children are named
                difference = f"expected {_describe(node, self.tensors)}, got nothing"
            if difference:
                found[path] = (label(node.name), difference)
        for path, node in got_nodes.items():
            if path not in expected_nodes and not node.children:
                found[path] = (
                    label(node.name),
                    f"expected nothing, got {_describe(node, entries)}",
                )
        times = Counter(name for name, _ in found.values())
        return {  # the keys 7 and "7" have the same name
            path: (f"{name} (key {path[-1]!r})" if times[name] > 1 else name, difference)
            for path, (name, difference) in found.items()
        }

    def merged(
        self, structure: Node, tensors: Mapping[str, Tensor], skipped: Container[Path]
    ) -> Any:
        """Return this tree with a file's leaves, except those at the skipped paths."""
        leaves = {
            node.path: decode(node, tensors)
            for node in walk(structure)
            if node.children is None and node.path not in skipped
        }
        return decode(self.structure, self.tensors, leaves)

    def laid_out(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors, each with the strides of this tree's tensor of the same name."""
        return {
            name: _laid_out_like(tensor, self.tensors[name]) if name in self.tensors else tensor
            for name, tensor in tensors.items()
        }


def refuse(found: Mapping[Path, tuple[str, str]]) -> None:
    """Raise CheckpointError that names every difference, if there is one."""
    if found:
        places = "\n".join(f"  {name}: {difference}" for name, difference in found.values())
        raise CheckpointError(f"differs from like in {len(found)} place(s):\n{places}")


def _difference(expected: Node, expected_entries: Entries, got: Node, got_entries: Entries) -> str:
    if expected.entry is None or got.entry is None:
        kind, other_kind = _describe(expected, expected_entries), _describe(got, got_entries)
        return "" if kind == other_kind else f"expected {kind}, got {other_kind}"
    entry, other = expected_entries[expected.entry], got_entries[got.entry]
    shape, other_shape = tuple(entry.shape), tuple(other.shape)
    wrong = []
    if shape != other_shape:
        wrong.append(f"expected shape {shape}, got {other_shape}")
    if entry.dtype != other.dtype:
        wrong.append(f"expected {entry.dtype}, got {other.dtype}")
    return "; ".join(wrong)


def _describe(node: Node, entries: Entries) -> str:
    if node.entry is not None:
        entry = entries[node.entry]
        return f"a tensor of {entry.dtype} and shape {tuple(entry.shape)}"
    if node.kind == "class":
        return str(node.json["class"])
    return "None" if node.json is None else node.kind


def _laid_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor with the strides of `like`, or as it is if these leave holes or overlap."""
    if like.layout != torch.strided or like.shape != tensor.shape:
        return tensor
    strides = torch.empty_like(like, device="meta").stride()
    if tensor.stride() == strides:
        return tensor
    bits = as_integers(tensor)
    new = torch.empty_strided(tensor.shape, strides, dtype=bits.dtype, device=tensor.device)
    return new.copy_(bits).view(tensor.dtype)
