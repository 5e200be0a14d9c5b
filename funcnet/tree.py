"""Trees as files and messages see them: nodes, the names of leaves, the classes known by name.

A node is a tuple, a list, a dict, an OrderedDict, or an instance of a class known by name. Such a
class is a namedtuple or frozen dataclass given to `register_node`, or a public one of funcnet.
Everything else is a leaf.

A leaf's name joins the keys that lead to it by dots, as in PyTorch: `2.weight`. No two leaves of a
tree have the same name: in a key, `.` becomes `%2E` and `%` becomes `%25`; an empty key becomes
`%`; an int key gets a `%` at its end if its dict also has that number as a str key.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

import optree

from funcnet.checks import shown
from funcnet.compat import register_pytree_node
from funcnet.fields import signature_of

PathKey: TypeAlias = "str | int"
"""A key of a dict, an index of a tuple or list, or a field's name."""

ROOT = "%"
"""The name of the tensor in a tree that is one tensor. No other leaf has it: names escape %."""

_Class = TypeVar("_Class", bound=type)

_PUBLIC_MODULES = ("initializers", "schedules")
"""The modules whose classes files call as in `initializers.Zeros`."""

_registered: dict[str, type] = {}


def register_node(cls: _Class) -> _Class:
    """Make a namedtuple or frozen dataclass, for instance a layer, a node that files can hold.

    May be used as a decorator. A file names the class by module and name: `train.Moments`. A
    module that runs as a script is called `__main__`. If the class in the file or the registered
    class comes from `__main__`, `load` takes the only registered class called `Moments`.

    A dataclass is rebuilt by its constructor, from its fields. A field that a file lacks takes its
    default. A dataclass also becomes a node for `optree` and `torch.utils._pytree`, as namedtuples
    already are. Layers and losses do not: they hold no tensors.

    Raises TypeError for any other class, for a constructor that needs more than the fields, and for
    a class that derives from a dataclass and writes an `__init__`, but is not one itself;
    ValueError for a name that files give to a class of funcnet.

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
    name = class_name(cls)
    taken = class_named(name)
    if taken is not None and taken not in _registered.values():
        raise ValueError(f"register_node: expected a class of another name than {name} of funcnet")
    if dataclasses.is_dataclass(cls) and not hasattr(cls, "fwd"):
        _register_with_pytrees(cls)
    _registered[name] = cls
    return cls


def class_name(cls: type) -> str:
    """Return a class's name in files: `Conv2d`, `initializers.Zeros`, or as in `train.Moments`."""
    names = [cls.__name__, *(f"{module}.{cls.__name__}" for module in _PUBLIC_MODULES)]
    public = next((name for name in names if _public(name) is cls), None)
    return public or f"{cls.__module__}.{cls.__qualname__}"


def class_named(name: str) -> type | None:
    """Return the class that files call `name`, or None if none or several may be meant."""
    module, _, last = name.rpartition(".")
    public = _public(name) if module in ("", *_PUBLIC_MODULES) else None
    if public or not module:
        return public
    if name in _registered:
        return _registered[name]
    same = [cls for cls in _registered.values() if cls.__name__ == last and _ran(name, cls)]
    return same[0] if len(same) == 1 else None


def _ran(name: str, cls: type) -> bool:
    """Return whether the module of `name` or of `cls` ran as a script, which hides its name."""
    return name.startswith("__main__.") or cls.__module__ == "__main__"


def is_known(cls: type) -> bool:
    """Return whether files can name this class."""
    return class_named(class_name(cls)) is cls


def field_names(cls: type) -> list[str]:
    """Return the names of the fields that rebuild an instance of a known class."""
    if dataclasses.is_dataclass(cls):
        found = [field for field in dataclasses.fields(cls) if field.init]
        return [field.name for field in found if field.metadata.get("stored", True)]
    return list(cls._fields)  # type: ignore[attr-defined]


def fields_of(node: Any) -> dict[str, Any]:
    """Return the fields that rebuild an instance of a known class.

    A layer may keep a field in another form than files do; `_stored(name)` returns theirs.
    """
    stored = getattr(type(node), "_stored", getattr)
    return {name: stored(node, name) for name in field_names(type(node))}


def defaults(cls: type) -> dict[str, Any]:
    """Return the defaults of those fields of a known class that have one."""
    parameters = signature_of(cls).parameters
    found = {name: parameters[name].default for name in field_names(cls) if name in parameters}
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if field.name in found and field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return {name: value for name, value in found.items() if value is not inspect.Parameter.empty}


def build(cls: type, fields: dict[str, Any]) -> Any:
    """Return an instance of a known class with these fields; its constructor may refuse them.

    The constructor `Sequential(*layers, **named)` gets the field `layers` unpacked, a tuple by
    position and a dict by name.
    """
    if issubclass(cls, tuple):
        return cls._make(fields[name] for name in cls._fields)  # type: ignore[attr-defined]
    signature, fields = signature_of(cls), dict(fields)
    kinds = {parameter.kind: name for name, parameter in signature.parameters.items()}
    by_position = kinds.get(inspect.Parameter.VAR_POSITIONAL)
    by_name = kinds.get(inspect.Parameter.VAR_KEYWORD)
    if by_position and by_name and isinstance(fields.get(by_position), dict):
        fields[by_name] = fields.pop(by_position)
    arguments = inspect.BoundArguments(signature, OrderedDict(fields))
    return cls(*arguments.args, **arguments.kwargs)


def children(node: Any) -> list[tuple[Any, Any]] | None:
    """Return the keys and children of a node in order, or None for a leaf.

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
    """Yield the names of a node's children. The root of a tree has the name "".

    >>> list(child_names("2", ["weight", "a.b", "", "7", 7]))
    ['2.weight', '2.a%2Eb', '2.%', '2.7', '2.7%']
    """
    siblings = set(keys)
    prefix = f"{parent}." if parent else ""
    for key in keys:
        name = prefix + _escape(key, siblings)
        # A safetensors file keeps its metadata under this name.
        yield name + "%" if name == "__metadata__" else name


def leaf_names(structure: optree.PyTreeSpec) -> list[str]:
    """Return the names of the leaves of optree's structure of a tree, in order.

    Raises ValueError for two leaves of one name: a dict may have keys 0.5 and "0.5".

    >>> leaf_names(optree.tree_structure({"b": (1, 2), "a": 3}))
    ['a', 'b.0', 'b.1']
    """
    names = list(_leaf_names("", structure))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"expected leaves with different names, got two called {twice!r}")
    return names


def _leaf_names(name: str, structure: optree.PyTreeSpec) -> Iterator[str]:
    if structure.is_leaf():
        yield name
        return
    names = child_names(name, _keys(structure))
    for child_name, child in zip(names, structure.children(), strict=True):
        yield from _leaf_names(child_name, child)


def _keys(structure: optree.PyTreeSpec) -> Sequence[PathKey]:
    kind: Any = structure.type
    if _is_node_class(kind):
        is_tuple = issubclass(kind, tuple)
        return kind._fields if is_tuple else _all_fields(kind)
    return [key if isinstance(key, (str, int)) else str(key) for key in structure.entries()]


def _escape(key: PathKey, siblings: set[PathKey]) -> str:
    if isinstance(key, int):
        return f"{key}%" if str(key) in siblings else str(key)
    return key.replace("%", "%25").replace(".", "%2E") or "%"


def _check_class(cls: Any) -> None:
    if not (isinstance(cls, type) and _is_node_class(cls)):
        got = repr(cls) if isinstance(cls, type) else shown(cls)
        raise TypeError(f"register_node: expected a namedtuple or frozen dataclass, got {got}")
    if issubclass(cls, tuple):
        return
    names = field_names(cls)
    writer = next(base for base in cls.__mro__ if "__init__" in vars(base))
    if "__dataclass_fields__" not in vars(writer):
        raise TypeError(
            f"register_node: expected @dataclass(frozen=True) above {cls.__name__}: files would "
            f"lose what its __init__ sets and no field declares"
        )
    for parameter in signature_of(cls).parameters.values():
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if parameter.name not in names and not optional:
            raise TypeError(
                f"register_node: expected the constructor of {cls.__name__} to take its fields, "
                f"{', '.join(names)}, got one that wants {parameter.name}"
            )


def _all_fields(cls: Any) -> list[str]:
    """The names of a dataclass's fields, which are a node's children for optree."""
    return [field.name for field in dataclasses.fields(cls)]


def _is_node_class(cls: type) -> bool:
    if issubclass(cls, tuple):
        return hasattr(cls, "_fields")
    return dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]


def _public(name: str) -> type | None:
    import funcnet  # not at the top: funcnet imports this module

    module, _, last = name.rpartition(".")
    holder = getattr(funcnet, module) if module in _PUBLIC_MODULES else funcnet
    public = getattr(holder, last) if last in holder.__all__ else None
    return public if isinstance(public, type) and _is_node_class(public) else None


def _register_with_pytrees(cls: type) -> None:
    names = _all_fields(cls)

    def flatten(node: Any) -> tuple[list[Any], None]:
        return [getattr(node, name) for name in names], None

    def rebuild(values: Iterable[Any]) -> Any:
        # Not by the constructor, which may refuse the values that a tree_map gives.
        node: Any = object.__new__(cls)
        for name, value in zip(names, values, strict=True):
            object.__setattr__(node, name, value)
        return node

    namespace = optree.registry.__GLOBAL_NAMESPACE
    with suppress(ValueError):  # the user may have registered the class already
        optree.register_pytree_node(
            cls, flatten, lambda _, values: rebuild(values), namespace=namespace
        )
    with suppress(ValueError):
        register_pytree_node(cls, flatten, lambda values, _: rebuild(values))
