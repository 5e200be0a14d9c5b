"""Convolutions of images in bfloat16, by kernels that are right in it on every processor.

PyTorch's convolutions in bfloat16 return wrong numbers for some images with a dilation, on
processors with AMX for images of few columns with a stride and for some kernels (`native.py`), and
for gradients of images of few columns. The others are right, and so are products of matrices. With
the kh·kw·C numbers that a window sees as a row of X, the kernel as K (O, kh·kw·C), and y's and
grad's O numbers there as rows of Y and dY,

    Y = X·Kᵀ + bias,    dK = dYᵀ·X.

dx is made of convolutions without a stride. In one dimension, with stride s and padding p, the taps
that see pixel a = s·i + ρ are t = s·j + τ, for τ = (ρ + p) mod s and the J numbers j from which
t < k. With q = ⌊(ρ + p)/s⌋,

    dx[s·i + ρ] = Σ_j w[s·j + τ] · grad[i + q − j]:

every s-th pixel from ρ is a convolution of grad by every s-th tap from τ, turned round, with
padding J − 1 − q before. Where no tap sees them, J = 0, they are zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from funcnet.ops import inplace, native, patches, pixelwise, processor
from funcnet.ops.accumulation import widened
from funcnet.ops.need import Need
from funcnet.ops.window import Pair, Window

_CHUNK_ENTRIES = 2**20
"""Entries of X made at a time: few enough for a cache."""

_MANY = 24
"""From how many channels, of x and of y, products take less time than kernels in float32."""

_LARGE = 8
"""From how many rows and columns, of x and of y, PyTorch's gradients are right. They take 0.6 to
0.8 times as long as ours, from 8 to 128 channels."""

_MUCH, _MUCH_STRIDED = 2**22, 2**25
"""Multiplications from which dx by convolutions in bfloat16 is faster. All of these numbers were
measured on an AMD EPYC (Zen 4), which multiplies 2.4 times as fast in bfloat16."""

_IS_ANY_STRIDE_RIGHT = not processor.HAS_AMX
"""Whether PyTorch's kernels are right with any stride. On an AMD EPYC (Zen 4) 194,000 random ones
agree with float64; there they take 0.4 to 0.8 times as long as ours. On an Intel Xeon with AMX,
some of a single column in y are wrong, and some with a stride longer than the kernel write beyond
their memory. Of `_LARGE` images with one stride for both axes, no longer than the kernel, 5,000
agree, and their gradients."""


_SMALL_PRODUCTS, _SMALL_WEIGHT = 512, 2**17
"""Up to how many numbers a patch, and below how many a weight, PyTorch's kernels on processors with
AMX are faster than products over patches, forward and backward. From 3 to 128 channels, with 2×2
and 4×4 taps, they take 0.4 to 1.0 times as long forward, 0.4 to 1.1 times backward; with a weight
(768, 3, 16, 16) 1.3 and 8 times (Intel Xeon, one thread and two)."""


def serves(x: Tensor, window: Window) -> bool:
    """Whether to call these functions: for images in bfloat16, without dilation, in one group, on a
    processor that multiplies in bfloat16."""
    return (
        x.ndim == 4
        and processor.multiplies_bfloat16(x)
        and window.groups == 1
        and not window.is_dilated
        and not inplace.has_open_sizes(x)
        and x.numel() > 0
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """y (N, O, H′, W′) of x (N, C, H, W) and weight (O, C, kh, kw)."""
    if window.cuts_patches and not _kernel_beats_patches(x, weight, window):
        return patches.convolve(x, weight, bias, window)
    if window.is_strided and _is_strided_right(x, weight, window):
        return native.run_forward(x, weight, bias, window)
    if not (window.is_strided and _has_many(weight)):
        return native.convolve(x, weight, bias, window)
    kernel = patches.matrix(weight)
    parts = [pixelwise.convolve(seen, kernel, bias) for _, seen in _windows(x, window)]
    return parts[0] if len(parts) == 1 else native.layout(torch.cat(parts))


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, window: Window, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx), None where it is not needed."""
    if window.cuts_patches and not _kernels_beat_patches(x, weight, grad, window):
        return patches.gradients(x, weight, grad, window, need)
    if _has_right_kernels(x, weight, grad, window):
        sizes = window.stride, window.both, window.dilation, window.groups
        return native.run_backward(x, weight, grad, need, sizes)
    grad = native.layout(grad)
    much = _MUCH_STRIDED if window.is_strided else _MUCH
    multiplications = len(grad) * math.prod(grad.shape[2:]) * weight.numel()
    own = Need(need.params and _has_many(weight), need.input and multiplications >= much)
    others = Need(need.params and not own.params, need.input and not own.input)
    dweight, dx = None, None
    if others.params or others.input:
        dweight, dx = native.gradients(x, weight, grad, window, others)
    if own.params:
        dweight = _dweight(x, weight, grad, window)
    return dweight, _dx(x, weight, grad, window) if own.input else dx


def _kernel_beats_patches(x: Tensor, weight: Tensor, window: Window) -> bool:
    """Whether PyTorch's kernel for y is right, and faster than products over patches."""
    return (
        processor.HAS_AMX
        and window.is_strided
        and weight[0].numel() <= _SMALL_PRODUCTS
        and _is_strided_right(x, weight, window)
    )


def _kernels_beat_patches(x: Tensor, weight: Tensor, grad: Tensor, window: Window) -> bool:
    """The same of its gradients."""
    return (
        processor.HAS_AMX
        and window.is_strided
        and weight.numel() < _SMALL_WEIGHT
        and not patches.have_few_channels(weight)
        and _has_right_kernels(x, weight, grad, window)
    )


def _is_strided_right(x: Tensor, weight: Tensor, window: Window) -> bool:
    """Whether PyTorch's y in bfloat16 is right with a stride."""
    if _IS_ANY_STRIDE_RIGHT:
        return True
    sizes = *x.shape[2:], *window.count(x.shape[2:])
    is_large = window.sees_entries and min(sizes) >= _LARGE
    return is_large and _is_usual(window) and not native.overruns_tiles(x, weight, window)


def _is_usual(window: Window) -> bool:
    """Whether windows leave no gaps, and have one stride for both axes."""
    down, across = window.stride
    return down == across <= min(window.kernel_size)


def _has_right_kernels(x: Tensor, weight: Tensor, grad: Tensor, window: Window) -> bool:
    """Whether PyTorch's gradients in bfloat16 are right."""
    if window.is_strided and not (_IS_ANY_STRIDE_RIGHT or _is_usual(window)):
        return False
    return (
        window.sees_entries
        and window.is_even
        and min(*x.shape[2:], *grad.shape[2:]) >= _LARGE
        and min(weight.shape[:2]) > 1
    )


def _has_many(weight: Tensor) -> bool:
    return min(weight.shape[:2]) >= _MANY


def _windows(x: Tensor, window: Window) -> Iterator[tuple[slice, Tensor]]:
    """Yield a few examples at a time, and what each window sees of them, (n, kh·kw·C, H′, W′)."""
    unpadded = replace(window, sides=())
    entries = math.prod((*window.count(x.shape[2:]), *window.kernel_size, x.shape[1]))
    examples = math.ceil(len(x) / math.ceil(len(x) * entries / _CHUNK_ENTRIES))
    for start in range(0, len(x), examples):
        part = slice(start, start + examples)
        padded = native.layout(native.pad(x[part], window.flat_sides))
        yield part, patches.windows(padded, unpadded)


def _dweight(x: Tensor, weight: Tensor, grad: Tensor, window: Window) -> Tensor:
    total: Tensor | None = None
    for part, seen in _windows(x, window):
        dkernel = pixelwise.dkernel(seen, grad[part])
        total = dkernel if total is None else widened(total).add_(dkernel)
    assert total is not None
    out_channels, channels, *taps = weight.shape
    dweight = total.to(x.dtype).reshape(out_channels, *taps, channels).permute(0, 3, 1, 2)
    return native.like(weight, dweight)


class _Phase(NamedTuple):
    """Every s-th pixel of an axis: which they are, their taps, and the padding of grad."""

    pixels: slice
    taps: slice
    sides: Pair


def _phases(axis: int, size: int, count: int, window: Window) -> list[_Phase]:
    """The phases of an axis of `size` pixels and `count` windows that some taps see."""
    k, s, (p, _) = window.kernel_size[axis], window.stride[axis], window.sides[axis]
    found = []
    for first in range(min(s, size)):
        q, tap = divmod(first + p, s)
        taps, pixels = len(range(tap, k, s)), len(range(first, size, s))
        if taps:
            sides = taps - 1 - q, pixels - count + q
            found.append(_Phase(slice(first, None, s), slice(tap, None, s), sides))
    return found


def _dx(x: Tensor, weight: Tensor, grad: Tensor, window: Window) -> Tensor:
    turned = weight.transpose(0, 1)
    axes = enumerate(zip(x.shape[2:], grad.shape[2:], strict=True))
    phases = [_phases(axis, size, count, window) for axis, (size, count) in axes]
    dx = native.empty(x, x.shape).zero_() if window.is_strided else None
    for rows, columns in product(*phases):
        kernel = native.layout(turned[:, :, rows.taps, columns.taps].flip(2, 3))
        own = Window(tuple(kernel.shape[2:]), sides=(rows.sides, columns.sides))
        part = native.convolve(grad, kernel, None, own)
        if dx is None:
            return part
        dx[:, :, rows.pixels, columns.pixels] = part
    assert dx is not None
    return dx
