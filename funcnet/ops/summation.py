"""The sum of trees that come one after another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from funcnet.ops.accumulation import widened
from funcnet.ops.inplace import add_over
from funcnet.ops.trees import flatten


def summed(trees: Iterator[Any]) -> Any:
    """The sum of at least one tree of tensors. It may be written over the first, unless that is of
    16 bits: many small terms would be lost in them."""
    total, structure = flatten(next(trees))
    dtypes = [leaf.dtype for leaf in total]
    total = [widened(leaf) for leaf in total]
    for tree in trees:
        leaves: list[Any] = structure.flatten_up_to(tree)
        total = [add_over(t, leaf) for t, leaf in zip(total, leaves, strict=True)]
        del tree, leaves  # before the next one is computed
    return structure.unflatten([leaf.to(d) for leaf, d in zip(total, dtypes, strict=True)])
