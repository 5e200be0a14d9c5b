"""The gradient of the negative log-likelihood of classes, −Σ log_p[n, classes[n], …]."""

from __future__ import annotations

import torch
from torch import Tensor

_SUM = 2  # PyTorch's number for this reduction


def gradient(grad: Tensor, log_p: Tensor, classes: Tensor, ignored: int) -> Tensor:
    """−grad at each place's class, 0 at the others and where the class is to be ignored.

    Shapes: grad (), log_p (N, C, …), classes (N, …).
    """
    found: Tensor
    if log_p.ndim == 2:
        found = _plain(grad, log_p, classes, None, _SUM, ignored, grad)
    else:  # the other kernel takes images alone
        images = log_p.unsqueeze(2) if log_p.ndim == 3 else log_p.flatten(3)
        places = classes.unsqueeze(1) if log_p.ndim == 3 else classes.flatten(2)
        found = _of_images(grad, images, places, None, _SUM, ignored, grad)
    return found.reshape(log_p.shape)


_plain = torch.ops.aten.nll_loss_backward.default
_of_images = torch.ops.aten.nll_loss2d_backward.default
