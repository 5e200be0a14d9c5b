"""Functions of each entry alone: y = σ(x), dx = σ'(x) ∘ dy, for tensors of any rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcnet.keys import Key
from funcnet.layer import Layer
from funcnet.ops.need import Need

_threshold_backward = torch.ops.aten.threshold_backward


@dataclass(frozen=True)
class Activation(Layer):
    """y = σ(x) for each entry. Its slope is a function of y, which the next layer keeps anyway."""

    def _value(self, x: Tensor) -> Tensor:
        """σ(x)."""
        raise NotImplementedError

    def _slope(self, y: Tensor, dy: Tensor) -> Tensor:
        """σ'(x) ∘ dy, with σ' read off y."""
        raise NotImplementedError

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        y = self._value(x)
        return y, y

    def _bwd(self, params: Any, y: Tensor, dy: Tensor, need: Need) -> Any:
        return (), self._slope(y, dy) if need.input else None


@dataclass(frozen=True)
class InPlace(Activation):
    """An activation that can be written over x, and its gradient over dy."""

    def _value_(self, x: Tensor) -> Tensor:
        """`_value`, written over x."""
        raise NotImplementedError

    def _slope_(self, y: Tensor, dy: Tensor) -> Tensor:
        """`_slope`, written over dy where that saves memory."""
        return self._slope(y, dy)

    def _fwd_(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        y = self._value_(x)
        return y, y

    def _bwd_(self, params: Any, y: Tensor, dy: Tensor, need: Need) -> Any:
        return (), self._slope_(y, dy) if need.input else None


@dataclass(frozen=True)
class ReLU(InPlace):
    """The rectifier: y = max(x, 0), dx = dy where y > 0, else 0 (so the derivative at 0 is 0).

    Shapes: any; y has x's shape. NaN stays NaN.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.ReLU.html

    >>> ReLU().apply((), torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0., 0., 2.])
    """

    def _value(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def _value_(self, x: Tensor) -> Tensor:
        return torch.relu_(x)

    def _slope(self, y: Tensor, dy: Tensor) -> Tensor:
        dx: Tensor = _threshold_backward(dy, y, 0)
        return dx

    def _slope_(self, y: Tensor, dy: Tensor) -> Tensor:
        try:
            dx: Tensor = _threshold_backward.grad_input(dy, y, 0, grad_input=dy)
        except RuntimeError:  # autograd may refuse it
            dx = _threshold_backward(dy, y, 0)
        return dx


@dataclass(frozen=True)
class Sigmoid(InPlace):
    """The logistic function: y = 1 / (1 + e⁻ˣ), dx = y(1 − y) dy.

    Shapes: any; y has x's shape. Value and gradient are finite for every x that is not NaN, ±∞ too.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Sigmoid.html

    >>> Sigmoid().apply((), torch.tensor([-torch.inf, 0.0, torch.inf]))
    tensor([0.0000, 0.5000, 1.0000])
    """

    def _value(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def _value_(self, x: Tensor) -> Tensor:
        return torch.sigmoid_(x)

    def _slope(self, y: Tensor, dy: Tensor) -> Tensor:
        dx: Tensor = torch.ops.aten.sigmoid_backward(dy, y)
        return dx
