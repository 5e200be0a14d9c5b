"""Copies of one layer, each with parameters of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.checks import name_of
from funcnet.combinators.turns import Turns
from funcnet.initializers import Device
from funcnet.keys import Key, fold_in
from funcnet.layer import Shape, Spec, Tree
from funcnet.ops.autocast import without_autocast
from funcnet.ops.stacking import stack
from funcnet.ops.trees import flatten, structure_of


@dataclass(frozen=True)
class Repeat(Turns):
    """y = fₙ(… f₂(f₁(x))), n copies of one layer with parameters of their own.

    Shapes: any that the layer keeps. Parameters: the tree of one copy, where every leaf has a
    leading axis n: what `Sequential` of n such layers has, stacked. Copy i draws from
    `fold_in(key, i)`.

    Raises ValueError for n < 1, and for a shape that the layer does not keep; TypeError unless
    `layer` is a layer and n an int.

    >>> import funcnet as fn
    >>> net = fn.Repeat(fn.Conv2d(8, 3, padding=1), 4)
    >>> net.init(fn.key(0), (8, 16, 16))["weight"].shape
    torch.Size([4, 8, 8, 3, 3])
    """

    _joins = "stacked"

    def _init(self, key: Key, shape: Shape, dtype: torch.dtype | None, device: Device) -> Tree:
        each = [
            self.layer.init(fold_in(key, i), shape, dtype=dtype, device=device)
            for i in range(self.n)
        ]

        def stacked(*leaves: Tensor) -> Tensor:
            with without_autocast(leaves[0]):  # autocast would stack in another dtype
                return stack(leaves)

        return optree.tree_map(stacked, *each)

    def _check(self, params: Tree, x: Spec) -> Spec:
        leaves, structure = flatten(params)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.shape[:1] != (self.n,):
                name = ".".join(map(str, structure.paths()[i])) or "params"
                raise ValueError(
                    f"{name_of(self)}: expected {name} to have a leading axis of {self.n}, "
                    f"got shape {tuple(leaf.shape)}"
                )
        return super()._check(optree.tree_map(_first, params), x)

    def _copy_axes(self) -> Shape:
        return (self.n,)

    def _params_of_turns(self, params: Tree) -> list[Tree]:
        leaves, structure = flatten(params)
        rows = [leaf.unbind() for leaf in leaves]
        return [structure.unflatten([row[i] for row in rows]) for i in range(self.n)]

    def _gathered(self, params: Tree, so_far: Any, dparams: Tree, i: int) -> Any:
        found = [*(so_far or ()), structure_of(params).flatten_up_to(dparams)]
        if i:
            return found
        leaves = [stack(copies[::-1]) for copies in zip(*found, strict=True)]
        return structure_of(params).unflatten(leaves)


def _first(leaf: Any) -> Any:
    return leaf.select(0, 0) if isinstance(leaf, Tensor) else leaf
