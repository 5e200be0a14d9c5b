"""Functions of each entry alone: y = σ(x), dx = σ'(x) ∘ dy, for tensors of any rank.

The residual is y, which the next layer keeps anyway: both derivatives can be read off it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from funcnet.keys import Key
from funcnet.layer import (
    Layer,
    Shape,
    Tree,
    as_shape,
    check_grad,
    check_no_params,
    check_tensor,
    source,
)
from funcnet.layers import inplace


@dataclass(frozen=True, repr=False)
class Activation(Layer):
    """y = σ(x) for each entry, with a derivative that is a function of y."""

    _works_in_place = True

    def init(
        self,
        key: Key,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tree:
        """(): there is nothing to learn."""
        self.out_shape(shape)
        return ()

    def out_shape(self, shape: Sequence[int]) -> Shape:
        """The shape of x."""
        return as_shape(self, shape)

    def fwd(self, params: Tree, x: Tensor, *, key: Key | None = None) -> tuple[Tensor, Tensor]:
        """(y, y)."""
        check_no_params(self, params)
        check_tensor(self, "x", x)
        y = self._value(x)
        return y, y

    def bwd(
        self, params: Tree, residuals: Tensor, grad: Tensor, *, input_grad: bool = True
    ) -> tuple[Tree, Tensor | None]:
        """((), dx)."""
        check_no_params(self, params)
        check_grad(self, grad, residuals.shape, residuals)
        return (), self._derivative(residuals, grad) if input_grad else None

    def __repr__(self) -> str:
        return source(self)

    # In a Sequential, after a layer that owns its results, the same is done in place.

    def _apply_over(self, params: Tree, x: Tensor, *, key: Key | None = None) -> Tensor:
        """`apply`, written over x."""
        check_no_params(self, params)
        return self._value_(x)

    def _fwd_over(
        self, params: Tree, x: Tensor, *, key: Key | None = None
    ) -> tuple[Tensor, Tensor]:
        """`fwd`, written over x."""
        y = self._apply_over(params, x)
        return y, y

    def _bwd_over(
        self, params: Tree, residuals: Tensor, grad: Tensor, *, input_grad: bool = True
    ) -> tuple[Tree, Tensor | None]:
        """`bwd`, written over grad where that saves memory."""
        check_no_params(self, params)
        check_grad(self, grad, residuals.shape, residuals)
        return (), self._derivative_(residuals, grad) if input_grad else None

    @abstractmethod
    def _value(self, x: Tensor) -> Tensor:
        """σ(x)."""

    @abstractmethod
    def _value_(self, x: Tensor) -> Tensor:
        """`_value`, written over x: for a caller who owns it."""

    @abstractmethod
    def _derivative(self, y: Tensor, grad: Tensor) -> Tensor:
        """σ'(x) ∘ grad, with σ' read off y."""

    def _derivative_(self, y: Tensor, grad: Tensor) -> Tensor:
        """`_derivative`, written over grad where that is worth it."""
        return self._derivative(y, grad)


@dataclass(frozen=True, repr=False)
class ReLU(Activation):
    """The rectifier: y = max(x, 0), dx = dy where y > 0, else 0 (so the derivative at 0 is 0).

    Shapes: any; y has that of x. NaN stays NaN.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.ReLU.html

    >>> ReLU().apply((), torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0., 0., 2.])
    """

    def _value(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def _value_(self, x: Tensor) -> Tensor:
        return inplace.relu(x)

    def _derivative(self, y: Tensor, grad: Tensor) -> Tensor:
        dx: Tensor = torch.ops.aten.threshold_backward(grad, y, 0)
        return dx

    def _derivative_(self, y: Tensor, grad: Tensor) -> Tensor:
        return inplace.relu_derivative(y, grad)


@dataclass(frozen=True, repr=False)
class Sigmoid(Activation):
    """The logistic function: y = 1 / (1 + e⁻ˣ), dx = y(1 − y) dy.

    Shapes: any; y has that of x. Value and gradient are finite for every x that is not NaN, ±∞ too.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Sigmoid.html

    >>> Sigmoid().apply((), torch.tensor([-torch.inf, 0.0, torch.inf]))
    tensor([0.0000, 0.5000, 1.0000])
    """

    def _value(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def _value_(self, x: Tensor) -> Tensor:
        return inplace.sigmoid(x)

    def _derivative(self, y: Tensor, grad: Tensor) -> Tensor:
        dx: Tensor = torch.ops.aten.sigmoid_backward(grad, y)
        return dx
