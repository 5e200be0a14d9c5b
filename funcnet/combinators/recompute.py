"""Less memory for more time: residuals are computed again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from funcnet.combinators.wrapper import Wrapper
from funcnet.keys import Key
from funcnet.layer import Tree
from funcnet.ops.need import Need
from funcnet.running import run_apply, run_bwd, run_fwd


@dataclass(frozen=True)
class Recompute(Wrapper):
    """y = f(x), keeping x alone: the backward pass computes f and its residuals again.

    It uses the same key again, so that dropout drops the same entries. A chain of n layers cut into
    √n such segments keeps about 2√n of its n intermediate results, for one more forward pass.

    Shapes, parameters and key: f's.
    Raises TypeError unless f is a layer.
    Chen et al., "Training deep nets with sublinear memory cost", arXiv:1604.06174, 2016.

    >>> import funcnet as fn
    >>> segment = fn.Sequential(fn.Conv2d(8, 3, padding=1), fn.Sigmoid())
    >>> net = fn.Sequential(fn.Recompute(segment), fn.Recompute(segment))
    >>> net.out_shape((8, 16, 16))
    (8, 16, 16)
    """

    _joins = "apart"

    def _fwd(self, params: Tree, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        return run_apply(self.layer, params, x, key), (x, key)

    def _bwd(self, params: Tree, residuals: Any, dy: Tensor, need: Need) -> tuple[Tree, Any]:
        x, key = residuals
        again = run_fwd(self.layer, params, x, key)[1]
        # Nobody else has seen these residuals.
        return run_bwd(self.layer, params, again, dy, need._replace(consume=True))
