"""Cross-entropy of logits with classes or probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcnet.checks import name_of
from funcnet.compat import log_softmax_backward
from funcnet.fields import Index, Probability
from funcnet.losses.loss import Loss, Reduction, as_scalar
from funcnet.ops import nll
from funcnet.ops.accumulation import accumulator_dtype, widened
from funcnet.ops.inplace import has_values


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """The cross-entropy of logits x with probabilities t over the C classes of axis 1:

        ℓ = −Σ_c t′_c · log p_c,    p = softmax(x),    t′ = (1 − ε) · t + ε / C

    The value is Σ ℓ / n over all places (N, …), or Σ ℓ for "sum"; n is the number of places. A
    class stands for probability 1 of that class. Places whose class is `ignore_index` count neither
    in Σ ℓ nor in n. If no place counts, the mean is NaN, and dx is 0. `label_smoothing` is ε.

        dx = (p · Σ_c t′_c − t′) / n · grad,    0 where ignored

    The residuals are log p, the target and n.

    Shapes: x (N, C, …); target (N, …) of int64 classes, or (N, C, …) of probabilities in x's dtype;
    the value is 0-dimensional.
    Raises ValueError or TypeError for a target of another shape or dtype, for probabilities with an
    `ignore_index` ≥ 0, and for a class out of range where its value can be read: on the CPU, not
    under torch.func or torch.compile.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html

    >>> CrossEntropy().apply(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor(0.6931)
    >>> CrossEntropy().vjp(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([[ 0.5000, -0.5000]])
    """

    label_smoothing: Probability = 0.0
    ignore_index: Index = -100
    reduction: Reduction = "mean"

    def _check(self, x: Tensor, target: Any) -> None:
        if x.ndim < 2:
            raise ValueError(
                f"{name_of(self)}: expected x of shape (N, C, …), got {tuple(x.shape)}"
            )
        if not isinstance(target, Tensor):
            raise self._unfit(type(target).__name__)
        expected = (*x.shape[:1], *x.shape[2:])
        if target.is_floating_point():
            if target.shape == expected:
                raise self._unfit(f"{target.dtype} of the shape of classes")
            super()._check(x, target)
            if self.ignore_index >= 0:
                raise ValueError(
                    f"{name_of(self)}: expected classes, since ignore_index is one, "
                    "got probabilities"
                )
            return
        if target.dtype != torch.int64:
            raise self._unfit(str(target.dtype))
        if target.device != x.device:
            raise TypeError(
                f"{name_of(self)}: expected target on {x.device}, x's device, got {target.device}"
            )
        if target.shape != expected:
            advice = ""
            if target.shape == x.shape[:-1]:
                advice = ": the logits of the classes are along axis 1 of x, not along the last"
            elif target.shape == x.shape:
                advice = f": probabilities are {x.dtype}, as x is"
            raise ValueError(
                f"{name_of(self)}: expected target of classes of shape {expected}, "
                f"got {tuple(target.shape)}{advice}"
            )
        self._check_classes(target, x.shape[1])

    def _check_classes(self, target: Tensor, classes: int) -> None:
        if not (has_values(target) and target.numel()):
            return
        least, greatest = map(int, target.aminmax())
        if least < 0 or greatest >= classes:  # perhaps only ignore_index is
            wrong = target[(target != self.ignore_index) & ((target < 0) | (target >= classes))]
            if len(wrong):
                raise ValueError(
                    f"{name_of(self)}: expected classes in [0, {classes}), got {int(wrong[0])}"
                )

    def _unfit(self, got: str) -> TypeError:
        return TypeError(
            f"{name_of(self)}: expected target to be int64 classes or probabilities, got {got}"
        )

    def _fwd(self, x: Tensor, target: Any) -> tuple[Tensor, Any]:
        log_p = x.log_softmax(1)
        if target.is_floating_point():
            value = -(self._smoothed(target) * log_p).sum(dtype=accumulator_dtype(x.dtype))
            count = self._count(target).to(value.dtype)
            value = value / count if self.reduction == "mean" else value
        else:
            # 16 bits do not hold the sum over many places.
            exact = widened(log_p)
            value, count = nll.forward(exact, target, self.reduction, self.ignore_index)
            if self.label_smoothing:
                kept = target != self.ignore_index
                of_all = torch.where(kept, exact.sum(1), 0.0).sum()
                of_all = of_all / count if self.reduction == "mean" else of_all
                value = value * (1 - self.label_smoothing) - of_all * self._of_each_class(x)
        return value.to(x.dtype), (log_p, target, count)

    def _bwd(self, residuals: Any, grad: Tensor | float) -> Tensor:
        log_p, target, count = residuals
        scale = as_scalar(grad / count if self.reduction == "mean" else grad, log_p)
        if target.is_floating_point():
            dlog_p = self._smoothed(target) * -scale
        elif not self.label_smoothing:
            dlog_p = nll.backward(scale, log_p, target, self.ignore_index)
        else:
            of_class = scale * (1 - self.label_smoothing)
            kept = (target != self.ignore_index).unsqueeze(1)
            dlog_p = nll.backward(of_class, log_p, target, self.ignore_index)
            dlog_p = dlog_p - torch.where(kept, scale * self._of_each_class(log_p), 0.0)
        return log_softmax_backward(dlog_p, log_p, 1, log_p.dtype)

    def _smoothed(self, probabilities: Tensor) -> Tensor:
        """t′."""
        if self.label_smoothing:
            return probabilities * (1 - self.label_smoothing) + self._of_each_class(probabilities)
        return probabilities

    def _of_each_class(self, x: Tensor) -> float:
        """ε / C, the probability that smoothing adds to each class."""
        return self.label_smoothing / max(x.shape[1], 1)

    def _count(self, target: Any) -> Tensor:
        """n, the number of places that count."""
        if target.is_floating_point():
            places = target.numel() // max(target.shape[1], 1)
            count: Tensor = target.new_full((), places, dtype=torch.int64)
        else:
            count = (target != self.ignore_index).sum()
        return count
