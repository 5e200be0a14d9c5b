"""Nearest upsampling followed by a convolution: the choice between its implementations.

    low_resolution    products with the small image, whose shifted copies are added
    karatsuba         fewer products for many pixels, at scale 2 with 3×3 taps
    transposed        a single transposed convolution, on devices where the number of calls counts

The upsampled image is never made.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from funcnet.ops import karatsuba, low_resolution, transposed
from funcnet.ops.need import Need
from funcnet.ops.window import Pair, Window


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Pair, window: Window) -> Tensor:
    """y (N, O, H′, W′) of x (N, C, H, W) upsampled by `scale`, and weight (O, C, kh, kw)."""
    y: Tensor = implementation(x, weight, scale, window).convolve(x, weight, bias, scale, window)
    return y


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, scale: Pair, window: Window, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx), None where it is not needed."""
    chosen = implementation(x, weight, scale, window)
    dweight, dx = chosen.gradients(x, weight, grad, scale, window, need)
    return dweight, dx


def implementation(x: Tensor, weight: Tensor, scale: Pair, window: Window) -> Any:
    """The module that is fastest for images like x."""
    if not x.is_cpu:
        return transposed
    many = karatsuba.is_faster(x, weight, scale, window)
    return karatsuba if many else low_resolution
