"""Parameters that do not learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import optree
from torch import Tensor

from funcnet.combinators.wrapper import Wrapper
from funcnet.keys import Key
from funcnet.layer import Tree, zeros_like
from funcnet.ops.need import Need
from funcnet.running import dx_alone, run_apply, run_fwd


@dataclass(frozen=True)
class Frozen(Wrapper):
    """y = f(x), whose parameters do not learn: their gradients are zeros, and dx is f's.

    No time is spent on the gradients of the parameters, nor on dx where everything below is frozen
    too. To autograd, the parameters of `apply` are constants.

    To an optimiser, zeros are gradients like any others: weight decay still moves the parameters,
    and so does momentum from steps before they were frozen. A `Partition` with the optimiser None
    for these parameters leaves them as they are.

    Shapes, parameters and key: f's.
    Raises TypeError unless f is a layer.

    >>> import funcnet as fn
    >>> import torch
    >>> net = fn.Sequential(fn.Frozen(fn.Conv2d(8, 3)), fn.ReLU(), fn.Conv2d(1, 3))
    >>> params = net.init(fn.key(0), (1, 8, 8))
    >>> x, target = torch.ones(2, 1, 8, 8), torch.ones(2, 1, 4, 4)
    >>> _, grads = fn.value_and_grad(net, fn.MSE())(params, x, target)
    >>> bool(grads[0]["weight"].any()), bool(grads[2]["weight"].any())
    (False, True)
    """

    _joins = "zeros"

    def _learns(self, params: Tree) -> bool:
        return False

    def _frozen_params(self, params: Tree) -> list[tuple[Tensor, Any]]:
        return [(leaf, ...) for leaf in optree.tree_leaves(params)]

    def _apply(self, params: Tree, x: Tensor, key: Key | None) -> Tensor:
        return run_apply(self.layer, _detached(params), x, key)

    def _fwd(self, params: Tree, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        return run_fwd(self.layer, _detached(params), x, key)

    def _bwd(self, params: Tree, residuals: Any, dy: Tensor, need: Need) -> tuple[Tree, Any]:
        dparams = zeros_like(params) if need.params else None
        return dparams, dx_alone(self.layer, _detached(params), residuals, dy, need)


def _detached(params: Tree) -> Tree:
    return optree.tree_map(Tensor.detach, params)
