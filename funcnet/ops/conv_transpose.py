"""Transposed convolution, the adjoint of a convolution, in one, two or three dimensions.

With w ∗ for a convolution and w ∗ᵀ for its adjoint, y = w ∗ᵀ x has the gradients

    dx = w ∗ dy,    dw = the gradient of ⟨w ∗ dy, x⟩ with respect to w.

Both are left to `ops/convolution.py`, whose kernels for them are up to twice as fast as PyTorch's
backward pass of transposed convolutions, and right in half precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from funcnet.ops import convolution, inplace, native
from funcnet.ops.need import Need
from funcnet.ops.window import Ints, Window


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, extra: Ints
) -> tuple[Tensor, Tensor]:
    """(y (N, O, …), x) of x (N, C, …) and weight (C, O/groups, …).

    x is returned in the memory format that the gradients want. `extra` entries are added at the end
    of each axis of y.
    """
    if window.of_height_1 is not None:
        image, kernel = x.unsqueeze(2), weight.unsqueeze(2)
        y, image = convolve(image, kernel, bias, window.of_height_1, (0, *extra))
        return y.squeeze(2), image.squeeze(2)
    x = native.layout(x)
    y = torch.convolution(
        native.upcast(x),
        native.layout(native.upcast(weight)),
        None,
        window.stride,
        window.before,
        window.dilation,
        True,
        extra,
        window.groups,
    )
    if bias is not None:
        y = inplace.add(y, bias.reshape(-1, *(1,) * (y.ndim - 2)))
    return y.to(x.dtype), x


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, window: Window, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx), None where it is not needed."""
    dweight = dx = None
    if need.input:
        dx, grad = convolution.convolve(grad, weight, None, window, "auto")
        for axis, length in enumerate(x.shape[2:], 2):
            dx = dx.narrow(axis, 0, length)
    else:
        grad = convolution.layout(grad)
    if need.params:
        # An output_padding of a stride or more makes room for more windows than x has entries.
        more = [n - m for n, m in zip(window.count(grad.shape[2:]), x.shape[2:], strict=True)]
        if any(more):
            x = F.pad(x, [side for n in reversed(more) for side in (0, n)])
        dweight, _ = convolution.gradients(
            grad, weight, x, window, "auto", need._replace(input=False)
        )
    return dweight, dx
