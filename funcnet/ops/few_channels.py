"""Convolutions of many channels to few, without a stride: products with each tap, then their sums.

PyTorch's kernels compute the channels of y in registers of 16 numbers. With few channels, most of a
register is unused: a convolution to 1 channel takes as long as one to 16. Here the products come
first, k² for each pixel and channel of y, and y is the sum of their shifted copies:
`low_resolution.py` at scale 1.

The gradient of the weight takes the same time, and so does dx from many channels of grad to few of
x: with padding p, a convolution by the taps in reverse,

    dx = w′ ∗ grad,    w′[c, o, t, r] = w[o, c, kh−1−t, kw−1−r],    padding k − 1 − p.
"""

from __future__ import annotations

import math

from torch import Tensor

from funcnet.ops import inplace, low_resolution
from funcnet.ops.need import Need
from funcnet.ops.window import Window

_SCALE = (1, 1)

_TIMES = 32
"""Channels on one side are few if the other side has at least so many times as many."""

_MUCH = 2**21
"""From how many products of x, or grad, with the taps for one channel this is faster.

Both were measured on an AMD EPYC (Zen 4), with one thread and with two, which save PyTorch's
kernels more: 32 channels to 1, 64 to 2 and 128 to 3, with 3×3 and 5×5 taps."""


def which_are_faster(x: Tensor, weight: Tensor, window: Window) -> tuple[bool, bool]:
    """Whether this is faster for y and dweight, and whether for dx."""
    shape = weight.shape
    out_channels, channels = shape[0], shape[1]
    # Most convolutions end here, without another call: small ones would take longer.
    if channels < _TIMES * out_channels and out_channels < _TIMES * channels:
        return False, False
    to_few, from_few = are_few(out_channels, channels), are_few(channels, out_channels)
    taps = math.prod(window.kernel_size)
    is_faster = (
        x.ndim == 4
        and x.is_cpu
        and x.element_size() >= 4
        and window.is_plain
        and taps > 1
        and inplace.is_eager()
        and len(x) * math.prod(x.shape[2:]) * max(channels, out_channels) * taps >= _MUCH
    )
    return to_few and is_faster, from_few and is_faster


def are_few(channels: int, others: int) -> bool:
    """Whether a convolution from `others` channels to `channels` may be faster here."""
    return others >= _TIMES * channels


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """y (N, O, H′, W′) of x (N, C, H, W) and weight (O, C, kh, kw)."""
    return low_resolution.convolve(x, weight, bias, _SCALE, window)


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, window: Window, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx), None where it is not needed."""
    dweight = None
    if need.params:
        only = need._replace(input=False)
        dweight, _ = low_resolution.gradients(x, weight, grad, _SCALE, window, only)
    return dweight, _dx(weight, grad, window) if need.input else None


def _dx(weight: Tensor, grad: Tensor, window: Window) -> Tensor:
    axes = zip(window.kernel_size, window.sides, strict=True)
    sides = tuple((k - 1 - before, k - 1 - after) for k, (before, after) in axes)
    turned = weight.flip(2, 3).transpose(0, 1)
    return convolve(grad, turned, None, Window(window.kernel_size, sides=sides))
