"""The layers at the leaves of a network, by their paths; and networks with others in their places.

The path of a layer joins the names that lead to it by dots: `2`, `stem.0`. A dot in a name is
escaped. The only layer of a combinator has the path of the combinator. The path of a network is "".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, TypeAlias

import optree
from torch import Tensor

from funcnet.combinators.wrapper import Wrapper
from funcnet.keys import Key, key
from funcnet.layer import Joins, Layer, Tree, checks_itself, writes
from funcnet.running import run_fwd
from funcnet.tree import child_names

Ancestors: TypeAlias = tuple[Layer, ...]
"""The combinators around a layer, the outermost first."""


def joins(layer: Layer) -> Joins | None:
    """A combinator's `_joins`; None for anything else."""
    return layer._joins if writes(layer, "_joins") else None


def has_children(layer: Layer) -> bool:
    """Whether a layer is a combinator, perhaps of no layers."""
    return bool(layer._children()) or joins(layer) is not None


def mapped(
    net: Layer,
    make: Callable[[str, Layer, Ancestors], Layer],
    enters: Callable[[Layer], bool] = has_children,
    path: str = "",
    ancestors: Ancestors = (),
) -> Layer:
    """The network with `make(path, layer, ancestors)` for each layer that is not entered."""
    if not enters(net):
        return make(path, net, ancestors)
    children = net._children()
    made = [
        mapped(child, make, enters, joined(path, name), (*ancestors, net))
        for name, child in children
    ]
    return net if same(made, [child for _, child in children]) else net._with_children(made)


def places(
    net: Layer, params: Tree, enters: Callable[[Layer], bool], path: str = ""
) -> Iterator[tuple[str, Layer, Tree]]:
    """(path, layer, params) of each layer that is not entered, in order, if it has parameters.

    Any tree like params may stand for them, such as their gradient.
    """
    if not enters(net):
        if optree.tree_leaves(params):
            yield path, net, params
        return
    for (name, child), own in zip(net._children(), net._child_params(params), strict=True):
        yield from places(child, own, enters, joined(path, name))


def same(layers: Sequence[Layer], before: Sequence[Layer]) -> bool:
    """Whether these are the very same layers."""
    return len(layers) == len(before) and all(map(is_, layers, before))


def joined(path: str, name: str) -> str:
    """The path of a child, with which the names of its parameters in files start."""
    return next(child_names(path, [name])) if name else path


def declares_none(layer: Layer) -> bool:
    """Whether a layer is known to have no parameters, whatever x is."""
    if has_children(layer) or checks_itself(layer):
        return False
    return type(layer)._params is Layer._params


@dataclass(frozen=True)
class Watched(Wrapper):
    """A layer that stands in the place of another, and watches its passes."""

    path: str

    def __post_init__(self) -> None:
        """Convert nothing: inside of torch.compile, a class cannot be asked for its fields."""

    def __getattr__(self, name: str) -> Any:
        """The layer's own attribute, which a combinator may ask for."""
        if name.startswith("__") or name == "layer":  # `copy` and `pickle` ask before there is one
            raise AttributeError(name)
        return getattr(self.layer, name)

    def _fwd(self, params: Tree, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        return run_fwd(self.layer, params, x, key)

    def _describe(self) -> str:
        return self.layer._describe()


def shaped(net: Layer, shape: Sequence[int]) -> Tree:
    """Parameters of which only the shapes matter: on "meta", undrawn, if `init` allows it."""
    try:
        return net.init(key(0), shape, device="meta")
    except RuntimeError:  # the `init` of a user's layer may look at its numbers
        return net.init(key(0), shape)


def nothing_like(params: Tree) -> Tree:
    """A tree like params whose tensors have no entries; combinators join it as a gradient."""
    return optree.tree_map(lambda leaf: leaf.new_empty(0), params)
