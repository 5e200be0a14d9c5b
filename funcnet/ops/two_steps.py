"""Nearest upsampling by s, then a convolution, one after the other: the definition.

    forward    u[i, j] = x[⌊i/s_h⌋, ⌊j/s_w⌋],  y = w ∗ u
    backward   dw and du of the convolution,  dx[i, j] = Σ du over the copies of pixel (i, j)

Large images are done tile by tile (`tiles.py`), so that u is never larger than a tile's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from funcnet.ops import convolution, native, processor, tiles
from funcnet.ops.accumulation import widened
from funcnet.ops.need import Need
from funcnet.ops.window import Pair, Window

_CHUNK_ENTRIES = 2**23
"""Entries of u made at a time."""


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Pair, window: Window) -> Tensor:
    """y (N, O, H′, W′) of x (N, C, H, W) upsampled by `scale`, and weight (O, C, kh, kw)."""
    size = window.count((scale[0] * x.shape[2], scale[1] * x.shape[3]))
    shape = torch.Size((x.shape[0], weight.shape[0], *size))
    y: Tensor | None = None
    x = native.layout(x)
    for tile in _tiles(x, scale, window):
        u = _upsampled(x[tile.source], scale)
        part, _ = convolution.convolve(u, weight, bias, tile.window, "auto")
        if part.shape == shape:
            return part
        y = native.empty(part, shape) if y is None else y
        y[tile.target] = part
    assert y is not None
    return y


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, scale: Pair, window: Window, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx), None where it is not needed."""
    dtype = x.dtype
    if not processor.multiplies_in_tiles(x):
        x, weight, grad = native.upcast(x), native.upcast(weight), native.upcast(grad)
    dweight: Tensor | None = None
    dx: Tensor | None = None
    x = native.layout(x)
    for tile in _tiles(x, scale, window):
        u = _upsampled(x[tile.source], scale)
        dy = grad[tile.target]
        dw, du = convolution.gradients(u, weight, dy, tile.window, "auto", need)
        if dw is not None:
            dweight = dw if dweight is None else widened(dweight) + dw
        if du is not None:
            dx = tiles.put(sum_blocks(du, scale), dx, tile, x)
    return native.cast(dweight, dtype), native.cast(dx, dtype)


def upsample(x: Tensor, scale: Pair) -> Tensor:
    """u (N, C, s_h·H, s_w·W) of x (N, C, H, W), in channels_last."""
    rows, columns = scale
    x = native.layout(x)
    if not rows & (rows - 1) and not columns & (columns - 1) and all(x.shape[1:]):
        # Powers of 2: for others, PyTorch's kernel rounds 1/s, and may take a neighbour.
        return F.interpolate(x, scale_factor=(float(rows), float(columns)))
    pixels = x.permute(0, 2, 3, 1).unsqueeze(2).unsqueeze(4)  # (N, H, 1, W, 1, C)
    blocks = pixels.expand(-1, -1, rows, -1, columns, -1)
    # Where expanding changes nothing, flatten() would return a view of x.
    copies = blocks.clone(memory_format=torch.contiguous_format)
    return copies.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def sum_blocks(grad: Tensor, scale: Pair) -> Tensor:
    """The adjoint of `upsample`: the sum over each block of s_h × s_w entries."""
    return F.avg_pool2d(grad, scale, divisor_override=1)


def _tiles(x: Tensor, scale: Pair, window: Window) -> Iterator[tiles.Tile]:
    """The tiles of x whose u has about `_CHUNK_ENTRIES` entries."""
    entries = scale[0] * scale[1] * x.shape[1]
    return tiles.cut(x, scale, window, entries, _CHUNK_ENTRIES)


def _upsampled(x: Tensor, scale: Pair) -> Tensor:
    return native.layout(x if scale == (1, 1) else upsample(x, scale))
