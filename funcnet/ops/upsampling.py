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
from typing import Any, NamedTuple

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
    return low_resolution if _saves_time(weight, scale, backward) else two_steps


class _Costs(NamedTuple):
    """Times of the steps of both implementations, in multiplications of a large matrix product."""

    z: float
    """To write and read an entry of z."""
    half: float
    """The same for z summed along one axis."""
    u: float
    """The same for the upsampled image, and for its gradient."""
    product: float
    """A product of PyTorch's convolution."""
    lanes: int
    """A convolution of fewer channels takes as long as one of so many."""


_FORWARD = _Costs(z=50, half=300, u=350, product=0.7, lanes=10)
_BACKWARD = _Costs(z=80, half=0, u=300, product=0.4, lanes=8)
"""Measured on an Intel Xeon with AVX-512, one thread, over scales 2 to 5, kernels of 2 to 9 taps,
1 to 128 channels of x and y, 16 images of 12×12 pixels to one of 128×128. The implementation that
is chosen takes more than 1.25 times as long as the other in 89 of 5872 cases forward, at most 2.0
times, and in 147 backward, at most 2.6 times."""


def _saves_time(weight: Tensor, scale: Pair, backward: bool) -> bool:
    """Whether low resolution is faster than two steps.

    For each source pixel, tap and channel of y, with S = s_h·s_w, it makes C products where two
    steps make S·C, twice as many backward. It writes and reads an entry of z, and s_h/kh of one
    that is summed along one axis; two steps S·C/(kh·kw·O) of the upsampled image.
    """
    out_channels, channels, kh, kw = weight.shape
    copies = scale[0] * scale[1]
    if copies == 1:
        return False
    if kh == kw == 1:  # z is y, at low resolution
        return True
    costs = _BACKWARD if backward else _FORWARD
    low = channels * (2 if backward else 1) + costs.z + costs.half * scale[0] / kh
    products = channels * _waste(out_channels, channels, costs.lanes)
    if backward:  # for dweight, and for dx
        products += channels * _waste(channels, out_channels, costs.lanes)
    entries = channels / (kh * kw * out_channels)
    return low < copies * (costs.product * products + costs.u * entries)


def _waste(channels: int, others: int, lanes: int) -> float:
    """How many times as long a convolution of `others` to `channels` takes as its products."""
    return 1.0 if few_channels.are_few(channels, others) else max(1.0, lanes / channels)


def _is_finite(dweight: Tensor | None, dx: Tensor | None) -> bool:
    """Whether the gradients are finite. One of them tells: ∞ and NaN in a sum of grad reach both.

    A sum that overflows makes the answer False where it might be True.
    """
    found = dx if dweight is None else dweight
    return found is None or math.isfinite(found.detach().sum().item())
