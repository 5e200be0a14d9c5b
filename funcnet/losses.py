"""Losses: how far x is from a target, as one number, and the gradient of that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

from torch import Tensor

from funcnet.autocast import without_autocast
from funcnet.layer import check_like, check_tensor, source

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Loss(ABC):
    """A function of x and a target to a scalar, with its gradient with respect to x.

    A loss of one's own is one class with `fwd` and `bwd`; `apply` and `vjp` follow.
    """

    @abstractmethod
    def fwd(self, x: Tensor, target: Tensor) -> tuple[Tensor, Any]:
        """(value, residuals); the value is a scalar."""

    @abstractmethod
    def bwd(self, residuals: Any, grad: Tensor | float = 1.0) -> Tensor:
        """dx, where grad is a scalar."""

    def apply(self, x: Tensor, target: Tensor) -> Tensor:
        """The value of the loss, a scalar."""
        return self.fwd(x, target)[0]

    def vjp(self, x: Tensor, target: Tensor, grad: Tensor | float = 1.0) -> Tensor:
        """dx, the gradient of grad · loss(x, target) with respect to x."""
        return self.bwd(self.fwd(x, target)[1], grad)


@dataclass(frozen=True, repr=False)
class MSE(Loss):
    """The mean squared error: Σ (x − target)² / n, with n the number of entries, or 1 for "sum".

    dx = 2 (x − target) / n · grad. The residual is x − target.

    Shapes: x and target alike, of any rank; the value is 0-dimensional.
    Raises ValueError unless x and target have one shape: nothing is broadcast.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.MSELoss.html

    >>> import torch
    >>> MSE().apply(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 3.0]))
    tensor(2.)
    >>> MSE().vjp(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 3.0]))
    tensor([0., 2.])
    """

    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if self.reduction not in get_args(Reduction):
            raise ValueError(f'MSE: expected reduction "mean" or "sum", got {self.reduction!r}')

    def fwd(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(value, x − target)."""
        check_tensor(self, "x", x)
        check_like(self, "target", target, "x", x)
        if x.shape != target.shape:
            raise ValueError(
                f"{self}: expected target of shape {tuple(x.shape)}, that of x, "
                f"got {tuple(target.shape)}"
            )
        difference = x - target
        squares = difference.square()
        with without_autocast(x):
            return (squares.mean() if self.reduction == "mean" else squares.sum()), difference

    def bwd(self, residuals: Tensor, grad: Tensor | float = 1.0) -> Tensor:
        """dx."""
        _check_scalar(self, grad, residuals)
        count = residuals.numel() if self.reduction == "mean" else 1
        return residuals * (grad * (2 / max(count, 1)))

    def __repr__(self) -> str:
        return source(self)


def _check_scalar(loss: Loss, grad: Any, like: Tensor) -> None:
    """Refuse a grad that is neither a number nor a 0-dimensional tensor like x."""
    if isinstance(grad, Real):
        return
    check_like(loss, "grad", grad, "x", like)
    if grad.ndim != 0:
        raise ValueError(f"{loss}: expected grad to be a scalar, got shape {tuple(grad.shape)}")
