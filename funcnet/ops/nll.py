"""The negative log-likelihood of classes, −Σ log_p[n, classes[n], …], by PyTorch's kernels.

Shapes: log_p (N, C, …); classes (N, …). Places whose class is `ignored` do not count.
"""

from __future__ import annotations

import torch
from torch import Tensor

_aten = torch.ops.aten
_FORWARD = {2: _aten.nll_loss_forward.default, 4: _aten.nll_loss2d_forward.default}
_BACKWARD = {2: _aten.nll_loss_backward.default, 4: _aten.nll_loss2d_backward.default}
"""By the number of axes of log_p."""

_REDUCTIONS = {"mean": 1, "sum": 2}
"""PyTorch's numbers for them."""


def forward(log_p: Tensor, classes: Tensor, reduction: str, ignored: int) -> tuple[Tensor, Tensor]:
    """(the sum, or the mean over all places that count; the number of these)."""
    log_p, classes = _as_images(log_p, classes)
    kernel = _FORWARD[log_p.ndim]
    value, count = kernel(log_p, classes, None, _REDUCTIONS[reduction], ignored)
    return value, count


def backward(grad: Tensor, log_p: Tensor, classes: Tensor, ignored: int) -> Tensor:
    """The gradient of grad times the sum: −grad at each place's class, and 0 elsewhere."""
    shape = log_p.shape
    log_p, classes = _as_images(log_p, classes)
    # The last argument, the number of places, does not matter for a sum.
    kernel = _BACKWARD[log_p.ndim]
    dlog_p: Tensor = kernel(grad, log_p, classes, None, _REDUCTIONS["sum"], ignored, grad)
    return dlog_p.reshape(shape)


def _as_images(log_p: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Both in shapes where log_p has 2 or 4 axes, for which PyTorch has kernels."""
    if log_p.ndim == 2:
        return log_p, classes
    if log_p.ndim == 3:
        return log_p.unsqueeze(2), classes.unsqueeze(1)
    return log_p.flatten(3), classes.flatten(2)
