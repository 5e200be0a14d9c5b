"""Trees as files and messages see them: nodes, the names of leaves, the classes known by name.

A node is a tuple, list, dict, OrderedDict, or an instance of a class known by name: a namedtuple or
frozen dataclass given to `register_node`, or a public one of funcnet itself. Everything else is a
leaf.

A leaf is called by the keys that lead to it, joined by dots, as in PyTorch: `2.weight`. So that no
two leaves of a tree have one name, in a key `.` becomes `%2E` and `%` becomes `%25`; an empty key
is `%`; and a `%` is put after an int key whose dict also has that number as a str key.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

import optree
from torch.utils import _pytree

PathKey: TypeAlias = "str | int"
"""A key of a dict, an index of a tuple or list, or a field's name."""

_Class = TypeVar("_Class", bound=type)

_registered: dict[str, type] = {}


def register_node(cls: _Class) -> _Class:
    """Make a namedtuple or frozen dataclass, a layer for instance, a node that files can hold.

    Files name it by module and name, `train.Moments`. A module that runs as a script is called
    `__main__`, so where the class in the file or the registered one is of `__main__`, `load` takes
    the registered class called `Moments` if there is only one. A dataclass is rebuilt by its own
    constructor, from its fields. It also becomes a node for `optree` and for `torch.utils._pytree`
    (namedtuples are), but not a layer or loss: those hold no tensors, and functions that map over
    tensors pass them by. A decorator, too.

    Raises TypeError for any other class, or one whose constructor wants what is not a field.

    >>> from typing import Any, NamedTuple
    >>> @register_node
    ... class Moments(NamedTuple):
    ...     first: Any
    ...     second: Any
    >>> Moments(1, 2)
    Moments(first=1, second=2)
    """
    _check_class(cls)
    if is_known(cls):
        return cls
    if dataclasses.is_dataclass(cls) and not hasattr(cls, "fwd"):
        _register_with_pytrees(cls)
    _registered[class_name(cls)] = cls
    return cls


def class_name(cls: type) -> str:
    """What files call a class: `Conv2d` for a public one of funcnet, `train.Moments` for others."""
    if _public(cls.__name__) is cls:
        return cls.__name__
    return f"{cls.__module__}.{cls.__qualname__}"


def class_named(name: str) -> type | None:
    """The class that files call `name`, None if there is none, or if it is not clear which."""
    if "." not in name:
        return _public(name)
    if name in _registered:
        return _registered[name]
    last = name.rpartition(".")[2]
    same = [cls for cls in _registered.values() if cls.__name__ == last and _ran(name, cls)]
    return same[0] if len(same) == 1 else None


def _ran(name: str, cls: type) -> bool:
    """Whether a module ran as a script: that of the class which files call `name`, or that of
    `cls`. Then its name tells nothing."""
    return name.startswith("__main__.") or cls.__module__ == "__main__"


def is_known(cls: type) -> bool:
    """Whether files can name this class."""
    return class_named(class_name(cls)) is cls


def fields_of(node: Any) -> dict[str, Any]:
    """What rebuilds an instance of a known class: its fields, but not those that it derives."""
    if isinstance(node, tuple):
        return dict(zip(type(node)._fields, node, strict=True))  # type: ignore[attr-defined]
    return {field.name: getattr(node, field.name) for field in _init_fields(type(node))}


def field_names(cls: type) -> list[str]:
    """The names that `fields_of` gives for an instance of a known class."""
    if issubclass(cls, tuple):
        return list(cls._fields)  # type: ignore[attr-defined]
    return [field.name for field in _init_fields(cls)]


def build(cls: type, fields: dict[str, Any]) -> Any:
    """An instance of a known class. A dataclass's own constructor makes it, and may refuse.

    A constructor with a variable number of arguments, `Sequential(*layers)`, gets the field of that
    name unpacked.
    """
    if issubclass(cls, tuple):
        return cls._make(fields.values())  # type: ignore[attr-defined]
    arguments: list[Any] = []
    keywords: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if name not in fields:
            continue  # it has a default: register_node has made sure
        if parameter.kind is parameter.VAR_POSITIONAL:
            arguments.extend(fields[name])
        elif parameter.kind is parameter.KEYWORD_ONLY:
            keywords[name] = fields[name]
        else:
            arguments.append(fields[name])
    return cls(*arguments, **keywords)


def children(node: Any) -> list[tuple[Any, Any]] | None:
    """The keys and children of a node, in order; None for a leaf.

    >>> children({"b": 1, 7: 2}), children((3,)), children(3)
    ([('b', 1), (7, 2)], [(0, 3)], None)
    """
    kind = type(node)
    if kind in (tuple, list):
        return list(enumerate(node))
    if kind in (dict, OrderedDict):
        return list(node.items())
    if _is_node_class(kind) and is_known(kind):
        return list(fields_of(node).items())
    return None


def child_names(parent: str, keys: Sequence[PathKey]) -> Iterator[str]:
    """The names of a node's children, from its own name, "" for the root of a tree.

    >>> list(child_names("2", ["weight", "a.b", "", "7", 7]))
    ['2.weight', '2.a%2Eb', '2.%', '2.7', '2.7%']
    """
    texts = {key for key in keys if isinstance(key, str)}
    prefix = f"{parent}." if parent else ""
    for key in keys:
        name = prefix + _escape(key, texts)
        # The file format keeps one name for itself.
        yield name + "%" if name == "__metadata__" else name


def _escape(key: PathKey, texts: set[str]) -> str:
    if isinstance(key, int):
        return f"{key}%" if str(key) in texts else str(key)
    return key.replace("%", "%25").replace(".", "%2E") or "%"


def _check_class(cls: Any) -> None:
    if not (isinstance(cls, type) and _is_node_class(cls)):
        raise TypeError(f"register_node: expected a namedtuple or frozen dataclass, got {cls!r}")
    if issubclass(cls, tuple):
        return
    names = field_names(cls)
    for parameter in inspect.signature(cls).parameters.values():
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if parameter.name not in names and not optional:
            raise TypeError(
                f"register_node: expected the constructor of {cls.__name__} to take its fields, "
                f"{', '.join(names)}, got one that wants {parameter.name}"
            )


def _is_node_class(cls: type) -> bool:
    if issubclass(cls, tuple):
        return hasattr(cls, "_fields")
    return dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]


def _init_fields(cls: type) -> list[dataclasses.Field[Any]]:
    # Sequential's constructor is its own (init=False), and its field is a field all the same.
    return [field for field in dataclasses.fields(cls) if field.init]


def _public(name: str) -> type | None:
    import funcnet  # here, because all of the package stands on this module

    public = vars(funcnet).get(name)
    return public if isinstance(public, type) and _is_node_class(public) else None


def _register_with_pytrees(cls: type) -> None:
    names = [field.name for field in dataclasses.fields(cls)]

    def flatten(node: Any) -> tuple[list[Any], None]:
        return [getattr(node, name) for name in names], None

    def rebuild(values: Iterable[Any]) -> Any:
        # Not the constructor: what is mapped over may be any object, for a moment.
        node: Any = object.__new__(cls)
        for name, value in zip(names, values, strict=True):
            object.__setattr__(node, name, value)
        return node

    namespace = optree.registry.__GLOBAL_NAMESPACE
    with suppress(ValueError):  # the user has registered it there already
        optree.register_pytree_node(
            cls, flatten, lambda _, values: rebuild(values), namespace=namespace
        )
    with suppress(ValueError):
        _pytree.register_pytree_node(cls, flatten, lambda values, _: rebuild(values))
