"""The base of combinators of several layers: layers by position or name, and their parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from keyword import iskeyword
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch

from funcnet.checks import count_of, name_of, shown
from funcnet.fields import call
from funcnet.initializers import Device
from funcnet.keys import Key, fold_in
from funcnet.layer import Layer, Shape, Tree
from funcnet.position import Position

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, init=False)
class Several(Layer):
    """A sequence of layers, by position or by name; it can be indexed, sliced and iterated over.

    Parameters: a tuple with one entry a layer; for layers with names, a dict with these as keys.
    Layer i draws from `fold_in(key, i)`.
    """

    layers: tuple[Layer, ...]
    # Files and the repr write each name beside its layer instead.
    names: tuple[str, ...] = field(default=(), metadata={"stored": False})

    _composes: ClassVar[bool] = False
    """Whether y is the layers applied one after the other, and nothing else."""

    def __init__(self, /, *layers: Layer, **named: Layer) -> None:
        layers, names = _sorted_out(type(self).__name__, layers, named)
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "names", names)
        self.__post_init__()

    def __post_init__(self) -> None:
        if not isinstance(self.layers, tuple):  # @dataclass has written another constructor
            raise TypeError(
                f"{type(self).__name__}: expected layers to be a tuple, got {shown(self.layers)}: "
                "@dataclass(frozen=True, init=False) keeps the constructor that takes layers"
            )
        super().__post_init__()

    def __repr__(self) -> str:
        layers = [*map(repr, self.layers)]  # once: the time would double with each depth
        if self.names:
            pairs = [*zip(self.names, layers, strict=True)]
            layers = [f"{name}={code}" for name, code in pairs]
            if not all(name.isidentifier() and not iskeyword(name) for name in self.names):
                named = [f"{name!r}: {code}" for name, code in pairs]
                layers = [call("**", named, brackets="{}")]
        options = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.init and f.name not in ("layers", "names") and getattr(self, f.name) != f.default
        ]
        return call(type(self).__name__, [*layers, *options])

    # --- A sequence of layers

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    @overload
    def __getitem__(self, index: int | str) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | str | slice) -> Layer | Self:
        if isinstance(index, slice):
            return self._with(self.layers[index], self.names[index])
        if isinstance(index, str) and index not in self.names:
            names = f"a name among {_listed(self.names)}"
            expected = names if self.names else "a position, as its layers have no names"
            raise KeyError(f"{name_of(self)}: expected {expected}, got {index!r}")
        try:
            return self.layers[self.names.index(index) if isinstance(index, str) else index]
        except IndexError:
            raise IndexError(f"{name_of(self)}: expected a position in it, got {index}") from None
        except TypeError:
            got = f"got {shown(index)}"
            raise TypeError(f"{name_of(self)}: expected a position or a name, {got}") from None

    def _with_children(self, children: Sequence[Layer]) -> Self:
        return self._with(tuple(children), self.names)

    def _with(self, layers: tuple[Layer, ...], names: tuple[str, ...]) -> Self:
        """The same combinator with other layers, made without the constructor, which may differ."""
        other = object.__new__(type(self))
        other.__setstate__({**self.__getstate__(), "layers": layers, "names": names})
        return other

    # --- A tree of parameters

    def _children(self) -> tuple[tuple[str, Layer], ...]:
        names = self.names or map(str, range(len(self)))
        return tuple(zip(names, self.layers, strict=True))

    def _path_step(self, name: str) -> str:
        return f"{name}: " if self.names else super()._path_step(name)

    def _child_params(self, params: Tree) -> tuple[Tree, ...]:
        return tuple(params[name] for name in self.names) if self.names else params

    def _pairs(self, params: Tree) -> Any:
        """Each layer with its parameters."""
        return zip(self.layers, self._child_params(params), strict=True)

    def _packed(self, values: Sequence[Any], params: Tree = ()) -> Tree:
        """The values, one a layer, as a tuple of params' type; as a dict for layers with names."""
        if self.names:
            return dict(zip(self.names, values, strict=True))
        return getattr(params, "_make", tuple)(values)

    def _init(self, key: Key, shape: Shape, dtype: torch.dtype | None, device: Device) -> Tree:
        params = []
        shapes = self._child_shapes(shape)
        with self._position() as at:
            for at.i, (layer, own) in enumerate(zip(self.layers, shapes, strict=True)):
                params.append(layer.init(fold_in(key, at.i), own, dtype=dtype, device=device))
        return self._packed(params)

    def _learns(self, params: Tree) -> bool:
        return any(layer._learns(own) for layer, own in self._pairs(params))

    def _check_tree(self, params: Tree) -> None:
        """Raise unless params have one entry a layer."""
        if not isinstance(params, dict if self.names else tuple):
            keys, size = f"dict with keys {_listed(self.names)}", f"tuple of {len(self)}"
            raise TypeError(
                f"{name_of(self)}: expected params to be a {keys if self.names else size}, "
                f"got {type(params).__name__}{_remedy(params)}"
            )
        if isinstance(params, dict) and params.keys() != set(self.names):
            raise ValueError(
                f"{name_of(self)}: expected params with keys {_listed(self.names)}, "
                f"got keys {_listed(params)}{_remedy(params)}"
            )
        if len(params) != len(self):
            raise ValueError(
                f"{name_of(self)}: expected params of {count_of(self.layers)}, got {len(params)}"
            )

    def _first_to_learn(self, params: tuple[Tree, ...]) -> int:
        """The first layer that learns, below which no gradient is needed; or their number."""
        for i, layer in enumerate(self.layers):
            if layer._learns(params[i]):
                return i
        return len(self)

    # --- Names

    def _position(self) -> Position:
        return Position(self.names)

    def _describe(self) -> str:
        return f"{type(self).__name__} of {count_of(self.layers)}"

    def _stored(self, name: str) -> Any:
        """A field as files hold it."""
        value = getattr(self, name)
        return dict(self._children()) if name == "layers" and self.names else value


def key_of(key: Key | None, i: int) -> Key | None:
    """The key of child i."""
    return None if key is None else fold_in(key, i)


def _sorted_out(
    who: str, layers: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """(layers, names) from a constructor's arguments. Raises TypeError for bad ones."""
    names = tuple(named)
    # By len(): torch.compile cannot take a tuple of layers for a bool.
    held = named.get("layers") if len(layers) == 0 else None
    own_names = named.get("names", ())
    others = {name: layer for name, layer in named.items() if name not in ("layers", "names")}
    # dataclasses.replace passes the fields by name, and perhaps new layers by their names.
    if isinstance(held, tuple) and all(name in own_names for name in others):
        layers, names, named = held, own_names, {}
        if names and len(names) != len(layers):
            raise TypeError(f"{who}: expected a name for each layer, or none, got {names!r}")
        if others:
            layers = tuple(others.get(name, own) for name, own in zip(names, held, strict=True))
    if layers and named:
        raise TypeError(
            f"{who}: expected layers by position or by name, got both: "
            f"{count_of(layers)} and {_listed(names)}"
        )
    if "" in names:
        raise TypeError(f"{who}: expected names of one character or more, got ''")
    layers = layers or tuple(named.values())
    for i, layer in enumerate(layers):
        if not isinstance(layer, Layer):
            where = names[i] if names else f"layer {i}"
            stars = _STARS.get(type(layer))
            advice = f": {who}({stars}layers) takes all of them" if stars and not names else ""
            raise TypeError(f"{who}: expected {where} to be a Layer, got {shown(layer)}{advice}")
    return layers, names


_STARS: dict[type, str] = {list: "*", tuple: "*", dict: "**", OrderedDict: "**"}


def _remedy(params: Any) -> str:
    """The end of a message, for params that are a state_dict of PyTorch: their keys have dots."""
    is_state = isinstance(params, dict) and any("." in str(name) for name in params)
    return "; fn.interop.load_state_dict makes params of a state_dict" if is_state else ""


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"
