"""Gradients of an image's convolution in bfloat16, by what is right in it on every processor.

PyTorch's own kernels for these gradients return wrong numbers for some images (`native.py`). But
its convolutions with stride 1 are right, and so are products of matrices. With the kh·kw·C numbers
that a window sees as a row of X, and grad's O numbers there as a row of dY,

    dK = dYᵀ·X,    dx[a, b] = Σ weight[o, c, t, r] · grad[o, a − t + p, b − r + p]:

with stride 1, dx is a convolution of grad by the kernel turned round, with padding k − 1 − p.
"""

from __future__ import annotations

import math

from torch import Tensor

from funcnet.ops import inplace, native, patches, pixelwise
from funcnet.ops.need import Need
from funcnet.ops.window import Window

_CHUNK_ENTRIES = 2**22
"""Entries of X made at a time."""

_MANY = 32
"""From how many channels of x this takes less time than gradients in float32: half as much on an
AMD EPYC (Zen 4)."""


def is_faster(x: Tensor, window: Window) -> bool:
    """Whether this is faster than gradients in float32."""
    return (
        x.ndim == 4
        and x.shape[1] >= _MANY
        and pixelwise.is_multiplied(x)
        and window.groups == 1
        and not inplace.has_open_sizes(x)
        and x.numel() > 0
    )


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, window: Window, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx), None where it is not needed."""
    grad = native.layout(grad)
    dweight = _dweight(x, weight, grad, window) if need.params else None
    if not need.input:
        return dweight, None
    if _is_turned(window):
        return dweight, _dx(weight, grad, window)
    return dweight, native.gradients(x, weight, grad, window, need._replace(params=False))[1]


def _dweight(x: Tensor, weight: Tensor, grad: Tensor, window: Window) -> Tensor:
    out_channels, channels, *taps = weight.shape
    x = native.layout(native.pad(x, window.flat_sides))
    examples = max(1, _CHUNK_ENTRIES // (math.prod(taps) * channels * math.prod(grad.shape[2:])))
    dkernel: Tensor | None = None
    for start in range(0, len(x), examples):
        part = slice(start, start + examples)
        dk = native.upcast(pixelwise.dkernel(patches.windows(x[part], window), grad[part]))
        dkernel = dk if dkernel is None else dkernel.add_(dk)
    assert dkernel is not None
    dweight = dkernel.to(x.dtype).reshape(out_channels, *taps, channels).permute(0, 3, 1, 2)
    return native.like(weight, dweight)


def _is_turned(window: Window) -> bool:
    """Whether dx is a convolution of grad."""
    pads = zip(window.kernel_size, window.before, strict=True)
    plain = not (window.is_strided or window.is_dilated) and window.is_even
    return plain and all(0 <= p < k for k, p in pads)


def _dx(weight: Tensor, grad: Tensor, window: Window) -> Tensor:
    turned = native.layout(weight.flip(2, 3).transpose(0, 1))
    sides = tuple((k - 1 - p,) * 2 for k, p in zip(window.kernel_size, window.before, strict=True))
    return native.convolve(grad, turned, None, Window(window.kernel_size, sides=sides))
