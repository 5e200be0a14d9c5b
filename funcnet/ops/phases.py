"""Nearest upsampling by s, then a convolution with k taps, as one convolution for all phases.

In one dimension, with padding p before, output s·i + a (phase a = 0 … s−1) sees through tap t the
source pixel i + q_at, q_at = ⌊(a − p + t)/s⌋. Taps that see the same pixel act as one, their sum.
With q_a = q_a0, and J for the most pixels that a phase sees,

    y[s·i + a] = Σ_{j<J} E_a[j] · x[i + q_a + j],    E_a[j] = Σ_{t : q_at = q_a + j} w_t:

a convolution of the small image without a stride. In two dimensions it has J² taps in the place of
k², 4 of 9 for k = 3 and s = 2. The kernels of all phases, those with the same sums once, make a
single convolution z, whose channels are put in their places.

Taps are added up in float32 and rounded once. Products are added up by PyTorch's kernels, in half
precision in float32 as well. Where a sum of taps overflows, one step is done after the other.

The gradients are those of `low_resolution.py`.
"""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from funcnet.ops import inplace, low_resolution, native, pixelwise, tiles, two_steps
from funcnet.ops.accumulation import widened
from funcnet.ops.window import Ints, Pair, Window

_CHUNK_ENTRIES = 2**22
"""Entries of z made at a time. A convolution lays its kernel out anew, for each tile."""


class Phases(NamedTuple):
    """The phases of one axis."""

    sums: tuple[Ints, ...]
    """For each kernel, q_at − q_a of each tap: which pixel of the window it sees."""
    kernels: Ints
    """Which kernel a phase has."""
    starts: Ints
    """q_a."""

    @property
    def size(self) -> int:
        """J."""
        return 1 + max([max(sums) for sums in self.sums])


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Pair, window: Window) -> Tensor:
    """y (N, O, H′, W′) of x (N, C, H, W) upsampled by `scale`, and weight (O, C, kh, kw)."""
    dtype, x, weight = x.dtype, pixelwise.upcast(x), pixelwise.upcast(weight)
    size = window.count((scale[0] * x.shape[2], scale[1] * x.shape[3]))
    kernel = _kernel(weight, phases_of(scale, window))
    if inplace.has_values(x) and not math.isfinite(kernel.detach().sum().item()):
        return two_steps.convolve(x, weight, bias, scale, window).to(dtype)
    each = None if bias is None else bias.to(x.dtype).repeat(len(kernel) // len(bias))
    y: Tensor | None = None
    x = native.layout(x)
    for tile in tiles.cut(x, scale, window, len(kernel), _CHUNK_ENTRIES):
        axes = phases_of(scale, tile.window)
        source = native.layout(x[tile.source])
        counts = tile.window.count((scale[0] * source.shape[2], scale[1] * source.shape[3]))
        z = native.convolve(source, kernel, each, _window(axes, source.shape[2:], counts))
        if y is None:
            y = low_resolution.empty(z, (len(x), len(weight), *size))
        _put(z, y[tile.target], axes)
    assert y is not None
    return y.to(dtype)


def phases_of(scale: Pair, window: Window) -> list[Phases]:
    """The phases of both axes."""
    axes = []
    for axis in (0, 1):
        seen = low_resolution.shifts_of(axis, scale, window)
        sums = [tuple(q - pixels[0] for q in pixels) for pixels in seen]
        different = tuple(dict.fromkeys(sums))
        starts = tuple(pixels[0] for pixels in seen)
        axes.append(Phases(different, tuple(map(different.index, sums)), starts))
    return axes


def _kernel(weight: Tensor, axes: list[Phases]) -> Tensor:
    """E for all pairs of kernels of both axes, (pairs · O, C, J_h, J_w), in channels_last."""
    rows, columns = (_sums(axis, weight) for axis in axes)
    both = torch.kron(rows.flatten(0, 1), columns.flatten(0, 1))
    taps = widened(weight).permute(2, 3, 0, 1).flatten(2).flatten(0, 1)  # (kh·kw, O·C)
    (u, j, _), (v, k, _) = rows.shape, columns.shape
    kernels = (both @ taps).reshape(u, j, v, k, *weight.shape[:2]).permute(0, 2, 4, 1, 3, 5)
    in_order = kernels.to(weight.dtype, memory_format=torch.contiguous_format).contiguous()
    return in_order.flatten(0, 2).permute(0, 3, 1, 2)


def _sums(axis: Phases, like: Tensor) -> Tensor:
    """(kernels, J, taps), 1 where a tap sees pixel j."""
    seen = [[[float(q == j) for q in sums] for j in range(axis.size)] for sums in axis.sums]
    return widened(like.new_tensor(seen))


def _window(axes: list[Phases], size: Ints, counts: Ints) -> Window:
    """The window from a tile of x to z, which starts with the first pixel that y sees."""
    sides = []
    for axis, n, count in zip(axes, size, counts, strict=True):
        last = max(q + n for q, n in zip(axis.starts, _lengths(axis, count), strict=True))
        sides.append((-axis.starts[0], last + axis.size - 1 - n))
    return Window(tuple(axis.size for axis in axes), sides=tuple(sides))


def _lengths(axis: Phases, count: int) -> list[int]:
    """How many of `count` outputs each phase has."""
    return [len(range(phase, count, len(axis.starts))) for phase in range(len(axis.starts))]


def _put(z: Tensor, y: Tensor, axes: list[Phases]) -> None:
    """Write each phase into its places of y, from the channels of its kernel in z."""
    rows, columns = axes
    by_kernel = torch.unflatten(z, 1, (len(rows.sums), len(columns.sums), -1))
    for a, b in product(range(len(rows.starts)), range(len(columns.starts))):
        part = y[:, :, a :: len(rows.starts), b :: len(columns.starts)]
        found = by_kernel[:, rows.kernels[a], columns.kernels[b]]
        for dim, phases, phase in ((2, rows, a), (3, columns, b)):
            found = found.narrow(dim, phases.starts[phase] - phases.starts[0], part.shape[dim])
        part.copy_(found)
