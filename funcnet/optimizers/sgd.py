"""Stochastic gradient descent, with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from funcnet.fields import Finite, Flag, NonNegative
from funcnet.layer import Tree
from funcnet.ops.each import Each, Scalar, Tensors
from funcnet.optimizers.optimizer import Elementwise, Rate


class SGDState(NamedTuple):
    """The state of `SGD` between two steps.

    `step` is the number of steps taken, `momentum` the velocities, or () without momentum.
    """

    step: Tensor
    momentum: Tree


@dataclass(frozen=True)
class SGD(Elementwise[SGDState]):
    """Stochastic gradient descent, with the numbers of `torch.optim.SGD` in every step:

        g ← −g if maximize;  g ← g + weight_decay · p
        v ← g at the first step, then momentum · v + (1 − dampening) · g
        p ← p − lr · (g + momentum · v if nesterov, v if momentum ≠ 0, else g)

    `lr` is a number or a function of the number of steps taken, an int that starts at 0 (a
    0-dimensional tensor where it is not known: under torch.func.vmap over states, and under
    torch.compile). The step is pure and differentiable: with params that require a gradient, as
    `nn.Parameter`s do, each new tree keeps the graph of all steps before it, unless those are taken
    under `torch.no_grad()`. `step_` writes into the tensors of params and of the velocities
    instead, and returns them.

    Raises ValueError or TypeError for numbers out of range (NaN included), and, before anything is
    changed, for trees that do not match.
    https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html

    >>> import torch
    >>> sgd = SGD(0.1, momentum=0.9)
    >>> params = {"weight": torch.tensor([1.0])}
    >>> state = sgd.init(params)
    >>> params, state = sgd.step(params, {"weight": torch.tensor([2.0])}, state)
    >>> params, int(state.step)
    ({'weight': tensor([0.8000])}, 1)
    """

    lr: Rate
    momentum: NonNegative = 0.0
    dampening: Finite = 0.0
    weight_decay: NonNegative = 0.0
    nesterov: Flag = False
    maximize: Flag = False

    _State: ClassVar[type] = SGDState

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not (self.momentum > 0 and self.dampening == 0):
            raise ValueError(
                "SGD: expected momentum > 0 and dampening 0 with nesterov=True, "
                f"got momentum={self.momentum}, dampening={self.dampening}"
            )

    def _kept(self) -> dict[str, bool]:
        return {"velocities": self.momentum > 0}

    def _update(
        self, each: Each, lr: Scalar, n: Scalar, p: Tensors, g: Tensors, *kept: Tensors
    ) -> tuple[Tensors, ...]:
        (v,) = kept
        if self.maximize:
            g = each.neg(g)
        if self.weight_decay:
            g = each.add(g, p, self.weight_decay)
        if self.momentum:
            v = each.add_(each.mul_(v, self.momentum), g, self._share_of_gradient(n))
            g = each.add(g, v, self.momentum) if self.nesterov else v
        return each.add_(p, g, -lr), v

    def _share_of_gradient(self, n: Scalar) -> Scalar:
        """1 − dampening, but 1 at the first step."""
        if not self.dampening:
            return 1.0
        if isinstance(n, Tensor):
            return 1.0 - self.dampening * (n > 1).double()
        return 1.0 if n == 1 else 1.0 - self.dampening
