"""How a tree in a file differs from one that was expected, path by path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeAlias

import torch

from funcnet.checkpoint.structure import (
    Json,
    Part,
    children,
    is_tensor,
    kind_of,
    label,
    parts,
)
from funcnet.tree import PathKey

Path: TypeAlias = "tuple[PathKey, ...]"
Spec: TypeAlias = "tuple[torch.dtype, tuple[int, ...]]"
"""dtype and shape."""


def differences(
    expected: Json, expected_specs: dict[str, Spec], got: Json, got_specs: dict[str, Spec]
) -> dict[Path, tuple[str, str]]:
    """For each path that differs, its name and what differs, in the order of the expected tree.

    Numbers and texts differ only in type, a tensor in shape or dtype, a container in kind. Order is
    no difference between dicts.
    """
    expected_parts = {part.path: part for part in parts(expected)}
    got_parts = {part.path: part for part in parts(got)}
    found = {}
    for path, part in expected_parts.items():
        other = got_parts.get(path)
        if other is not None:
            difference = _difference(part, expected_specs, other, got_specs)
        else:
            difference = f"expected {_describe(part, expected_specs)}, which the file has not"
        if difference and (other is not None or _is_end(part)):
            found[path] = (label(part.name), difference)
    for path, part in got_parts.items():
        if path not in expected_parts and _is_end(part):
            found[path] = (label(part.name), f"not expected, got {_describe(part, got_specs)}")
    times = Counter(name for name, _ in found.values())
    return {  # the keys 7 and "7" have one name
        path: (f"{name} (key {path[-1]!r})" if times[name] > 1 else name, text)
        for path, (name, text) in found.items()
    }


def replace_leaves(structure: Json, replacement: Callable[[Path, Json], Json]) -> Json:
    """The structure with another leaf for each leaf, given its path."""

    def replace(path: Path, json: Json) -> Json:
        items = children(json, "")
        if items is None:
            return replacement(path, json)
        nodes = [replace((*path, key), child) for key, child in items]
        kind = kind_of(json)
        if kind == "class":
            keys = [key for key, _ in items]
            return {"class": json["class"], "fields": dict(zip(keys, nodes, strict=True))}
        if kind in ("list", "tuple"):
            return {kind: nodes}
        return {kind: [[key, node] for (key, _), node in zip(items, nodes, strict=True)]}

    return replace((), structure)


def _difference(part: Part, specs: dict[str, Spec], other: Part, others: dict[str, Spec]) -> str:
    """ "" where there is none."""
    if not (is_tensor(kind_of(part.json)) and is_tensor(kind_of(other.json))):
        expected, got = _describe(part, specs), _describe(other, others)
        return "" if expected == got else f"expected {expected}, got {got}"
    (dtype, shape), (other_dtype, other_shape) = _spec(part, specs), _spec(other, others)
    wrong = []
    if shape != other_shape:
        wrong.append(f"expected shape {shape}, got {other_shape}")
    if dtype != other_dtype:
        wrong.append(f"expected {dtype}, got {other_dtype}")
    return "; ".join(wrong)


def _describe(part: Part, specs: dict[str, Spec]) -> str:
    kind = kind_of(part.json)
    if is_tensor(kind):
        dtype, shape = _spec(part, specs)
        return f"a tensor of {dtype} and shape {shape}"
    if kind == "NoneType":
        return "None"
    return str(part.json["class"]) if kind == "class" else kind


def _spec(part: Part, specs: dict[str, Spec]) -> Spec:
    return specs[part.json[kind_of(part.json)]]


def _is_end(part: Part) -> bool:
    """A leaf or an empty container: what has nothing below it that could be named instead."""
    return not children(part.json, part.name)
