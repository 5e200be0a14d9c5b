"""Nearest upsampling by s, then a convolution with k taps, at the cost of the small image.

In one dimension, with padding p before, output s·i + a (phase a = 0 … s−1) sees through tap t the
source pixel i + q_at, q_at = ⌊(a − p + t)/s⌋:

    y[s·i + a] = Σ_t w_t · x[i + q_at].

A product of a tap with a source pixel thus serves every phase. So the products are made first, one
for each tap and source pixel, and y is a sum of shifted copies of them:

    z_t[i] = w_t · x[i],    y[s·i + a] = Σ_t z_t[i + q_at],

k products for each source pixel, where the upsampled signal would take s·k. In two dimensions they
are k² products of size C×O instead of s²·k²: a single matrix product for the whole image. The
sums are taken along one axis after the other. The gradients are the adjoint of the sums, and the
two gradients of the matrix product:

    forward    z = K·x,  y = spread(z)            K: (kh·kw·O, C), the weights of each tap
    backward   dz = gather(dy),  dx = Kᵀ·dz,  dK = dz·xᵀ

    gather     dz_t[i] = Σ_a dy[s·(i − q_at) + a]

These are sums of s neighbours in dy, where those outside of it count as zero:

    dz_t[i] = b[s·i + p − t],    b[e] = Σ_{v<s} dy[e + v].

With k ≥ s, b is made first, and dz is what windows of k entries with stride s see of it, their taps
in reverse. With k < s, few entries of b are seen, and the sums are taken tap by tap.

The upsampled image is never made. In half precision the sums are taken in float32, as PyTorch's
kernels take theirs: here every addition would round to 16 bits. The products are in float32, too,
where the processor does not multiply in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from funcnet.ops import inplace, native, patches, pixelwise, tiles
from funcnet.ops.accumulation import widened
from funcnet.ops.need import Need
from funcnet.ops.window import Pair, Window

_CHUNK_ENTRIES = 2**21
"""Entries of z made at a time: what is written should still be in the cache when it is read."""

_FEW_ENTRIES = 2**20
"""Entries that are made at once, however small the images: four megabytes in float32. With a
quarter of them, 4 and 16 images of 256 channels take 1.05 to 1.5 times as long (Intel Xeon)."""

_LANES = 16
"""With fewer channels than a vector register has lanes, planes are added faster than pixels."""

_MANY_TAPS = 25
"""From how many taps windows over dy itself, at scale 1, are faster than sums tap by tap: with 3×3
taps they take 1.1 to 1.6 times as long, with 5×5 and 9×9 0.4 to 1.0 times (Intel Xeon)."""

Term: TypeAlias = tuple[Tensor, int]
"""(source, shift): source[i + shift], one term of the sum that gives entry i."""

Shifts: TypeAlias = list[list[int]]
"""q_at at [a][t]."""


def layout(weight: Tensor) -> Tensor:
    """The same weights (O, C, kh, kw), on the CPU in the order of K: tap by tap."""
    if not weight.is_cpu:
        return weight
    return weight.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Pair, window: Window) -> Tensor:
    """y (N, O, H′, W′) of x (N, C, H, W) upsampled by `scale`, and weight (O, C, kh, kw)."""
    dtype, x, weight = x.dtype, pixelwise.upcast(x), pixelwise.upcast(weight)
    size = window.count((scale[0] * x.shape[2], scale[1] * x.shape[3]))
    kernel = _kernel(weight)
    in_planes = len(weight) < _LANES
    products = pixelwise.convolve_to_planes if in_planes else pixelwise.convolve
    y: Tensor | None = None
    x, is_eager, taps = native.layout(x), inplace.is_eager(), (*window.kernel_size, -1)
    # Autograd takes a tile for a leaf that was written to through another view.
    at_once = bias is not None and inplace.is_untracked(x, weight, bias)
    for tile in _tiles(x, weight, scale, window):
        made = products(native.layout(x[tile.source]), kernel)
        z = torch.unflatten(native.upcast(made), 1, taps)  # (n, kh, kw, O, H, W)
        if y is None:
            y = empty(made if is_eager else z, (len(x), len(weight), *size))
        target = y[tile.target]
        out = target if target.dtype == z.dtype else empty(z, target.shape)
        half = empty(z, (len(z), *z.shape[2:4], out.shape[2], z.shape[-1]))  # (n, kw, O, H′, W)
        _spread(z, half, shifts_of(0, scale, tile.window), dim=-2)
        _spread(half, out, shifts_of(1, scale, tile.window), dim=-1)
        if bias is not None and at_once:  # while the tile is in the cache
            out.add_(bias[:, None, None])
        if out is not target:
            target.copy_(out)
    assert y is not None
    return (y if bias is None or at_once else y + bias[:, None, None]).to(dtype)


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, scale: Pair, window: Window, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx), None where it is not needed."""
    dtype, x, weight = x.dtype, pixelwise.upcast(x), pixelwise.upcast(weight)
    in_reverse, seen = _sees_most_sums(scale, window), Window(window.kernel_size, scale)
    kernel = _kernel(weight.flip(2, 3) if in_reverse else weight)
    dkernel: Tensor | None = None
    dx: Tensor | None = None
    x, grad = native.layout(x), _layout(grad, len(weight))
    for tile in _tiles(x, weight, scale, window):
        pixels, dy = native.layout(x[tile.source]), grad[tile.target]
        if in_reverse:
            dz = patches.windows(neighbour_sums(dy, scale, tile.window), seen)
        else:
            dz = _by_taps(dy, pixels.shape[2:], scale, tile.window)
        dk, d = pixelwise.gradients(pixels, kernel, dz.to(x.dtype), need)
        if dk is not None:
            dkernel = widened(dk) if dkernel is None else dkernel.add_(dk)
        dx = tiles.put(d, dx, tile, x)
    dx = native.cast(dx, dtype)
    if dkernel is None:
        return None, dx
    dtaps = dkernel.reshape(*window.kernel_size, *weight.shape[:2])
    dtaps = dtaps.flip(0, 1) if in_reverse else dtaps
    dweight = native.like(weight, dtaps.permute(2, 3, 0, 1)).to(dtype)
    return dweight, dx


def _kernel(weight: Tensor) -> Tensor:
    """K (kh·kw·O, C)."""
    return weight.permute(2, 3, 0, 1).flatten(0, 2)


def shifts_of(axis: int, scale: Pair, window: Window) -> Shifts:
    """q_at of one axis."""
    s, (before, _) = scale[axis], window.sides[axis]
    return [
        [(phase - before + tap) // s for tap in range(window.kernel_size[axis])]
        for phase in range(s)
    ]


def _spread(z: Tensor, y: Tensor, shifts: Shifts, dim: int) -> None:
    """y (n, …) of z (n, k, …), one dimension of the sum."""
    taps = z.unbind(1)
    for phase, q in enumerate(shifts):
        out = strided(y, phase, len(shifts), dim)
        same = phase and q == shifts[phase - 1]
        before = strided(y, phase - 1, len(shifts), dim) if same else None
        if before is not None and before.shape == out.shape:
            out.copy_(before)
        else:
            _add_up(out, list(zip(taps, q, strict=True)), dim)


def _sees_most_sums(scale: Pair, window: Window) -> bool:
    """Whether most of b is seen, which is then faster to make than dz tap by tap."""
    taps = window.kernel_size
    if scale == (1, 1):
        return math.prod(taps) >= _MANY_TAPS
    return all(k >= s for k, s in zip(taps, scale, strict=True))


def neighbour_sums(dy: Tensor, scale: Pair, window: Window) -> Tensor:
    """b of dy (n, O, H′, W′), from the first entry that a tap sees to the last, in float32 for half
    precision."""
    axes = zip(window.kernel_size, window.sides, strict=True)
    (top, bottom), (left, right) = ((k - 1 - before, k - 1 - after) for k, (before, after) in axes)
    sums = widened(native.pad(dy, (left, right, top, bottom)))
    for dim, s in zip((2, 3), scale, strict=True):
        sums = _along(sums, dim, s)
    return sums


def _along(x: Tensor, dim: int, count: int) -> Tensor:
    """Σ_{v<count} x[e + v] along `dim`, made of the sums of half as many."""
    if count == 1:
        return x
    half, length = count // 2, x.shape[dim] - count + 1
    sums = _along(x, dim, half)
    total = sums.narrow(dim, 0, length) + sums.narrow(dim, half, length)
    return total + x.narrow(dim, count - 1, length) if count % 2 else total


def _by_taps(dy: Tensor, size: torch.Size, scale: Pair, window: Window) -> Tensor:
    """dz (n, kh·kw·O, H, W) of dy (n, O, H′, W′), tap by tap, for images x of a size (H, W)."""
    (kh, kw), (height, width), dy = window.kernel_size, size, widened(dy)
    half = empty(dy, (len(dy), kw, *dy.shape[1:3], width))  # (n, kw, O, H′, W)
    _gather(dy, half, shifts_of(1, scale, window), dim=-1)
    dz = empty(dy, (len(dy), kh, *half.shape[1:3], height, width))  # (n, kh, kw, O, H, W)
    _gather(half, dz, shifts_of(0, scale, window), dim=-2)
    return dz.flatten(1, 3)


def _gather(y: Tensor, z: Tensor, shifts: Shifts, dim: int) -> None:
    """The adjoint of `_spread`: z (n, k, …) of y (n, …)."""
    phases = _merged([strided(y, phase, len(shifts), dim) for phase in range(len(shifts))], shifts)
    for tap in range(z.shape[1]):
        _add_up(z.select(1, tap), [(dy, -q[tap]) for dy, q in phases], dim)


def _merged(phases: list[Tensor], shifts: Shifts) -> list[tuple[Tensor, list[int]]]:
    """The phases with their shifts, where phases that see the same pixels are added up."""
    merged: list[tuple[Tensor, list[int]]] = []
    for dy, q in zip(phases, shifts, strict=True):
        if merged and merged[-1][1] == q and merged[-1][0].shape == dy.shape:
            merged[-1] = merged[-1][0] + dy, q
        else:
            merged.append((dy, q))
    return merged


def strided(y: Tensor, start: int, step: int, dim: int) -> Tensor:
    """y[start::step] along `dim`, the last or the last but one."""
    entries = slice(start, None, step)
    return y[..., entries] if dim == -1 else y[..., entries, :]


def _add_up(out: Tensor, terms: list[Term], dim: int) -> None:
    """out[i] = Σ source[i + shift] along `dim`, with 0 outside a source."""
    length = out.shape[dim]
    everywhere = [s for s, shift in terms if shift == 0 and s.shape[dim] == length]
    if len(everywhere) > 1:
        _write_sum(out, everywhere)
        for source, shift in terms:
            if shift != 0 or source.shape[dim] != length:
                start, stop = _reach(source, shift, length, dim)
                if start < stop:
                    target = out.narrow(dim, start, stop - start)
                    target.add_(source.narrow(dim, start + shift, stop - start))
        return
    # Between two places where a source begins or ends, the same terms reach every entry.
    reach = [_reach(source, shift, length, dim) for source, shift in terms]
    for start, stop in pairwise(sorted({0, length}.union(*reach))):
        here = [
            source.narrow(dim, start + shift, stop - start)
            for (source, shift), (first, last) in zip(terms, reach, strict=True)
            if first <= start and stop <= last
        ]
        _write_sum(out.narrow(dim, start, stop - start), here)


def _reach(source: Tensor, shift: int, length: int, dim: int) -> tuple[int, int]:
    """(first, last): source[i + shift] exists along `dim` for first ≤ i < last ≤ length."""
    return min(max(0, -shift), length), max(0, min(length, source.shape[dim] - shift))


def _write_sum(out: Tensor, sources: list[Tensor]) -> None:
    """out = Σ source, the first two in one pass."""
    if len(sources) > 1:
        inplace.add_into(out, sources[0], sources[1])
    elif sources:
        out.copy_(sources[0])
    else:
        out.zero_()
    for source in sources[2:]:
        out.add_(source)


def _tiles(x: Tensor, weight: Tensor, scale: Pair, window: Window) -> Iterator[tiles.Tile]:
    """The tiles of x, whose z have about `_CHUNK_ENTRIES` entries, or a quarter of u's and y's.

    u is the upsampled image: tiles take no more memory than making it would.
    """
    (batch, channels, height, width), out_channels = x.shape, len(weight)
    u_and_y = scale[0] * scale[1] * (channels + out_channels) * batch * height * width
    most = min(_CHUNK_ENTRIES, max(_FEW_ENTRIES, u_and_y // 4))
    return tiles.cut(x, scale, window, weight.numel() // channels, most)


def _layout(images: Tensor, out_channels: int) -> Tensor:
    """Images (n, k·O, H, W) in the memory format in which sums over O channels are fastest."""
    return images.contiguous() if out_channels < _LANES else native.layout(images)


def empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """New memory for images (n, …, O, H, W), in the same format."""
    if shape[-3] < _LANES:
        return like.new_empty(tuple(shape))
    *channels, height, width = shape[1:]
    pixel = math.prod(channels)
    inner = (math.prod(channels[i + 1 :]) for i in range(len(channels)))
    # Not a permuted view: autograd forbids writing over one that was filled part by part.
    strides = (height * width * pixel, *inner, width * pixel, pixel)
    return like.new_empty_strided(tuple(shape), strides)
