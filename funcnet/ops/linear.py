"""The product of rows with a matrix, in a form that compiles under torch.func.vmap, too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b along the last axis."""
    if x.ndim == 3 and torch.compiler.is_compiling():
        # PyTorch 2.13 fails for three axes under torch.func.vmap, if sizes are left open.
        y: Tensor = F.linear(x.flatten(0, 1), weight, bias)
        return y.reshape(*x.shape[:2], y.shape[1])
    return F.linear(x, weight, bias)
