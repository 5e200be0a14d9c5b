"""Binary cross-entropy of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from funcnet.losses.loss import Loss, Reduction, share
from funcnet.ops.inplace import multiply


@dataclass(frozen=True)
class BCEWithLogits(Loss):
    """The binary cross-entropy of logits x and probabilities t, Σ ℓ / n, or Σ ℓ for "sum":

        ℓ = −t · log σ(x) − (1 − t) · log(1 − σ(x)) = (1 − t) · x − log σ(x)

    n is the number of entries. The second form is finite for every finite x.

        dx = (σ(x) − t) / n · grad

    The residuals are x and t.

    Shapes: x and target alike, of any rank; the value is 0-dimensional.
    Raises ValueError unless x and target have one shape: nothing is broadcast; TypeError unless
    they are floating-point tensors of one dtype on one device.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.BCEWithLogitsLoss.html

    >>> import torch
    >>> BCEWithLogits().apply(torch.tensor([0.0, 1e4]), torch.tensor([1.0, 1.0]))
    tensor(0.3466)
    >>> BCEWithLogits().vjp(torch.tensor([0.0, 1e4]), torch.tensor([1.0, 1.0]))
    tensor([-0.2500,  0.0000])
    """

    reduction: Reduction = "mean"

    def _fwd(self, x: Tensor, target: Any) -> tuple[Tensor, Any]:
        value = F.binary_cross_entropy_with_logits(x, target, reduction=self.reduction)
        return value, (x, target)

    def _bwd(self, residuals: Any, grad: Tensor | float) -> Tensor:
        x, target = residuals
        return multiply(x.sigmoid() - target, grad * share(self.reduction, x.numel()))
