"""RMSprop: steps scaled by a running mean of the squared gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from funcnet.fields import Flag, NonNegative, Probability
from funcnet.layer import Tree
from funcnet.ops.each import Each, Scalar, Tensors
from funcnet.optimizers.optimizer import Elementwise, Rate


class RMSpropState(NamedTuple):
    """The state of `RMSprop` between two steps.

    `step` is the number of steps taken, `second` the running mean of g², `first` that of g, or ()
    unless centered, and `momentum` the velocities, or () without momentum.
    """

    step: Tensor
    second: Tree
    first: Tree
    momentum: Tree


@dataclass(frozen=True)
class RMSprop(Elementwise[RMSpropState]):
    """RMSprop, with the numbers of `torch.optim.RMSprop` in every step, bit for bit:

        g ← g + weight_decay · p
        s ← alpha · s + (1 − alpha) · g²
        m ← alpha · m + (1 − alpha) · g,  and m = 0 unless centered
        u = g / (√(s − m²) + eps)
        v ← momentum · v + u
        p ← p − lr · v

    Real and imaginary parts are treated as separate numbers. `lr` is a number or a function of
    the number of steps taken, an int that starts at 0 (a 0-dimensional tensor where it is not
    known: under torch.func.vmap over states, and under torch.compile). The step is pure and
    differentiable; `step_` writes into the tensors of params and of the state instead, and returns
    them.

    Raises ValueError or TypeError for numbers out of range (NaN included), and, before anything is
    changed, for trees that do not match.
    https://docs.pytorch.org/docs/stable/generated/torch.optim.RMSprop.html

    >>> import torch
    >>> rmsprop = RMSprop(lr=0.1, alpha=0.75)
    >>> params = {"weight": torch.tensor([1.0])}
    >>> state = rmsprop.init(params)
    >>> params, state = rmsprop.step(params, {"weight": torch.tensor([2.0])}, state)
    >>> params, int(state.step)
    ({'weight': tensor([0.8000])}, 1)
    """

    lr: Rate = 1e-2
    alpha: Probability = 0.99
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.0
    momentum: NonNegative = 0.0
    centered: Flag = False

    _State: ClassVar[type] = RMSpropState
    _treats_complex_as_pairs: ClassVar[bool] = True

    def _kept(self) -> dict[str, bool]:
        return {
            "second moments": True,
            "first moments": self.centered,
            "velocities": self.momentum > 0,
        }

    def _update(
        self, each: Each, lr: Scalar, n: Scalar, p: Tensors, g: Tensors, *kept: Tensors
    ) -> tuple[Tensors, ...]:
        s, m, v = kept
        if self.weight_decay:
            g = each.add(g, p, self.weight_decay)
        s = each.addcmul_(each.mul_(s, self.alpha), g, g, 1 - self.alpha)
        m = each.lerp_(m, g, 1 - self.alpha) if self.centered else m
        variance = each.addcmul(s, m, m, -1.0) if self.centered else s
        root = each.shift_(each.sqrt(variance), self.eps)
        if not self.momentum:
            return each.addcdiv_(p, g, root, -lr), s, m, v
        v = each.addcdiv_(each.mul_(v, self.momentum), g, root, 1.0)
        return each.add_(p, v, -lr), s, m, v
