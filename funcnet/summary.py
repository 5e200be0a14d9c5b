"""A network as a table: each layer's output shape, number of parameters and residual bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor

from funcnet.checks import as_shape, name_of
from funcnet.compat import storage_id
from funcnet.keys import Key, key
from funcnet.layer import Layer, Shape, Tree, check_net
from funcnet.leaves import joined, shaped

_META = torch.device("meta")

_Known: TypeAlias = tuple[Shape | None, list[Shape] | None]
"""The shape of one example of a layer's x, and the shapes of its parameters; None if unknown."""


class Row(NamedTuple):
    """A line of the table, of one layer; None for what cannot be found out."""

    path: str
    depth: int
    layer: str
    output: Shape | None
    parameters: int | None
    residuals: int | None


def summary(net: Layer, shape: Sequence[int]) -> str:
    """A table of `net` for examples of `shape`, with a line for each layer, also inside others.

    path            the layer's place in params; the only layer of a combinator has its path
    layer           the layer, indented by how many others it is in; a combinator by kind and size
    output          the shape of one example of y
    parameters      the number of entries of the layer's parameters, with those of the layers in it
                    and with frozen ones; a layer inside Repeat is counted once
    residual bytes  the memory that the layer's `fwd` with a key keeps for `bwd`, for one float32
                    example: what is kept twice counts once, parameters do not count

    A number is `?` for what a wrapped module keeps. So it is for a layer in a combinator of your
    own that hands it another shape than x's, if no `_child_shapes(shape)` says so. Nothing is
    computed, unless a layer's `init` looks at its numbers: all is found out on the device "meta".

    Raises ValueError, as `net.init` does, where a layer does not fit its input; TypeError unless
    net is a Layer.

    >>> import funcnet as fn
    >>> inner = fn.Sequential(a=fn.ReLU(), b=fn.Sigmoid())
    >>> net = fn.Sequential(fn.Conv2d(8, 3), fn.Residual(inner))
    >>> print(summary(net, (3, 32, 32)))
    path  layer                               output       parameters  residual bytes
          Sequential of 2 layers              (8, 30, 30)         224          69,888
    0       Conv2d(8, kernel_size=3)          (8, 30, 30)         224          12,288
    1       Residual(Sequential of 2 layers)  (8, 30, 30)           0          57,600
    1         Sequential of 2 layers          (8, 30, 30)           0          57,600
    1.a         ReLU()                        (8, 30, 30)           0          28,800
    1.b         Sigmoid()                     (8, 30, 30)           0          28,800
                                              total               224          69,888
    """
    check_net("summary", net)
    lines = [("path", "layer", "output", "parameters", "residual bytes")]
    for row in _rows(net, as_shape(net, shape), "", 0):
        output = "?" if row.output is None else str(row.output)
        numbers = (_shown(row.parameters), _shown(row.residuals))
        lines.append((row.path, "  " * row.depth + row.layer, output, *numbers))
    lines.append(("", "", "total", *lines[1][3:]))
    return "\n".join(aligned(lines))


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of five columns; the last two hold numbers, aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    line = "  ".join(f"{{:{side}{width}}}" for side, width in zip("<<<>>", widths, strict=True))
    return [line.format(*cells) for cells in lines]


def _shown(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _rows(
    layer: Layer, shape: Shape | None, path: str, depth: int, held: list[Shape] | None = None
) -> Iterator[Row]:
    """The rows of a layer and of those in it; `held` has the shapes of its parameters, if known."""
    children = layer._children()
    output = count = kept = None
    below: list[_Known] = [(None, None)] * len(children)
    if shape is not None:
        try:
            output = tuple(layer.out_shape(shape))
            params = optree.tree_map(lambda leaf: leaf.to(_META), shaped(layer, shape))
            if held is None or held == _shapes(params):
                count = sum(leaf.numel() for leaf in optree.tree_leaves(params))
                kept = _residual_bytes(layer, params, shape)
                below = _below(layer, params, shape)
            else:
                output = None
        except (ValueError, TypeError, IndexError):
            # A user's combinator may hand something else to its layers than x.
            if not depth:
                raise
    yield Row(path, depth, name_of(layer), output, count, kept)
    for (name, child), (its_shape, its_own) in zip(children, below, strict=True):
        yield from _rows(child, its_shape, joined(path, name), depth + 1, its_own)


def _below(layer: Layer, params: Tree, shape: Shape) -> list[_Known]:
    """What is known of each child."""
    shapes, copies = layer._child_shapes(shape), len(layer._copy_axes())
    try:
        owns = [_shapes(own, copies) for own in layer._child_params(params)]
        return [*zip(shapes, owns, strict=True)]
    except (ValueError, TypeError, LookupError):  # a user's combinator may hold any tree
        return [(own, None) for own in shapes]


def _shapes(params: Tree, copies: int = 0) -> list[Shape]:
    """The shapes of the leaves, without the axes in front of them for the copies of a layer."""
    return [leaf.shape[copies:] for leaf in optree.tree_leaves(params)]


def _residual_bytes(layer: Layer, params: Tree, shape: Shape) -> int | None:
    """The memory of the residuals of one example; None if `fwd` cannot run without numbers."""
    # Some layers refuse a single example, others take integers.
    for batch, dtype in ((1, torch.float32), (2, torch.float32), (1, torch.int64)):
        x = torch.empty((batch, *shape), dtype=dtype, device=_META)
        try:
            with torch.no_grad():
                _, residuals = layer.fwd(params, x, key=key(0))
        except Exception:  # a layer of one's own may raise anything
            continue
        if any(_holds_tensors(leaf) for leaf in optree.tree_leaves(residuals)):
            return None
        own = _storages(residuals)
        return sum(own[address] for address in own.keys() - _storages(params).keys()) // batch
    return None


def _holds_tensors(leaf: Any) -> bool:
    """Whether an object that is not a node hides tensors, as a graph of autograd does."""
    attributes: Any = {} if isinstance(leaf, Key) else getattr(leaf, "__dict__", {})
    return any(isinstance(each, Tensor) for each in optree.tree_leaves(attributes))


def _storages(tree: Any) -> dict[int, int]:
    """The bytes of each storage of the tensors in a tree, by `storage_id`."""
    tensors = [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage_id(storage): storage.nbytes() for storage in storages}
