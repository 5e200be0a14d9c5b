"""The arithmetic that a training step needs, and how fast this machine multiplies matrices.

A convolution needs its products forward, as many for the gradient of the weights, and as many for
that of x, which the first layer with weights can do without. Upsampling followed by a k×k
convolution needs k² products for each pixel of the small image, whatever the scale (funcnet's
`low_resolution.py` says why; where `karatsuba.py` makes do with fewer, this counts as speed). A
product and its sum are two operations.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timing import duration, side_by_side
from translate import shapes

import funcnet as fn

_PIXELS = 4096


@dataclass(frozen=True)
class Rates:
    """Operations a second in large matrix products, asked for in two ways."""

    mm: float
    conv1x1: float

    @property
    def best(self) -> float:
        """The faster of the two."""
        return max(self.mm, self.conv1x1)


def operations(net: fn.Sequential, shape: tuple[int, ...], batch: int) -> int:
    """Additions and multiplications needed by a training step, but for elementwise ones."""
    before = list(shapes(net, shape))
    products = [_products(*sizes) for sizes in zip(net, before, before[1:], strict=False)]
    first = next((i for i, n in enumerate(products) if n), 0)
    passes = [2 if i == first else 3 for i in range(len(products))]
    return 2 * batch * sum(n * times for n, times in zip(products, passes, strict=True))


def _products(layer: fn.Layer, before: tuple[int, ...], after: tuple[int, ...]) -> int:
    """Products of the forward pass for one example."""
    if isinstance(layer, fn.Conv2d):
        kernel = before[0] // layer.groups * math.prod(layer.kernel_size)
        return kernel * math.prod(after)
    if isinstance(layer, fn.UpsampleConv2d):
        return layer.out_channels * math.prod(layer.kernel_size) * math.prod(before)
    return 0


def rates(dtype: torch.dtype, device: torch.device) -> Rates:
    """Rates measured here and now, at the best of a few sizes."""
    measured = [_rates(channels, dtype, device) for channels in (256, 512, 1024)]
    return Rates(max(rate.mm for rate in measured), max(rate.conv1x1 for rate in measured))


def _rates(channels: int, dtype: torch.dtype, device: torch.device) -> Rates:
    """Rates of a product (_PIXELS, channels) × (channels, channels)."""
    x = torch.randn(_PIXELS // 256, channels, 16, 16, dtype=dtype, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(channels, channels, 1, 1, dtype=dtype, device=device)
    pixels, matrix = x.permute(0, 2, 3, 1).flatten(0, 2), kernel.flatten(1)
    ways = {"mm": lambda: torch.mm(pixels, matrix), "conv1x1": lambda: F.conv2d(x, kernel)}
    clocks = {
        name: functools.partial(duration, product, device=device) for name, product in ways.items()
    }
    times = side_by_side(clocks, 0.3)
    work = 2 * _PIXELS * channels**2
    return Rates(**{way: work / time.median for way, time in times.items()})
