"""A network over a large batch of images, tile by tile, so that tensors between layers are small.

Where the network's layers are local, a part of y depends on a part of x alone, its source. Each
layer, from the last to the first, says which part that is (`Layer._tile`). The layers over these
parts make up a network that computes the part of y. The parts of y lie side by side. So with J for
the Jacobian of a tile's network,

    dparams = Σ (∂part/∂params)ᵀ dy[part],    dx = Σ Jᵀ dy[part], each in the place of its source.

Only the last layer's y is ever whole, and each tile reuses the memory of the tile before. New
memory costs more than it seems: the operating system hands out blocks of more than `_MOST` bytes
page by page, and zeroes each. The tiles of x overlap by the reach of the kernels; products in an
overlap are made twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import optree
from torch import Tensor

from funcnet.combinators.cropped import cropped
from funcnet.layer import Part, Shape, Tree
from funcnet.ops import native
from funcnet.ops.inplace import is_eager, is_untracked
from funcnet.ops.need import Need
from funcnet.ops.summation import summed

if TYPE_CHECKING:
    from funcnet.combinators.sequential import Sequential

_MOST = 2**25 - 2**12
"""Bytes up to which glibc's malloc hands out the same memory again."""

_LARGE = 2**20
"""Bytes of x from which cutting it is considered."""

_STEP = 16
"""The sides of tiles are multiples of this: most tiles are alike, and strides divide them."""


def is_large(x: Tensor) -> bool:
    """Whether x is images on the CPU, large enough that cutting them is considered."""
    return x.ndim == 4 and x.is_cpu and is_eager() and x.numel() * x.element_size() >= _LARGE


class Tile(NamedTuple):
    """A part of y for some examples, and the network that computes it from a part of x."""

    net: Sequential
    source: Part
    part: Part
    examples: slice


class Tiles(NamedTuple):
    """The residuals of a network that has run tile by tile."""

    residuals: list[tuple[Tile, Any]]
    shape: Shape
    """x's shape."""


def apply(net: Sequential, params: Tree, x: Tensor) -> Tensor | None:
    """y of x (N, C, H, W); None where tiles save nothing, or x cannot be cut."""
    return _joined(net, params, x, lambda tile, own: tile.net._apply(params, own, None))


def fwd(net: Sequential, params: Tree, x: Tensor) -> tuple[Tensor, Tiles] | None:
    """(y, residuals), or None as `apply`."""
    kept = Tiles([], x.shape)

    def make(tile: Tile, own: Tensor) -> Tensor:
        y, residuals = tile.net._fwd(params, own, None)
        kept.residuals.append((tile, residuals))
        return y

    y = _joined(net, params, x, make)
    return None if y is None else (y, kept)


def bwd(params: Tree, kept: Tiles, dy: Tensor, need: Need) -> tuple[Tree, Tensor | None]:
    """(dparams, dx) from the residuals of `fwd`."""
    tiles = kept.residuals if need.consume else list(kept.residuals)
    dx = native.empty(dy, kept.shape).zero_() if need.input else None

    def gradients() -> Iterator[Tree]:
        while tiles:
            tile, residuals = tiles.pop()
            own = cropped(dy, tile.part, tile.examples)
            dparams, dsource = tile.net._bwd(params, residuals, own, need)
            if dx is not None and dsource is not None:
                cropped(dx, tile.source, tile.examples).add_(dsource)
            yield dparams

    return summed(gradients()), dx


def _joined(
    net: Sequential, params: Tree, x: Tensor, make: Callable[[Tile, Tensor], Tensor]
) -> Tensor | None:
    """y, put together from the results of `make` for the tiles of x; None as `apply`."""
    if not is_untracked(x, *optree.tree_leaves(params)):
        return None
    tiles = _tiles(net, x)
    if tiles is None:
        return None
    shape = (len(x), *net.out_shape(x.shape[1:]))
    y: Tensor | None = None
    for tile in tiles:
        part = make(tile, cropped(x, tile.source, tile.examples))
        y = native.empty(part, shape) if y is None else y
        cropped(y, tile.part, tile.examples).copy_(part)
    return y


def _tiles(net: Sequential, x: Tensor) -> list[Tile] | None:
    """The tiles; None where tiles save nothing, or a layer cannot be cut."""
    shapes = [*net._shapes(x.shape[1:])]
    most = x.element_size() * max(map(math.prod, shapes))
    if len(x) * most <= _MOST or len(shapes[-1]) != 3:
        return None
    examples = math.ceil(len(x) / math.ceil(len(x) * most / _MOST))
    tiles = []
    for part in _parts(shapes[-1][1:], most):
        found = net._tile(shapes[0], part)
        if found is None:
            return None
        source, tile = found
        starts = range(0, len(x), examples)
        tiles += [Tile(tile, source, part, slice(start, start + examples)) for start in starts]
    return tiles


def _parts(size: Sequence[int], most: int) -> Iterator[Part]:
    """Yield nearly square parts of an example whose largest tensor has `most` bytes, or all."""
    side = max(size) if most <= _MOST else math.isqrt(math.prod(size) * _MOST // most)
    yield from product(*(_cut(n, side) for n in size))


def _cut(n: int, most: int) -> list[slice]:
    """Equal parts of n pixels, of at most about `most` each."""
    length = math.ceil(n / math.ceil(n / max(most, _STEP)))
    length = math.ceil(length / _STEP) * _STEP
    return [slice(start, min(start + length, n)) for start in range(0, n, length)]
