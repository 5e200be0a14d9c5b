"""Work on memory that funcnet has just made itself, in one pass and without new memory.

Such calls are an economy and no more: where torch refuses them (under torch.func.vmap, autograd or
torch.compile), the same numbers come by way of new memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

_threshold_backward = torch.ops.aten.threshold_backward


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, written over x."""
    if not torch.compiler.is_compiling():
        try:
            return x.add_(y)
        except RuntimeError:
            pass
    return x + y


def add_into(out: Tensor, x: Tensor, y: Tensor) -> None:
    """out = x + y."""
    if not torch.compiler.is_compiling():
        try:
            torch.add(x, y, out=out)
            return
        except RuntimeError:
            pass
    out.copy_(x).add_(y)


def relu_derivative(y: Tensor, grad: Tensor) -> Tensor:
    """grad where y > 0, else 0, written over grad."""
    dx: Tensor
    if not torch.compiler.is_compiling():
        try:
            dx = _threshold_backward.grad_input(grad, y, 0, grad_input=grad)
            return dx
        except RuntimeError:
            pass
    dx = _threshold_backward(grad, y, 0)
    return dx
