"""Branches that are added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from funcnet.checks import listed, name_of
from funcnet.combinators.branches import Branches
from funcnet.layer import Shape
from funcnet.ops.inplace import add_over


@dataclass(frozen=True, init=False)
class Sum(Branches):
    """y = f₀(x) + f₁(x) + …; dyᵢ = dy.

    Shapes: the results have one shape, y's. Parameters: a tuple with one entry a layer; a dict for
    layers with names. Layer i draws from `fold_in(key, i)`.

    Raises ValueError for results of different shapes, TypeError for an argument that is not a
    layer, or for no layers.

    >>> import funcnet as fn
    >>> net = fn.Sum(wide=fn.Conv2d(8, 5, padding=2), narrow=fn.Conv2d(8, 1))
    >>> params = net.init(fn.key(0), (3, 16, 16))
    >>> params["wide"]["weight"].shape, net.out_shape((3, 16, 16))
    (torch.Size([8, 3, 5, 5]), (8, 16, 16))
    """

    def _joined_shape(self, shapes: Sequence[Shape]) -> Shape:
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                f"{name_of(self)}: expected results of one shape, got {listed(shapes)}"
            )
        return shapes[0]

    def _joined(self, ys: list[Tensor]) -> tuple[Tensor, Any]:
        y, is_own = ys[0], self._is_new(0)
        for other in ys[1:]:
            y, is_own = (add_over(y, other) if is_own else y + other), True
        return y, None

    def _part(self, kept: Any, dy: Tensor, i: int) -> Tensor:
        return dy
