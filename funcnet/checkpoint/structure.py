"""The structure of a tree as JSON, without its tensors, and back.

A node of the JSON is one of

    null, true, false, "text", 3, 0.5             the value itself
    {"int": "-0x1f"}                              an int that does not fit in 64 bits
    {"float": "7ff8000000000000"}                 inf or NaN: the bits of the IEEE 754 double
    {"tensor": "2.weight"}                        the entry of that name; with "requires_grad": true
    {"parameter": "2.weight", "requires_grad": false}     for a torch.nn.Parameter
    {"list": [node, …]}   {"tuple": [node, …]}
    {"dict": [[key, node], …]}   {"OrderedDict": [[key, node], …]}   a key is a str or 64-bit int
    {"class": "Conv2d", "fields": {"out_channels": 8, …}}    a namedtuple or dataclass known by name
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from funcnet import tree as trees

Json: TypeAlias = Any
Path: TypeAlias = "tuple[trees.PathKey, ...]"

MAX_DEPTH = 100
"""The most containers one inside another."""

MAX_NODES = 1_000_000
"""The most containers and leaves in a tree."""

MAX_NAME_SIZE = 100_000_000
"""The most characters in the names of all nodes together."""

INT64 = range(-(2**63), 2**63)
_SEQUENCES: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple}
_MAPPINGS: dict[str, Callable[[Any], Any]] = {"dict": dict, "OrderedDict": OrderedDict}


class CheckpointError(ValueError):
    """The ValueError for a file that is damaged, foreign or not what was asked for.

    The message names the entry.
    """


class Node(NamedTuple):
    """One node of a structure that `parse` has checked.

    `kind` is the key that the JSON of a node begins with ("tuple", "tensor", "class", …), or the
    type of a value ("int", "NoneType", …). The `children` of a leaf are None.
    """

    path: Path
    name: str
    kind: str
    json: Json
    children: list[Node] | None

    @property
    def entry(self) -> str | None:
        """The name of the tensor that a leaf stands for, or None for any other node."""
        return self.json[self.kind] if self.kind in ("tensor", "parameter") else None


def encode(tree: Any) -> tuple[Json, dict[str, Tensor]]:
    """Return the structure of a tree, and its tensors by name.

    Raises TypeError or ValueError, naming the path, for a value that could not come back exactly.
    """
    tensors: dict[str, Tensor] = {}
    return _encode_node(tree, "", 0, _Limits(), tensors), tensors


# Not a function in `encode`: one that calls itself holds the tensors until garbage is collected.
def _encode_node(
    node: Any, name: str, depth: int, limits: _Limits, tensors: dict[str, Tensor]
) -> Json:
    if limits.passed(name, depth):
        raise ValueError(
            f"{label(name)}: expected {limits}, got a larger one, or one that contains itself"
        )
    if isinstance(node, Tensor):
        tensors[name or trees.ROOT] = node
        return _encode_tensor(node, name or trees.ROOT)
    items = trees.children(node)
    if items is None:
        return _encode_scalar(node, name)
    keys = [key for key, _ in items]
    for key in keys:
        _check_key(key, name)
    names = trees.child_names(name, keys)
    nodes = [
        _encode_node(child, child_name, depth + 1, limits, tensors)
        for (_, child), child_name in zip(items, names, strict=True)
    ]
    return _encode_container(node, keys, nodes, name)


def parse(structure: Json) -> Node:
    """Check a structure and return its root. Raises CheckpointError.

    A field that the file lacks gets its default if the class is known.
    """
    limits = _Limits()

    def parse_node(json: Json, path: Path, name: str) -> Node:
        if limits.passed(name, len(path)):
            raise CheckpointError(f"expected {limits}, got a larger one")
        kind = _kind_of(json)
        items = _items(json, kind, name)
        if items is None:
            return Node(path, name, kind, json, None)
        # The names of all children together may be far larger than the file: one at a time.
        names = trees.child_names(name, [key for key, _ in items])
        children = [
            parse_node(child, (*path, key), child_name)
            for (key, child), child_name in zip(items, names, strict=True)
        ]
        return Node(path, name, kind, json, children)

    return parse_node(structure, (), "")


def walk(root: Node) -> Iterator[Node]:
    """Yield a node and all nodes below it, parents first, in order."""
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack += reversed(node.children or ())


def decode(
    node: Node, tensors: Mapping[str, Tensor], leaves: Mapping[Path, Any] | None = None
) -> Any:
    """Return the tree of a structure, with `leaves` instead of its own at their paths.

    Raises CheckpointError.
    """
    if node.children is None:
        return leaves[node.path] if leaves and node.path in leaves else _decode_leaf(node, tensors)
    values = [decode(child, tensors, leaves) for child in node.children]
    if node.kind in _SEQUENCES:
        return _SEQUENCES[node.kind](values)
    keys = [child.path[-1] for child in node.children]
    if node.kind in _MAPPINGS:
        return _MAPPINGS[node.kind](zip(keys, values, strict=True))
    return _build(node, dict(zip(map(str, keys), values, strict=True)))


def label(name: str) -> str:
    """Return what messages call a node: its name, or "the tree" for the root."""
    return "the tree" if name in ("", trees.ROOT) else shorten(name, 1000)


def shorten(text: str, limit: int = 80) -> str:
    """Return the beginning of a str that may be very long.

    >>> shorten("0123456789", 5)
    '0123…'
    """
    return text if len(text) <= limit else text[: limit - 1] + "…"


def unexpected(name: str, expected: str, got: Any) -> CheckpointError:
    """Return the error that an entry of a file holds something else than what was expected."""
    return CheckpointError(f"{label(name)}: expected {expected}, got {shorten(repr(got))}")


def check_utf8(expected: str, text: str) -> None:
    """Raise ValueError for half of a surrogate pair: readers of safetensors take UTF-8 only."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{expected} that UTF-8 can encode, got {shorten(repr(text))}") from None


class _Limits:
    """Counts the nodes of a tree and the characters of their names."""

    def __init__(self) -> None:
        self._nodes = self._name_size = 0

    def passed(self, name: str, depth: int) -> bool:
        """Count one more node, and return whether the tree is too large."""
        self._nodes += 1
        self._name_size += len(name)
        return depth > MAX_DEPTH or self._nodes > MAX_NODES or self._name_size > MAX_NAME_SIZE

    def __str__(self) -> str:
        return (
            f"a tree of at most {MAX_NODES} nodes, one inside another at most {MAX_DEPTH} deep, "
            f"whose names are at most {MAX_NAME_SIZE} characters"
        )


def _encode_tensor(tensor: Tensor, name: str) -> Json:
    if type(tensor) is torch.nn.Parameter:
        return {"parameter": name, "requires_grad": tensor.requires_grad}
    return {"tensor": name, "requires_grad": True} if tensor.requires_grad else {"tensor": name}


def _encode_container(node: Any, keys: list[trees.PathKey], nodes: list[Json], name: str) -> Json:
    kind = type(node).__name__
    if type(node) in (list, tuple):
        return {kind: nodes}
    if type(node) in (dict, OrderedDict):
        return {kind: [[key, child] for key, child in zip(keys, nodes, strict=True)]}
    _check_rebuilds(node, name)
    fields = dict(zip(keys, nodes, strict=True))
    return {"class": trees.class_name(type(node)), "fields": fields}


def _encode_scalar(value: Any, name: str) -> Json:
    if value is None or type(value) is bool:
        return value
    if type(value) is str:
        check_utf8(f"{label(name)}: expected a str", value)
        return value
    if type(value) is int:
        return value if value in INT64 else {"int": hex(value)}
    if type(value) is float:
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if reason := getattr(type(value), "_unstorable", None):
        raise TypeError(f"{label(name)}: expected what a file can hold, got {value}: {reason}")
    raise TypeError(
        f"{label(name)}: expected a tensor, int, float, bool, str, None, tuple, list, dict, "
        f"OrderedDict or a class given to funcnet.register_node, "
        f"got {type(value).__module__}.{type(value).__qualname__}"
    )


def _check_key(key: Any, name: str) -> None:
    if type(key) not in (str, int):
        raise TypeError(
            f"{label(name)}: expected every key to be a str or an int, "
            f"got {key!r} of type {type(key).__name__}"
        )
    if isinstance(key, str):
        check_utf8(f"{label(name)}: expected every key to be a str", key)
    elif key not in INT64:
        raise ValueError(f"{label(name)}: expected every int key to fit in 64 bits, got {key:#x}")


def _check_rebuilds(node: Any, name: str) -> None:
    """Raise ValueError if the constructor would not give the same fields back."""
    cls, fields = type(node), trees.fields_of(node)
    try:
        again = trees.fields_of(trees.build(cls, fields))
        exact = all(_same(again[key], value) for key, value in fields.items())
    except Exception as error:
        raise ValueError(
            f"{label(name)}: expected {cls.__name__} to be rebuilt by its constructor "
            f"from its fields, got {type(error).__name__}: {error}"
        ) from error
    if not exact:
        raise ValueError(
            f"{label(name)}: expected the constructor of {cls.__name__} to keep its fields "
            "as they are, got others back"
        )


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def _kind_of(json: Json) -> str:
    if isinstance(json, dict) and json:
        return str(next(iter(json)))
    return type(json).__name__


def _items(json: Json, kind: str, name: str) -> list[tuple[trees.PathKey, Json]] | None:
    """Return the keys and children of a node, or None for a leaf. Raises CheckpointError."""
    content = json.get(kind) if isinstance(json, dict) else None
    if kind == "class":
        fields = json.get("fields")
        if len(json) == 2 and isinstance(content, str) and isinstance(fields, dict):
            return [*fields.items(), *_lacking(content, fields)]
    elif isinstance(content, list) and len(json) == 1:
        if kind in _SEQUENCES:
            return list(enumerate(content))
        if kind in _MAPPINGS and _are_items(content):
            return [(key, child) for key, child in content]
    elif _is_leaf(kind, json):
        return None
    raise unexpected(name, "a node of a tree", json)


def _lacking(class_name: str, fields: dict[str, Json]) -> Iterator[tuple[str, Json]]:
    """Yield the fields that a file lacks, with the defaults of those that have one."""
    cls = trees.class_named(class_name)
    if cls is None or fields.keys() >= set(trees.field_names(cls)):
        return
    for name, default in trees.defaults(cls).items():
        with suppress(TypeError, ValueError):  # what JSON cannot hold is left to `_build`
            json, tensors = encode(default)
            if name not in fields and not tensors:
                yield name, json


def _is_leaf(kind: str, json: Json) -> bool:
    if not isinstance(json, dict):
        return json is None or type(json) in (bool, int, float, str)
    value = json.get(kind)
    if not isinstance(value, str):
        return False
    if kind == "tensor":
        return json.keys() == {"tensor"} or (len(json) == 2 and json.get("requires_grad") is True)
    if kind == "parameter":
        return len(json) == 2 and type(json.get("requires_grad")) is bool
    if len(json) != 1:
        return False
    digits = value.removeprefix("-").removeprefix("0x")
    is_hex = bool(digits) and not digits.strip("0123456789abcdef")
    return is_hex and (kind == "int" or (kind == "float" and len(value) == len(digits) == 16))


def _are_items(items: list[Any]) -> bool:
    keys = [item[0] for item in items if isinstance(item, list) and len(item) == 2]
    are_keys = all(type(key) is str or (type(key) is int and key in INT64) for key in keys)
    return len(keys) == len(items) and are_keys and len(set(keys)) == len(keys)


def _build(node: Node, fields: dict[str, Any]) -> Any:
    class_name = node.json["class"]
    cls = trees.class_named(class_name)
    if cls is None:
        raise CheckpointError(
            f"{label(node.name)}: expected a class known by name, got {shorten(class_name)!r}: "
            "give it to funcnet.register_node before loading"
        )
    names = trees.field_names(cls)
    if fields.keys() != set(names):
        fields = trees.defaults(cls) | fields
    if fields.keys() != set(names):
        raise CheckpointError(
            f"{label(node.name)}: expected the fields of {class_name}, {names}, "
            f"got {shorten(str([*node.json['fields']]))}"
        )
    try:
        built = trees.build(cls, fields)
        kept = trees.fields_of(built)
        changed = [name for name in node.json["fields"] if _is_changed(fields[name], kept[name])]
    except Exception as error:
        raise CheckpointError(
            f"{label(node.name)}: {class_name} refused its fields: {shorten(str(error), 400)}"
        ) from error
    if changed:
        raise CheckpointError(
            f"{label(node.name)}: expected {class_name} to keep its fields as they are, "
            f"got another {changed[0]} back"
        )
    return built


def _is_changed(value: Any, kept: Any) -> bool:
    """Whether a constructor kept another container or str. It may convert numbers: 3 to (3, 3)."""
    return isinstance(value, (tuple, list, dict, str)) and not _same(value, kept)


def _decode_leaf(node: Node, tensors: Mapping[str, Tensor]) -> Any:
    if node.entry is not None:
        found = tensors[node.entry]
        requires_grad = node.json.get("requires_grad", False)
        if requires_grad and not (found.is_floating_point() or found.is_complex()):
            raise CheckpointError(
                f"{label(node.entry)}: expected a dtype that has gradients, got {found.dtype}"
            )
        if node.kind == "parameter":
            return torch.nn.Parameter(found, requires_grad=requires_grad)
        return found.requires_grad_() if requires_grad else found
    if not isinstance(node.json, dict):
        return node.json
    if node.kind == "int":
        return int(node.json["int"], 16)
    return struct.unpack(">d", bytes.fromhex(node.json["float"]))[0]
