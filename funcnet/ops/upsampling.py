"""Nearest upsampling followed by a convolution: the choice between its implementations.

    low_resolution    products with the small image, whose shifted copies are added
    transposed        a single transposed convolution, on devices where the number of calls counts,
                      and in graphs for any size, in which nothing may be decided by a size
    karatsuba         fewer products for many pixels, at scale 2 with 3×3 taps; method "karatsuba"
    two_steps         one step after the other, where few products are saved, and for gradients that
                      overflow at low resolution

Sums of products in any order are off by at most a multiple of ε times the sum of their magnitudes.
`karatsuba` subtracts what it has added before, so that its errors are relative to neighbouring
products: it has to be asked for. `low_resolution` adds entries of grad before it multiplies, which
may give ∞ or NaN where no product is large. Then the gradients are computed in two steps.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from funcnet.ops import few_channels, inplace, karatsuba, low_resolution, transposed, two_steps
from funcnet.ops.need import Need
from funcnet.ops.window import Pair, Window


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Pair, window: Window, method: str
) -> Tensor:
    """y (N, O, H′, W′) of x (N, C, H, W) upsampled by `scale`, and weight (O, C, kh, kw)."""
    chosen = implementation(x, weight, scale, window, method)
    y: Tensor = chosen.convolve(x, weight, bias, scale, window)
    return y


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, scale: Pair, window: Window, method: str, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx), None where it is not needed."""
    chosen = implementation(x, weight, scale, window, method, backward=True)
    dweight, dx = chosen.gradients(x, weight, grad, scale, window, need)
    if chosen is low_resolution and inplace.has_values(x) and not _is_finite(dweight, dx):
        return two_steps.gradients(x, weight, grad, scale, window, need)
    return dweight, dx


def implementation(
    x: Tensor, weight: Tensor, scale: Pair, window: Window, method: str, backward: bool = False
) -> Any:
    """The module that is fastest for images like x."""
    if not x.is_cpu or inplace.has_open_sizes(x):
        return transposed
    if method == "karatsuba" and karatsuba.is_faster(x, weight, scale, window):
        return karatsuba
    return low_resolution if _saves_much(weight, scale, backward) else two_steps


_MANY_TAPS = 25

_SAVED, _SAVED_BACKWARD = 132, 84
_SAVED_OF_MANY_TAPS, _SAVED_BACKWARD_OF_MANY_TAPS = 144, 192
"""The saved products from which an entry of z saves time, forward and backward.

Measured on an Intel Xeon with AVX-512, one thread, over scales 2, 3 and 4, kernels of 2 to 9 taps,
1 to 64 channels of x and y, images of 16×16 to 128×128 pixels. The one that is chosen takes more
than 1.25 times as long as the other in 38 of 1421 cases forward and in 70 backward, at most 2.6
times. On an AMD EPYC (Zen 4), up to 7 taps, 80, 72, 128 and 112 did best."""

_LANES, _LANES_BACKWARD = 16, 8
"""A convolution of fewer channels takes as long as one of so many, and so do the gradients."""

_OF_ONE_CHANNEL = 20
"""dx of one channel takes as long as that of so many."""


def _saves_much(weight: Tensor, scale: Pair, backward: bool) -> bool:
    """Whether low resolution is faster than two steps.

    For each source pixel and tap, with S = s_h·s_w, two steps make S·C·O products. Low resolution
    makes C·O, but writes and reads O entries of z: C·(S − 1) products are saved for each of them.
    """
    out_channels, channels, *taps = weight.shape
    copies = scale[0] * scale[1]
    if copies == 1:
        return False
    if taps == [1, 1]:  # z is y, at low resolution
        return True
    has_many_taps = math.prod(taps) >= _MANY_TAPS
    if backward:
        saved = copies * _products_backward(channels, out_channels) - 2 * channels
        return saved >= (_SAVED_BACKWARD_OF_MANY_TAPS if has_many_taps else _SAVED_BACKWARD)
    wasted = max(1.0, _LANES / out_channels)
    saved = channels * (copies * wasted - 1)
    return saved >= (_SAVED_OF_MANY_TAPS if has_many_taps else _SAVED)


def _products_backward(channels: int, out_channels: int) -> float:
    """The products that two steps make for a tap and a channel of y: for dweight, and for dx."""
    for_dweight = channels * max(1.0, _LANES_BACKWARD / out_channels)
    if few_channels.are_few(channels, out_channels):
        return for_dweight + channels
    return for_dweight + (_OF_ONE_CHANNEL if channels == 1 else max(channels, _LANES_BACKWARD))


def _is_finite(dweight: Tensor | None, dx: Tensor | None) -> bool:
    """Whether the gradients are finite, by the smaller one: ∞ and NaN in a sum of grad reach both.

    A sum that overflows makes the answer False where it might be True.
    """
    found = dx if dweight is None else dweight
    return found is None or math.isfinite(found.detach().sum().item())
