"""Cross-entropy of logits with classes or probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcnet.checks import name_of
from funcnet.fields import Index, Probability
from funcnet.losses.loss import Loss, Reduction
from funcnet.ops.inplace import is_plain


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """The cross-entropy of logits x with probabilities t over the C classes of axis 1:

        ℓ = −Σ_c t′_c · log p_c,    p = softmax(x),    t′ = (1 − ε) · t + ε / C

    The value is Σ ℓ over all places but the ignored, divided by their number, or not for "sum". A
    class index stands for probability 1 of that class. `label_smoothing` is ε. Places whose class
    is `ignore_index` are ignored; if all are, the mean is NaN, as in PyTorch.

        dx = (p · Σ_c t′_c − t′) / n · grad,    0 where ignored

    The residuals are log p and the target.

    Shapes: x (N, C, …); target (N, …) of int64 classes, or (N, C, …) of probabilities in x's dtype;
    the value is 0-dimensional.
    Raises ValueError or TypeError for a target of another shape or dtype, and for a class out of
    range where values can be seen: on the CPU, not under torch.func and torch.compile.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html

    >>> CrossEntropy().apply(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor(0.6931)
    """

    label_smoothing: Probability = 0.0
    ignore_index: Index = -100
    reduction: Reduction = "mean"

    def _check(self, x: Tensor, target: Any) -> None:
        if x.ndim < 2:
            raise ValueError(
                f"{name_of(self)}: expected x of shape (N, C, …), got {tuple(x.shape)}"
            )
        if isinstance(target, Tensor) and target.is_floating_point():
            return super()._check(x, target)
        if not isinstance(target, Tensor) or target.dtype != torch.int64:
            got = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise TypeError(
                f"{name_of(self)}: expected target to be int64 classes or probabilities, got {got}"
            )
        if target.device != x.device:
            raise TypeError(
                f"{name_of(self)}: expected target on {x.device}, x's device, got {target.device}"
            )
        expected = (*x.shape[:1], *x.shape[2:])
        if target.shape != expected:
            raise ValueError(
                f"{name_of(self)}: expected target of classes of shape {tuple(expected)}, "
                f"got {tuple(target.shape)}"
            )
        return self._check_classes(target, x.shape[1])

    def _check_classes(self, target: Tensor, classes: int) -> None:
        if not (target.is_cpu and is_plain() and target.numel()):
            return
        wrong = (target != self.ignore_index) & ((target < 0) | (target >= classes))
        if wrong.any():
            raise ValueError(
                f"{name_of(self)}: expected classes in [0, {classes}), got {int(target[wrong][0])}"
            )

    def _fwd(self, x: Tensor, target: Any) -> tuple[Tensor, Any]:
        log_p = x.log_softmax(1)
        if target.is_floating_point():
            value = -(self._smoothed(target) * log_p).sum(1)
        else:
            kept = target != self.ignore_index
            at = torch.where(kept, target, 0).unsqueeze(1)
            value = -(1 - self.label_smoothing) * log_p.gather(1, at).squeeze(1)
            if self.label_smoothing:
                value = value - self.label_smoothing * log_p.mean(1)
            value = torch.where(kept, value, 0.0)
        total: Tensor = value.sum()
        if self.reduction == "mean":
            total = total / self._entries(target)
        return total, (log_p, target)

    def _bwd(self, residuals: Any, grad: Tensor | float) -> Tensor:
        log_p, target = residuals
        p, scale = log_p.exp(), grad
        if self.reduction == "mean":
            scale = grad / self._entries(target)
        if target.is_floating_point():
            smoothed = self._smoothed(target)
            dx: Tensor = (p * smoothed.sum(1, keepdim=True) - smoothed) * scale
            return dx
        kept = (target != self.ignore_index).unsqueeze(1)
        at = torch.where(kept, target.unsqueeze(1), 0)
        dx = p - self.label_smoothing / log_p.shape[1] if self.label_smoothing else p
        hit = torch.full_like(at, -1, dtype=p.dtype) * (1 - self.label_smoothing)
        dx = dx.scatter_add(1, at, hit)
        # Not times 0: of logits that are not finite, an ignored place says nothing.
        return torch.where(kept, dx * scale, 0.0)

    def _smoothed(self, probabilities: Tensor) -> Tensor:
        if not self.label_smoothing:
            return probabilities
        share = self.label_smoothing / probabilities.shape[1]
        return probabilities * (1 - self.label_smoothing) + share

    def _entries(self, target: Any) -> Any:
        if target.is_floating_point():
            return target.numel() / max(target.shape[1], 1)
        return (target != self.ignore_index).sum()
