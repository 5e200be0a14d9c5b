"""Nearest upsampling followed by a convolution: the choice between its implementations.

    low_resolution    products with the small image, whose shifted copies are added
    phases            forward, one convolution of the small image for all phases
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
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from funcnet.ops import inplace, karatsuba, low_resolution, phases, processor, transposed, two_steps
from funcnet.ops.need import Need
from funcnet.ops.upsampling_times import BACKWARD, BACKWARD_IN_TILES, FORWARD, FORWARD_IN_TILES
from funcnet.ops.window import Ints, Pair, Window


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
    return _fastest(x, weight, scale, window, backward)


def _fastest(x: Tensor, weight: Tensor, scale: Pair, window: Window, backward: bool) -> Any:
    """The module that takes the least time on the CPU."""
    # torch.compile warns of a cache that it meets.
    choose = _by_sizes if torch.compiler.is_compiling() else _remembered
    pixels, in_tiles = len(x) * x.shape[2] * x.shape[3], processor.multiplies_in_tiles(x)
    return choose(pixels, tuple(weight.shape), scale, window, in_tiles, backward)


def _by_sizes(
    pixels: int, shape: Ints, scale: Pair, window: Window, in_tiles: bool, backward: bool
) -> Any:
    """The same, for images of so many pixels in all and a weight of this shape."""
    if scale == (1, 1):
        return two_steps
    if window.kernel_size == (1, 1):  # z is y, at low resolution
        return low_resolution
    if backward:
        low, two = BACKWARD_IN_TILES if in_tiles else BACKWARD
        times = {low_resolution: low.of(pixels, shape, scale)}
    else:
        low, all_at_once, two = FORWARD_IN_TILES if in_tiles else FORWARD
        times = {low_resolution: low.of(pixels, shape, scale)}
        times[phases] = all_at_once.of(pixels, shape, scale, phases.phases_of(scale, window))
    times[two_steps] = two.of(pixels, shape, scale, backward)
    return min(times, key=lambda module: times[module])


_remembered = lru_cache(maxsize=4096)(_by_sizes)


def _is_finite(dweight: Tensor | None, dx: Tensor | None) -> bool:
    """Whether the gradients are finite. One of them tells: ∞ and NaN in a sum of grad reach both.

    A sum that overflows makes the answer False where it might be True.
    """
    found = dx if dweight is None else dweight
    return found is None or math.isfinite(found.detach().sum().item())
