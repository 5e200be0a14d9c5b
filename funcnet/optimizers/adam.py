"""Adam and AdamW: steps scaled by running moments of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from funcnet.fields import Flag, Fractions, NonNegative
from funcnet.layer import Tree
from funcnet.ops import fused
from funcnet.ops.each import Each, Scalar, Tensors
from funcnet.optimizers.optimizer import Elementwise, Rate


class AdamState(NamedTuple):
    """The state of `Adam` and `AdamW` between two steps.

    `step` is the number of steps taken, `first` the running mean of g, `second` that of g², and
    `largest` the largest `second` so far, or () without amsgrad.
    """

    step: Tensor
    first: Tree
    second: Tree
    largest: Tree


@dataclass(frozen=True)
class Adam(Elementwise[AdamState]):
    """Adam, with the numbers of `torch.optim.Adam` in every step n = 1, 2, …:

        g ← −g if maximize;  g ← g + weight_decay · p
        m ← β₁ · m + (1 − β₁) · g
        v ← β₂ · v + (1 − β₂) · g²,  and s = v, or with amsgrad the largest v so far
        p ← p − lr / (1 − β₁ⁿ) · m / (√s / √(1 − β₂ⁿ) + eps)

    β₁ and β₂ are the `betas`. Real and imaginary parts are treated as separate numbers. `lr`
    is a number or a function of the number of steps taken, an int that starts at 0 (a 0-dimensional
    tensor where it is not known: under torch.func.vmap over states, and under torch.compile). The
    step is pure and differentiable; `step_` writes into the tensors of params and of the state
    instead, and returns them.

    For float32 and float64 on the CPU the numbers are bit for bit those of
    `torch.optim.Adam(fused=True)`, and up to rounding those of `fused=False`. This needs leaves
    without gaps in memory, and no autograd, torch.func or torch.compile. Elsewhere the numbers are
    those of `fused=False`.

    Raises ValueError or TypeError for numbers out of range (NaN included), and, before anything is
    changed, for trees that do not match.
    Kingma and Ba, "Adam: a method for stochastic optimization", 2015;
    https://docs.pytorch.org/docs/stable/generated/torch.optim.Adam.html

    >>> import torch
    >>> adam = Adam(lr=0.1)
    >>> params = {"weight": torch.tensor([1.0])}
    >>> state = adam.init(params)
    >>> params, state = adam.step(params, {"weight": torch.tensor([2.0])}, state)
    >>> params, int(state.step)
    ({'weight': tensor([0.9000])}, 1)
    """

    lr: Rate = 1e-3
    betas: Fractions = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.0
    amsgrad: Flag = False
    maximize: Flag = False

    _State: ClassVar[type] = AdamState
    _treats_complex_as_pairs: ClassVar[bool] = True
    _decouples_weight_decay: ClassVar[bool] = False

    def _kept(self) -> dict[str, bool]:
        return {
            "first moments": True,
            "second moments": True,
            "largest second moments": self.amsgrad,
        }

    def _update(
        self, each: Each, lr: Scalar, n: Scalar, p: Tensors, g: Tensors, *kept: Tensors
    ) -> tuple[Tensors, ...]:
        if fused.fits_adam(each, lr, p, g, *kept):
            return fused.adam(
                each,
                float(lr),
                int(n),
                p,
                g,
                *kept,
                is_adamw=self._decouples_weight_decay,
                amsgrad=self.amsgrad,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=self.weight_decay,
                eps=self.eps,
                maximize=self.maximize,
            )
        (m, v, largest), (beta1, beta2) = kept, self.betas
        if self.maximize:
            g = each.neg(g)
        if self.weight_decay and self._decouples_weight_decay:
            p = each.mul_(p, 1 - lr * self.weight_decay)
        elif self.weight_decay:
            g = each.add(g, p, self.weight_decay)
        m = each.lerp_(m, g, 1 - beta1)
        v = each.addcmul_(each.mul_(v, beta2), g, g, 1 - beta2)
        largest = each.maximum_(largest, v) if self.amsgrad else largest
        root = each.div_(each.sqrt(largest if self.amsgrad else v), (1 - beta2**n) ** 0.5)
        p = each.addcdiv_(p, m, each.shift_(root, self.eps), -lr / (1 - beta1**n))
        return p, m, v, largest


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay: the numbers of `torch.optim.AdamW` in every step.

    As `Adam`, but g stays as it is, and p ← (1 − lr · weight_decay) · p before the step.

    Raises what `Adam` raises.
    Loshchilov and Hutter, "Decoupled weight decay regularization", 2019;
    https://docs.pytorch.org/docs/stable/generated/torch.optim.AdamW.html

    >>> import torch
    >>> adamw = AdamW(lr=0.1, weight_decay=0.5)
    >>> params = {"weight": torch.tensor([1.0])}
    >>> adamw.step(params, {"weight": torch.tensor([0.0])}, adamw.init(params))[0]
    {'weight': tensor([0.9500])}
    """

    weight_decay: NonNegative = 1e-2

    _decouples_weight_decay: ClassVar[bool] = True
