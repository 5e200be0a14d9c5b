"""Branches that are multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import Tensor

from funcnet.checks import listed, name_of
from funcnet.combinators.branches import Branches
from funcnet.layer import Shape


@dataclass(frozen=True, init=False)
class Product(Branches):
    """y = f₀(x) ∘ f₁(x) ∘ …; dyᵢ = dy ∘ Π yⱼ over j ≠ i.

    Shapes: each result has y's shape, or size 1 along axes where y is larger, like the factor
    (C, 1, 1) of squeeze-and-excitation; dyᵢ is summed over these axes. Parameters: a tuple with one
    entry a layer; a dict for layers with names. Layer i draws from `fold_in(key, i)`.

    Raises ValueError for results of other shapes, TypeError for an argument that is not a layer, or
    for no layers.
    Hu et al., "Squeeze-and-excitation networks", CVPR 2018; Dauphin et al., "Language modeling with
    gated convolutional networks", ICML 2017.

    >>> import funcnet as fn
    >>> gated = fn.Product(fn.Conv2d(8, 3), fn.Sequential(fn.Conv2d(8, 3), fn.Sigmoid()))
    >>> gated.out_shape((3, 16, 16))
    (8, 14, 14)
    """

    def _joined_shape(self, shapes: Sequence[Shape]) -> Shape:
        columns = list(zip(*shapes, strict=False))
        largest = tuple(next((size for size in column if size != 1), 1) for column in columns)
        pairs = zip(columns, largest, strict=True)
        # Not `in (1, most)`, which torch.compile answers wrongly for sizes of a graph.
        fit = all(size == 1 or size == most for column, most in pairs for size in column)
        if len(set(map(len, shapes))) > 1 or not fit:
            raise ValueError(
                f"{name_of(self)}: expected results of one shape, up to sizes of 1, "
                f"got {listed(shapes)}"
            )
        return largest

    def _joined(self, ys: list[Tensor]) -> tuple[Tensor, Any]:
        return reduce(Tensor.mul, ys), ys if len(ys) > 1 else None

    def _part(self, ys: Any, dy: Tensor, i: int) -> Tensor:
        if ys is None:
            return dy
        part = reduce(Tensor.mul, [*ys[:i], *ys[i + 1 :]], dy)
        sizes = zip(ys[i].shape, dy.shape, strict=True)
        summed = [axis for axis, (mine, whole) in enumerate(sizes) if mine != whole]
        return part.sum(summed, keepdim=True) if summed else part
