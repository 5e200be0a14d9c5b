"""The structure of a tree as JSON, without its tensors, and back.

A node of the JSON is one of

    null, true, false, "text", 3, 0.5             the value itself
    {"int": "-0x1f"}                              an int that 64 bits do not hold
    {"float": "7ff8000000000000"}                 inf or NaN: the bits of the IEEE 754 double
    {"tensor": "2.weight"}                        the entry of that name; with "requires_grad": true
    {"parameter": "2.weight", "requires_grad": false}     for a torch.nn.Parameter
    {"list": [node, …]}   {"tuple": [node, …]}
    {"dict": [[key, node], …]}   {"OrderedDict": [[key, node], …]}   a key is a text or 64-bit int
    {"class": "Conv2d", "fields": {"out_channels": 8, …}}    a namedtuple or dataclass known by name
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from funcnet import tree as trees
from funcnet.checkpoint.errors import CheckpointError

Json: TypeAlias = Any

MAX_DEPTH = 100
"""The most containers one inside another."""

MAX_NODES = 1_000_000
"""The most containers and leaves in a tree."""

MAX_NAME_SIZE = 100_000_000
"""The most characters in the names of all nodes together."""

_LIMITS = (
    f"at most {MAX_NODES} nodes, one inside another at most {MAX_DEPTH} deep, "
    f"whose names are at most {MAX_NAME_SIZE} characters"
)
INT64 = range(-(2**63), 2**63)
_SEQUENCES: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple}
_MAPPINGS: dict[str, Callable[[Any], Any]] = {"dict": dict, "OrderedDict": OrderedDict}


class Part(NamedTuple):
    """One node of a structure."""

    path: tuple[trees.PathKey, ...]
    name: str
    json: Json


def encode(tree: Any) -> tuple[Json, dict[str, Tensor]]:
    """The structure of a tree and its tensors by name.

    Raises TypeError or ValueError, naming the path, for what could not come back exactly.
    """
    encoder = _Encoder()
    return encoder.encode(tree, "", 0), encoder.tensors


def decode(structure: Json, tensor: Callable[[str], Tensor]) -> Any:
    """The tree again, where `tensor` gives a tensor by name. Raises CheckpointError."""
    return _decode(structure, "", tensor)


def parts(structure: Json) -> Iterator[Part]:
    """All nodes, parents first, in order. Raises CheckpointError for what is no structure."""
    levels: list[Iterator[Part]] = [iter([Part((), "", structure)])]
    nodes = name_size = 0
    while levels:
        part = next(levels[-1], None)
        if part is None:
            levels.pop()
            continue
        nodes, name_size = nodes + 1, name_size + len(part.name)
        if len(levels) > MAX_DEPTH + 1 or nodes > MAX_NODES or name_size > MAX_NAME_SIZE:
            raise CheckpointError(f"expected a tree of {_LIMITS}, got a larger one")
        yield part
        items = children(part.json, part.name)
        if items is not None:
            levels.append(_child_parts(part, items))


def tensor_names(structure: Json) -> Iterator[str]:
    """The names of the tensors of a structure, in order. Raises CheckpointError as `parts` does."""
    for part in parts(structure):
        kind = kind_of(part.json)
        if is_tensor(kind):
            yield part.json[kind]


def _child_parts(parent: Part, items: list[tuple[trees.PathKey, Json]]) -> Iterator[Part]:
    # One at a time: the names of all children at once may be far larger than the file.
    names = trees.child_names(parent.name, [key for key, _ in items])
    for (key, child), name in zip(items, names, strict=True):
        yield Part((*parent.path, key), name, child)


def children(json: Json, name: str) -> list[tuple[trees.PathKey, Json]] | None:
    """The keys and children of a node of a structure; None for a leaf. Raises CheckpointError."""
    kind = kind_of(json)
    if kind == "class":
        fields = json["fields"] if json.keys() == {"class", "fields"} else None
        if isinstance(json["class"], str) and isinstance(fields, dict):
            return list(fields.items())
    elif kind in _SEQUENCES:
        if len(json) == 1 and isinstance(json[kind], list):
            return list(enumerate(json[kind]))
    elif kind in _MAPPINGS:
        if len(json) == 1 and isinstance(json[kind], list) and _are_items(json[kind]):
            return [(key, child) for key, child in json[kind]]
    elif _is_leaf(kind, json):
        return None
    raise CheckpointError(f"{label(name)}: expected a node of a tree, got {shorten(repr(json))}")


def kind_of(json: Json) -> str:
    """What a node of a structure is: "tuple", "tensor", "int", …

    >>> kind_of({"tuple": [None]}), kind_of({"tensor": "2.weight"}), kind_of(0.5)
    ('tuple', 'tensor', 'float')
    """
    if isinstance(json, dict) and json:
        return str(next(iter(json)))
    return type(json).__name__


def label(name: str) -> str:
    """How messages call a leaf or node: by its name, but the root has none."""
    return shorten(name, 1000) or "the tree"


def shorten(text: str, limit: int = 80) -> str:
    """The beginning of a text, for messages about what may be very long.

    >>> shorten("0123456789", 5)
    '0123…'
    """
    return text if len(text) <= limit else text[: limit - 1] + "…"


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._nodes = self._name_size = 0

    def encode(self, node: Any, name: str, depth: int) -> Json:
        self._count(name, depth)
        if isinstance(node, Tensor):
            return self._tensor(node, name)
        items = trees.children(node)
        if items is None:
            return _encode_scalar(node, name)
        keys = [key for key, _ in items]
        for key in keys:
            _check_key(key, name)
        names = trees.child_names(name, keys)
        nodes = [
            self.encode(child, child_name, depth + 1)
            for (_, child), child_name in zip(items, names, strict=True)
        ]
        kind = type(node).__name__
        if type(node) in (list, tuple):
            return {kind: nodes}
        if type(node) in (dict, OrderedDict):
            return {kind: [[key, child] for key, child in zip(keys, nodes, strict=True)]}
        _check_rebuilds(node, name)
        return {
            "class": trees.class_name(type(node)),
            "fields": dict(zip(keys, nodes, strict=True)),
        }

    def _tensor(self, tensor: Tensor, name: str) -> Json:
        name = name or "%"
        self.tensors[name] = tensor
        if type(tensor) is torch.nn.Parameter:
            return {"parameter": name, "requires_grad": tensor.requires_grad}
        return {"tensor": name, "requires_grad": True} if tensor.requires_grad else {"tensor": name}

    def _count(self, name: str, depth: int) -> None:
        self._nodes += 1
        self._name_size += len(name)
        if depth > MAX_DEPTH or self._nodes > MAX_NODES or self._name_size > MAX_NAME_SIZE:
            raise ValueError(
                f"{label(name)}: expected a tree of {_LIMITS}, "
                "got a larger one, or one that contains itself"
            )


def _encode_scalar(value: Any, name: str) -> Json:
    if value is None or type(value) is bool:
        return value
    if type(value) is str:
        check_text(f"{label(name)}: expected a text", value)
        return value
    if type(value) is int:
        return value if value in INT64 else {"int": hex(value)}
    if type(value) is float:
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    raise TypeError(
        f"{label(name)}: expected a tensor, number, text, None or a container that can come back "
        f"as it is (tuple, list, dict, OrderedDict, a class given to funcnet.register_node), "
        f"got {type(value).__module__}.{type(value).__qualname__}"
    )


def _check_key(key: Any, name: str) -> None:
    if type(key) not in (str, int):
        raise TypeError(
            f"{label(name)}: expected every key to be a str or an int, "
            f"got {key!r} of type {type(key).__name__}"
        )
    if isinstance(key, str):
        check_text(f"{label(name)}: expected every key to be a text", key)
    elif key not in INT64:
        raise ValueError(f"{label(name)}: expected every int key to fit in 64 bits, got {key:#x}")


def check_text(expected: str, text: str) -> None:
    """Refuse, by ValueError, half of a surrogate pair: safetensors readers take UTF-8 only."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{expected} that UTF-8 can encode, got {shorten(repr(text))}") from None


def _check_rebuilds(node: Any, name: str) -> None:
    """Refuse a dataclass that its constructor would not give back as it is."""
    fields = trees.fields_of(node)
    try:
        again = trees.build(type(node), fields)
        exact = all(_same(getattr(again, key), getattr(node, key)) for key in fields)
    except Exception as error:
        raise ValueError(
            f"{label(name)}: expected {type(node).__name__} to be rebuilt by its constructor "
            f"from its fields, got {type(error).__name__}: {error}"
        ) from error
    if not exact:
        raise ValueError(
            f"{label(name)}: expected the constructor of {type(node).__name__} to keep its fields "
            "as they are, got others back"
        )


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def _decode(json: Json, name: str, tensor: Callable[[str], Tensor]) -> Any:
    items = children(json, name)
    kind = kind_of(json)
    if items is None:
        return _decode_tensor(json, kind, tensor) if is_tensor(kind) else _decode_scalar(json, kind)
    keys = [key for key, _ in items]
    names = trees.child_names(name, keys)
    nodes = [
        _decode(child, child_name, tensor)
        for (_, child), child_name in zip(items, names, strict=True)
    ]
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](nodes)
    if kind in _MAPPINGS:
        return _MAPPINGS[kind](zip(keys, nodes, strict=True))
    return _decode_class(json["class"], dict(zip(map(str, keys), nodes, strict=True)), name)


def _decode_class(class_name: str, fields: dict[str, Any], name: str) -> Any:
    cls = trees.class_named(class_name)
    if cls is None:
        raise CheckpointError(
            f"{label(name)}: expected a class known by name, got {shorten(class_name)!r}: "
            "give it to funcnet.register_node before loading"
        )
    if list(fields) != trees.field_names(cls):
        raise CheckpointError(
            f"{label(name)}: expected the fields of {class_name}, "
            f"{', '.join(trees.field_names(cls))}, got {shorten(', '.join(fields))}"
        )
    try:
        return trees.build(cls, fields)
    except Exception as error:
        raise CheckpointError(
            f"{label(name)}: {class_name} refused its fields: {shorten(str(error), 400)}"
        ) from error


def _decode_tensor(json: Json, kind: str, tensor: Callable[[str], Tensor]) -> Tensor:
    found = tensor(json[kind])
    requires_grad = json.get("requires_grad", False)
    if requires_grad and not (found.is_floating_point() or found.is_complex()):
        raise CheckpointError(
            f"{json[kind]}: expected a dtype that has gradients, got {found.dtype}"
        )
    if kind == "parameter":
        return torch.nn.Parameter(found, requires_grad=requires_grad)
    return found.requires_grad_() if requires_grad else found


def _decode_scalar(json: Json, kind: str) -> Any:
    if not isinstance(json, dict):
        return json
    if kind == "int":
        return int(json["int"], 16)
    return struct.unpack(">d", bytes.fromhex(json["float"]))[0]


def is_tensor(kind: str) -> bool:
    """Whether nodes of this kind stand for an entry of the file."""
    return kind in ("tensor", "parameter")


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
