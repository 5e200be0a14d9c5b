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

from funcnet.ops import inplace, karatsuba, low_resolution, transposed, two_steps
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
    x: Tensor,
    weight: Tensor,
    grad: Tensor,
    scale: Pair,
    window: Window,
    method: str,
    need: Need,
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx), None where it is not needed."""
    chosen = implementation(x, weight, scale, window, method, backward=True)
    dweight, dx = chosen.gradients(x, weight, grad, scale, window, need)
    if chosen is low_resolution and inplace.has_values(x) and not _is_finite(dweight, dx):
        return two_steps.gradients(x, weight, grad, scale, window, need)
    return dweight, dx


def implementation(
    x: Tensor,
    weight: Tensor,
    scale: Pair,
    window: Window,
    method: str,
    backward: bool = False,
) -> Any:
    """The module that is fastest for images like x."""
    if not x.is_cpu or inplace.has_open_sizes(x):
        return transposed
    if method == "karatsuba" and karatsuba.is_faster(x, weight, scale, window):
        return karatsuba
    return low_resolution if _saves_much(weight, scale, backward) else two_steps


_SAVED, _SAVED_OF_MANY_TAPS, _SAVED_BACKWARD = 60, 120, 36
"""The saved products from which an entry of z saves time, of a few taps, of many, and backward.

Measured on an AMD EPYC (Zen 4), one thread, over scales 1, 2 and 3, kernels of 1 to 9 taps, and
1 to 128 channels of x and y."""

_MANY_TAPS = 49

_FEW_KERNELS = 4
"""Up to how many pairs of channels the gradients are mostly sums, which z has fewer of."""

_LANES = 16
"""A convolution of fewer channels takes as long as one of so many."""


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
    if backward:
        few = channels * out_channels <= _FEW_KERNELS
        return few or channels * (copies - 1) >= _SAVED_BACKWARD
    wasted = max(1.0, _LANES / out_channels)
    enough = _SAVED if math.prod(taps) < _MANY_TAPS else _SAVED_OF_MANY_TAPS
    return channels * (copies * wasted - 1) >= enough


def _is_finite(dweight: Tensor | None, dx: Tensor | None) -> bool:
    """Whether the gradients are finite, by the smaller one: ∞ and NaN in a sum of grad reach both.

    A sum that overflows makes the answer False where it might be True.
    """
    found = dx if dweight is None else dweight
    return found is None or math.isfinite(found.detach().sum().item())
