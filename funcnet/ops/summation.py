"""The sum of trees that come one after another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import optree
from torch import Tensor

from funcnet.ops.accumulation import widened
from funcnet.ops.inplace import add_over


def summed(trees: Iterator[Any]) -> Any:
    """The sum of at least one tree of tensors. It may be written over the first, unless that is of
    16 bits: many small terms would be lost in them."""
    first = next(trees)
    dtypes: Any = optree.tree_map(lambda leaf: leaf.dtype, first)
    total = optree.tree_map(widened, first)
    del first
    for tree in trees:
        total = optree.tree_map(add_over, total, tree)
        del tree  # before the next one is computed
    return optree.tree_map(Tensor.to, total, dtypes)
