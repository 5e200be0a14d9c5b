"""Branches whose results are concatenated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from funcnet.checks import listed, name_of
from funcnet.combinators.branches import Branches
from funcnet.fields import Axis
from funcnet.layer import Layer, Shape


@dataclass(frozen=True, init=False)
class Concat(Branches):
    """y = [f₀(x), f₁(x), …] along axis `dim`; dyᵢ is the part of dy at yᵢ's place.

    `dim` counts the batch, so 1 is the axis of channels; a negative `dim` counts from the end. A
    level of a U-Net is `Concat(Identity(), Sequential(down, inner, up))`.

    Shapes: the results differ in their size along `dim` alone. Parameters: a tuple with one entry a
    layer; a dict for layers with names; none can have the name `dim`. Layer i draws from
    `fold_in(key, i)`.

    Raises ValueError for dim=0, which would mix the batch, and for results of other shapes;
    TypeError for an argument that is not a layer, or for no layers.
    Ronneberger et al., "U-Net", MICCAI 2015; Szegedy et al., "Going deeper with convolutions", CVPR
    2015.

    >>> import funcnet as fn
    >>> net = fn.Concat(fn.Conv2d(8, 3, padding=1), fn.Conv2d(4, 1))
    >>> net.out_shape((3, 16, 16))
    (12, 16, 16)
    """

    dim: Axis = 1

    def __init__(self, /, *layers: Layer, dim: int = 1, **named: Layer) -> None:
        if isinstance(dim, Layer):
            raise TypeError(
                f"Concat: expected dim to be an int, got {name_of(dim)}: "
                "a layer cannot have the name dim"
            )
        object.__setattr__(self, "dim", dim)
        super().__init__(*layers, **named)

    def _joined_shape(self, shapes: Sequence[Shape]) -> Shape:
        rank = 1 + len(shapes[0])
        axis = self.dim % rank if abs(self.dim) < rank else 0
        if axis == 0:
            raise ValueError(
                f"{name_of(self)}: expected results with an axis {self.dim} after the batch, "
                f"got {shapes[0]} without the batch"
            )
        first, *others = [(len(shape), *shape[: axis - 1], *shape[axis:]) for shape in shapes]
        if any(other != first for other in others):  # not a set: sizes of a graph have no hash
            raise ValueError(
                f"{name_of(self)}: expected results that differ along dim={self.dim} alone, "
                f"got {listed(shapes)} without the batch"
            )
        size = sum(shape[axis - 1] for shape in shapes)
        return (*shapes[0][: axis - 1], size, *shapes[0][axis:])

    def _joined(self, ys: list[Tensor]) -> tuple[Tensor, Any]:
        sizes = [y.shape[self.dim] for y in ys]
        return torch.cat(ys, self.dim), [*accumulate(sizes, initial=0)]

    def _part(self, ends: Any, dy: Tensor, i: int) -> Tensor:
        return dy.narrow(self.dim, ends[i], ends[i + 1] - ends[i])
