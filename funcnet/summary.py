"""A network as a table: what each layer gives out and how much it has to learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import optree

from funcnet.keys import key
from funcnet.layer import Layer, Shape

Row: TypeAlias = tuple[str, str, str, int]
"""Path, code, output and number of parameters of a layer."""


def summary(net: Layer, shape: Sequence[int]) -> str:
    """A table of the layers of `net` for examples of `shape`: path, code, output, parameters.

    Raises ValueError, as `net.init` does, where a layer does not fit its input; TypeError for what
    is no Layer.

    >>> import funcnet as fn
    >>> print(summary(fn.Sequential(fn.Conv2d(8, 3), fn.ReLU()), (3, 32, 32)))
    path  layer                     output       parameters
    0     Conv2d(8, kernel_size=3)  (8, 30, 30)         224
    1     ReLU()                    (8, 30, 30)           0
                                                total   224
    """
    if not isinstance(net, Layer):
        raise TypeError(f"summary: expected net to be a Layer, got {net!r}")
    net.out_shape(shape)
    rows = list(_rows(net, tuple(shape), ""))
    total = f"{sum(count for *_, count in rows):,}"
    table = [
        ("path", "layer", "output", "parameters"),
        *((path, layer, output, f"{count:,}") for path, layer, output, count in rows),
    ]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    lines = [
        f"{path:{widths[0]}}  {layer:{widths[1]}}  {output:{widths[2]}}  {count:>{widths[3]}}"
        for path, layer, output, count in table
    ]
    return "\n".join([*lines, f"total   {total}".rjust(len(lines[0]))])


def _rows(layer: Layer, shape: Shape, path: str) -> Iterator[Row]:
    children = layer._children()
    if children:
        for (name, child), before in zip(children, layer._child_shapes(shape), strict=True):
            yield from _rows(child, before, ".".join(filter(None, (path, name))))
        return
    leaves = optree.tree_leaves(layer.init(key(0), shape, device="meta"))
    count = sum(leaf.numel() for leaf in leaves)
    yield path, repr(layer), str(layer.out_shape(shape)), count
