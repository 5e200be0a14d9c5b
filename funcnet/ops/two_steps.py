"""Nearest upsampling by s, then a convolution, one after the other: the definition.

forward    u[i, j] = x[⌊i/s_h⌋, ⌊j/s_w⌋],  y = w ∗ u
backward   dw and du of the convolution,  dx[i, j] = Σ du over the block of copies of pixel (i, j)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from funcnet.ops import native
from funcnet.ops.need import Need
from funcnet.ops.window import Pair, Window


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Pair, window: Window) -> Tensor:
    """y (N, O, H′, W′) of x (N, C, H, W) upsampled by `scale`, and weight (O, C, kh, kw)."""
    return native.convolve(native.layout(upsample(x, scale)), weight, bias, window)


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, scale: Pair, window: Window, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx), None where it is not needed."""
    dtype, x, weight, grad = x.dtype, native.upcast(x), native.upcast(weight), native.upcast(grad)
    upsampled = native.layout(upsample(x, scale))
    dweight, dupsampled = native.gradients(upsampled, weight, grad, window, need)
    dx = None if dupsampled is None else sum_blocks(dupsampled, scale)
    return native.cast(dweight, dtype), native.cast(dx, dtype)


def upsample(x: Tensor, scale: Pair) -> Tensor:
    """u (N, C, s_h·H, s_w·W) of x (N, C, H, W), in channels_last."""
    rows, columns = scale
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None]  # (N, H, 1, W, 1, C): copied whole
    blocks = pixels.expand(-1, -1, rows, -1, columns, -1)
    # Where expanding changes nothing, flatten() would return a view of x.
    copies = blocks.clone(memory_format=torch.contiguous_format)
    return copies.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def sum_blocks(grad: Tensor, scale: Pair) -> Tensor:
    """The adjoint of `upsample`: the sum over each block of s_h × s_w entries."""
    return F.avg_pool2d(grad, scale, divisor_override=1)
