"""The Huber loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcnet.fields import Positive
from funcnet.losses.loss import Loss, Reduction, as_scalar, share
from funcnet.ops.inplace import is_eager


@dataclass(frozen=True)
class Huber(Loss):
    """Quadratic for small errors, linear for large ones: Σ h(x − target) / n, or Σ h for "sum":

        h(d) = d²/2               where |d| ≤ δ
               δ · (|d| − δ/2)    elsewhere

    dx = clamp(x − target, −δ, δ) / n · grad. The residuals are x and target.

    Shapes: x and target alike, of any rank; the value is 0-dimensional. `delta` is δ > 0.
    Raises ValueError unless x and target have one shape: nothing is broadcast; TypeError unless
    they are floating-point tensors of one dtype on one device.
    P. J. Huber, "Robust estimation of a location parameter", 1964.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.HuberLoss.html

    >>> Huber().apply(torch.tensor([0.5, 5.0]), torch.tensor([0.0, 3.0]))
    tensor(0.8125)
    >>> Huber().vjp(torch.tensor([0.5, 5.0]), torch.tensor([0.0, 3.0]))
    tensor([0.2500, 0.5000])
    """

    delta: Positive = 1.0
    reduction: Reduction = "mean"

    def _fwd(self, x: Tensor, target: Any) -> tuple[Tensor, Any]:
        if is_eager():
            value = F.huber_loss(x, target, reduction=self.reduction, delta=self.delta)
        else:  # torch.func.vmap has no rules for PyTorch's kernels
            difference = x - target
            slope = _clamped(difference, self.delta)
            value = self._reduced(slope * (difference - slope / 2))
        return value, (x, target)

    def _bwd(self, residuals: Any, grad: Tensor | float) -> Tensor:
        x, target = residuals
        if is_eager():
            mean_or_sum = 1 if self.reduction == "mean" else 2
            dx: Tensor = torch.ops.aten.huber_loss_backward.default(
                as_scalar(grad, x), x, target, mean_or_sum, self.delta
            )
        else:
            slope = _clamped(x - target, self.delta)
            dx = slope * (grad * share(self.reduction, slope.numel()))
        return dx


def _clamped(difference: Tensor, delta: float) -> Tensor:
    """The difference clamped to ±delta, where delta may be beyond the range of its dtype."""
    most = min(delta, torch.finfo(difference.dtype).max)
    return difference.clamp(-most, most)
