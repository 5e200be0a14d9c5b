"""Comparing the tree in a file with an expected one, and merging the two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from funcnet.checkpoint.container import Entry
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


def expectation(like: Tree) -> tuple[Node, dict[str, Tensor]]:
    """Return the structure and the tensors of a tree that a file is expected to hold."""
    json, tensors = encode(like)
    return parse(json), tensors


def differences(
    expected: Node, expected_entries: Entries, got: Node, got_entries: Entries
) -> dict[Path, tuple[str, str]]:
    """Return the name and the difference of each path that differs, in the order of `expected`.

    Tensors differ in shape or dtype, other leaves in type, containers in kind. The order of a dict
    makes no difference.
    """
    expected_nodes = {node.path: node for node in walk(expected)}
    got_nodes = {node.path: node for node in walk(got)}
    found = {}
    for path, node in expected_nodes.items():
        difference = ""
        if path in got_nodes:
            difference = _difference(node, expected_entries, got_nodes[path], got_entries)
        elif not node.children:  # else its children are named
            difference = f"expected {_describe(node, expected_entries)}, got nothing"
        if difference:
            found[path] = (label(node.name), difference)
    for path, node in got_nodes.items():
        if path not in expected_nodes and not node.children:
            found[path] = (
                label(node.name),
                f"expected nothing, got {_describe(node, got_entries)}",
            )
    times = Counter(name for name, _ in found.values())
    return {  # the keys 7 and "7" have the same name
        path: (f"{name} (key {path[-1]!r})" if times[name] > 1 else name, difference)
        for path, (name, difference) in found.items()
    }


def refuse(found: Mapping[Path, tuple[str, str]]) -> None:
    """Raise CheckpointError that names every difference, if there is one."""
    if found:
        places = "\n".join(f"  {name}: {difference}" for name, difference in found.values())
        raise CheckpointError(f"differs from like in {len(found)} place(s):\n{places}")


def merge(
    like: Node,
    like_tensors: Mapping[str, Tensor],
    got: Node,
    got_tensors: Mapping[str, Tensor],
    skipped: Container[Path],
) -> Any:
    """Return the tree `like` with the leaves of `got`, except those at the skipped paths."""
    leaves = {
        node.path: decode(node, got_tensors)
        for node in walk(got)
        if node.children is None and node.path not in skipped
    }
    return decode(like, like_tensors, leaves)


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
