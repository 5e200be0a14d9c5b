"""Dropout, of entries and of whole channels.

Given a key, the mask m (1 with probability 1 − p, else 0) decides which entries stay. They are
scaled so that the expectation of y is x:

    y = m ∘ x / (1 − p),  dx = m ∘ dy / (1 − p).

m follows from the key and from positions alone, not from x's values, layout, dtype or device, and
every example has its own. Without a key a layer evaluates: y = x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcnet.fields import Probability
from funcnet.keys import Key
from funcnet.layer import Layer
from funcnet.ops import counter, inplace
from funcnet.ops.need import Need


@dataclass(frozen=True)
class Dropout(Layer):
    """y = m ∘ x / (1 − p): entries of x are dropped with probability p; the formulas stand at the
    head of `funcnet.layers.dropout`.

    Drawing the mask m takes a dozen integer operations for two entries, on x's device. m is kept
    for the gradient, a bool for each entry. Under torch.func.vmap every slice sees the same key,
    and so the same mask.

    Shapes: any; y has x's shape. With p = 1, y is 0.
    Raises ValueError or TypeError unless p is a number in [0, 1].
    Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", 2014.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Dropout.html

    >>> import funcnet as fn
    >>> import torch
    >>> x = torch.ones(2, 4)
    >>> Dropout().apply((), x, key=fn.key(0))
    tensor([[0., 2., 0., 2.],
            [2., 2., 0., 0.]])
    >>> bool((Dropout().apply((), x) == x).all())
    True
    """

    p: Probability = 0.5

    _fresh = True

    def _keep(self, key: Key, x: Tensor) -> Tensor:
        """m, in a shape that broadcasts to x's."""
        return counter.bernoulli(key, 1 - self.p, x.shape, x.device)

    def _drop(self, x: Tensor, keep: Tensor) -> Tensor:
        """keep ∘ x / (1 − p)."""
        if self.p == 1:
            return torch.zeros_like(x)
        return inplace.multiply(x * keep, 1 / (1 - self.p))

    def _drop_(self, x: Tensor, keep: Tensor) -> Tensor:
        """`_drop`, written over x."""
        return x.zero_() if self.p == 1 else x.mul_(keep).mul_(1 / (1 - self.p))

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor | None]:
        if key is None:
            return x.clone(), None
        keep = self._keep(key, x)
        return self._drop(x, keep), keep

    def _bwd(self, params: Any, keep: Tensor | None, dy: Tensor, need: Need) -> Any:
        return (), dy.clone() if keep is None else self._drop(dy, keep)

    def _fwd_(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor | None]:
        if key is None:
            return x, None
        keep = self._keep(key, x)
        return self._drop_(x, keep), keep

    def _bwd_(self, params: Any, keep: Tensor | None, dy: Tensor, need: Need) -> Any:
        return (), dy if keep is None else self._drop_(dy, keep)


@dataclass(frozen=True)
class Dropout2d(Dropout):
    """y = m ∘ x / (1 − p) with one m for each channel of each image: whole channels are dropped.

    Shapes: x (N, C, H, W); y has x's shape. With p = 1, y is 0.
    Raises ValueError or TypeError unless p is a number in [0, 1] and x a batch of images.
    Tompson et al., "Efficient object localization using convolutional networks", 2015.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Dropout2d.html

    >>> import funcnet as fn
    >>> import torch
    >>> Dropout2d().apply((), torch.ones(1, 4, 1, 2), key=fn.key(0)).flatten(1)
    tensor([[0., 0., 2., 2., 0., 0., 2., 2.]])
    """

    _axes = "CHW"

    def _keep(self, key: Key, x: Tensor) -> Tensor:
        """m, (N, C, 1, 1)."""
        return counter.bernoulli(key, 1 - self.p, (*x.shape[:2], 1, 1), x.device)

    def _drop(self, x: Tensor, keep: Tensor) -> Tensor:
        return torch.zeros_like(x) if self.p == 1 else x * self._factors(x, keep)

    def _drop_(self, x: Tensor, keep: Tensor) -> Tensor:
        return x.zero_() if self.p == 1 else x.mul_(self._factors(x, keep))

    def _factors(self, x: Tensor, keep: Tensor) -> Tensor:
        """keep / (1 − p): the channels' factors are few, and x is read once."""
        return keep.to(x.dtype).mul_(1 / (1 - self.p))
