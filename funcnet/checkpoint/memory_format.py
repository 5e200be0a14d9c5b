"""The memory format of loaded parameters. Files are row-major, but kernels want other formats.

A tensor's values do not depend on the format, but the rounding of products may, and so may speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

from torch import Tensor

from funcnet.checkpoint.container import as_integers
from funcnet.layer import Layer, Tree
from funcnet.ops.stacking import stack
from funcnet.param import Layout


def lay_out_as_init(net: Layer, params: Tree) -> None:
    """Lay out parameters in memory as the network's `init` does. Nobody else may hold them.

    Parameters that do not fit the network stay as they are.
    """
    with suppress(Exception):  # a file may hold any tree beside any network
        for leaf, layout, copies in list(_layouts(net, params, 0)):
            leaf.data = _laid_out(as_integers(leaf.detach()), layout, copies).view(leaf.dtype)


def _layouts(layer: Layer, params: Tree, copies: int) -> Iterator[tuple[Tensor, Layout, int]]:
    """Yield (leaf, layout, the number of axes in front) of each leaf that its layer lays out."""
    children = layer._children()
    copies += len(layer._copy_axes())
    if children:
        for (_, child), own in zip(children, layer._child_params(params), strict=True):
            yield from _layouts(child, own, copies)
    elif isinstance(params, Mapping):
        for name, leaf in _named(params):
            layout = layer._layout(name)
            if layout is not None:
                yield leaf, layout, copies


def _named(params: Mapping[str, Tree], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _named(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _laid_out(leaf: Tensor, layout: Layout, copies: int) -> Tensor:
    if not copies:
        return layout(leaf)
    return stack([_laid_out(copy, layout, copies - 1) for copy in leaf.unbind()])
