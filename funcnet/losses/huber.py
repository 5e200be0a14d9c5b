"""The Huber loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch.nn.functional as F
from torch import Tensor

from funcnet.fields import Number
from funcnet.losses.loss import Loss, Reduction, share


@dataclass(frozen=True)
class Huber(Loss):
    """Quadratic for small errors, linear for large ones: Σ h(x − target) / n, or Σ h for "sum":

        h(d) = d²/2               where |d| ≤ δ
               δ · (|d| − δ/2)    elsewhere

    dx = clamp(d, −δ, δ) / n · grad. The residual is the clamped difference.

    Shapes: x and target alike, of any rank; the value is 0-dimensional. `delta` is δ > 0.
    Raises ValueError unless x and target have one shape: nothing is broadcast.
    P. J. Huber, "Robust estimation of a location parameter", 1964.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.HuberLoss.html

    >>> import torch
    >>> Huber().apply(torch.tensor([0.5, 5.0]), torch.tensor([0.0, 3.0]))
    tensor(0.8125)
    """

    delta: Annotated[float, Number(0.0)] = 1.0
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.delta > 0:
            raise ValueError(f"Huber: expected delta > 0, got {self.delta}")

    def _fwd(self, x: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        value = F.huber_loss(x, target, reduction="none", delta=self.delta)
        return self._reduced(value), (x - target).clamp(-self.delta, self.delta)

    def _bwd(self, slope: Tensor, grad: Tensor | float) -> Tensor:
        return slope * (grad * share(self.reduction, slope.numel()))
