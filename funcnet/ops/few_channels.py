"""Convolutions of many channels to few, without a stride: products with each tap, then their sums.

PyTorch's kernels make the channels of y in registers of 16 numbers, of which few channels leave
most unused: to 1 channel takes as long as to 16. Here the products come first, k² for each pixel
and channel of y, and y is the sum of their shifted copies: `low_resolution.py` at scale 1.

The gradient of the weight takes the same time, and so does dx from many channels of grad to few of
x: with padding p, a convolution by the taps in reverse,

    dx = w′ ∗ grad,    w′[c, o, t, r] = w[o, c, kh−1−t, kw−1−r],    padding k − 1 − p.
"""

from __future__ import annotations

import math

from torch import Tensor

from funcnet.ops import inplace, low_resolution, native
from funcnet.ops.need import Need
from funcnet.ops.window import Window

_SCALE = (1, 1)

_TIMES = 32
"""Channels are few where the others are so many times as many."""

_MUCH = 2**21
"""From how many products of x, or grad, with the taps for one channel this is faster.

Both were measured on an AMD EPYC (Zen 4), with one thread and with two, which save PyTorch's
kernels more: 32 channels to 1, 64 to 2 and 128 to 3, with 3×3 and 5×5 taps."""


def serve(x: Tensor, weight: Tensor, window: Window, backward: bool) -> bool:
    """Whether this is a convolution to few channels, or backward from few, and faster so."""
    kernels, taps = weight.shape[:2], math.prod(window.kernel_size)
    return (
        (are_few(*kernels) or (backward and are_few(*reversed(kernels))))
        and x.ndim == 4
        and x.is_cpu
        and x.element_size() >= 4
        and taps > 1
        and _is_plain(window)
        and inplace.is_eager()
        and len(x) * math.prod(x.shape[2:]) * max(kernels) * taps >= _MUCH
    )


def _is_plain(window: Window) -> bool:
    """Whether there is no stride, no dilation, one group, and no window beside x."""
    axes = zip(window.sides, window.kernel_size, strict=True)
    no_steps = not (window.is_strided or window.is_dilated)
    return no_steps and window.groups == 1 and all(0 <= p < k for ps, k in axes for p in ps)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """y (N, O, H′, W′) of x (N, C, H, W) and weight (O, C, kh, kw)."""
    return low_resolution.convolve(x, weight, bias, _SCALE, window)


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, window: Window, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx), None where it is not needed."""
    out_channels, channels = weight.shape[:2]
    own = Need(
        need.params and are_few(out_channels, channels),
        need.input and are_few(channels, out_channels),
    )
    others = Need(need.params and not own.params, need.input and not own.input)
    dweight, dx = None, None
    if others.params or others.input:
        dweight, dx = native.gradients(x, weight, grad, window, others)
    if own.params:
        only = own._replace(input=False)
        dweight, _ = low_resolution.gradients(x, weight, grad, _SCALE, window, only)
    return dweight, _dx(weight, grad, window) if own.input else dx


def are_few(channels: int, others: int) -> bool:
    """Whether a convolution of the others to these channels may be faster so."""
    return others >= _TIMES * channels


def _dx(weight: Tensor, grad: Tensor, window: Window) -> Tensor:
    axes = zip(window.kernel_size, window.sides, strict=True)
    sides = tuple((k - 1 - before, k - 1 - after) for k, (before, after) in axes)
    turned = weight.flip(2, 3).transpose(0, 1)
    return convolve(grad, turned, None, Window(window.kernel_size, sides=sides))
