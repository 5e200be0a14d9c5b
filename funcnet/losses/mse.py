"""The mean squared error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from funcnet.losses.loss import Loss, Reduction, share


@dataclass(frozen=True)
class MSE(Loss):
    """The mean squared error: Σ (x − target)² / n, with n the number of entries, or 1 for "sum".

    dx = 2 (x − target) / n · grad. The residual is x − target.

    Shapes: x and target alike, of any rank; the value is 0-dimensional.
    Raises ValueError unless x and target have one shape: nothing is broadcast; TypeError unless
    they are floating-point tensors of one dtype on one device.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.MSELoss.html

    >>> import torch
    >>> MSE().apply(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 3.0]))
    tensor(2.)
    >>> MSE().vjp(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 3.0]))
    tensor([0., 2.])
    """

    reduction: Reduction = "mean"

    def _fwd(self, x: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        difference = x - target
        return self._reduced(difference.square()), difference

    def _bwd(self, difference: Tensor, grad: Tensor | float) -> Tensor:
        return difference * (grad * (2 * share(self.reduction, difference.numel())))
