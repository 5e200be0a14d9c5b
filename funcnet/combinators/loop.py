"""One layer several times with the same parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import optree
import torch

from funcnet.combinators.turns import Turns
from funcnet.initializers import Device
from funcnet.keys import Key, fold_in
from funcnet.layer import Shape, Tree, checks_itself, like_params
from funcnet.ops.inplace import add_over


@dataclass(frozen=True)
class Loop(Turns):
    """y = f(… f(f(x))), n times with the same parameters, whose gradients add up over the turns.

    Shapes: any that f keeps. Parameters: f's, drawn from `fold_in(key, 0)`; turn i draws from
    `fold_in(key, i)`.

    Raises ValueError for n < 1, and for a shape that f does not keep; TypeError unless f is a layer
    and n an int.
    Dehghani et al., "Universal transformers", ICLR 2019.

    >>> import funcnet as fn
    >>> net = fn.Loop(fn.Conv2d(8, 3, padding=1), 4)
    >>> net.init(fn.key(0), (8, 16, 16))["weight"].shape
    torch.Size([8, 8, 3, 3])
    """

    _joins = "added"

    def _init(self, key: Key, shape: Shape, dtype: torch.dtype | None, device: Device) -> Tree:
        return super()._init(fold_in(key, 0), shape, dtype, device)

    def _params_of_turns(self, params: Tree) -> list[Tree]:
        return [params] * self.n

    def _gathered(self, params: Tree, so_far: Any, dparams: Tree, i: int) -> Any:
        dparams = like_params(params, dparams)
        if so_far is None:
            return dparams
        # A layer that checks for itself may return gradients that somebody else holds.
        add = torch.add if checks_itself(self.layer) else add_over
        return optree.tree_map(add, so_far, dparams)
