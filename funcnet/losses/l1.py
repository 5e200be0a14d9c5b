"""The mean absolute error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from funcnet.losses.loss import Loss, Reduction, share
from funcnet.ops.inplace import multiply


@dataclass(frozen=True)
class L1(Loss):
    """The mean absolute error: Σ |x − target| / n, with n the number of entries, or 1 for "sum".

    dx = sign(x − target) / n · grad, and 0 where x = target. The residual is x − target.

    Shapes: x and target alike, of any rank; the value is 0-dimensional.
    Raises ValueError unless x and target have one shape: nothing is broadcast; TypeError unless
    they are floating-point tensors of one dtype on one device.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.L1Loss.html

    >>> import torch
    >>> L1().apply(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 3.0]))
    tensor(1.)
    >>> L1().vjp(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 3.0]))
    tensor([0.0000, 0.5000])
    """

    reduction: Reduction = "mean"

    def _fwd(self, x: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        difference = x - target
        return self._reduced(difference.abs()), difference

    def _bwd(self, difference: Tensor, grad: Tensor | float) -> Tensor:
        return multiply(difference.sign(), grad * share(self.reduction, difference.numel()))
