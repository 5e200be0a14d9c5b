"""Nearest upsampling by s, then a convolution with k taps, at the cost of the small image.

In one dimension, with padding p before, output s·i + a (phase a = 0 … s−1) sees through tap t the
source pixel i + q_t, q_t = ⌊(a − p + t)/s⌋:

    y[s·i + a] = Σ_t w_t · x[i + q_t].

The upsampled signal is constant between source pixels, so q_t takes few values: it moves on by one
at the taps j ≡ p − a (mod s), and at no others. Summation by parts about some pixel c of the window
leaves one product with the sum of all taps, and one for each move:

    y[s·i + a] = S·x[i+c] + Σ_{q_j > c} P_j·(x[i+q_j] − x[i+q_j−1])
                          − Σ_{q_j ≤ c} B_j·(x[i+q_j] − x[i+q_j−1])

    S = Σ_t w_t,    P_j = Σ_{t ≥ j} w_t  (taps from j on),    B_j = Σ_{t < j} w_t  (taps before j).

Every j = 1 … k−1 is a move of exactly one phase. So k products, S·x and P_j·x or B_j·x, called
columns here, serve all s phases, where the upsampled signal would take s·k. In two dimensions, k²
products of size C×O for each source pixel instead of s²·k²: a single matrix product for the whole
picture. What is left is to add the columns up, shifted, with signs; the gradients are the adjoint
of that (phases added into columns, shifted back) and the two gradients of the matrix product:

    forward    z = K·x,  y = spread(z)            K: (kh·kw·O, C), a linear map of the weights
    backward   dz = gather(dy),  dx = Kᵀ·dz,  dK = dz·xᵀ,  and dweight, the adjoint of that map

The upsampled picture is never made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from funcnet.layers import inplace, native
from funcnet.layers.geometry import Pair, Window

_CHUNK_ENTRIES = 2**21
"""Entries of z made at a time: what is written should still be in the cache when it is read."""

_LANES = 16
"""With fewer channels than a vector register has lanes, planes are added faster than pixels."""


Term: TypeAlias = tuple[Tensor, int, int]
"""(source, shift, sign): sign · source[i + shift], a term of a sum over i."""


@dataclass(frozen=True)
class Axis:
    """One dimension of the sum: `columns` taps each to sum, and the terms that add columns up.

    `columns[v][t]` is 1 if column v sums tap t, else 0. A term (a, v, q, sign) stands for

        y[s·i + a] += sign · z_v[i + q]    where z_v[i] = Σ_t columns[v][t] · w_t · x[i].
    """

    columns: tuple[tuple[int, ...], ...]
    terms: tuple[tuple[int, int, int, int], ...]


def axis_of(taps: int, scale: int, before: int) -> Axis:
    """The sum by parts for k taps, upsampling by `scale` and `before` entries of padding.

    >>> axis_of(taps=3, scale=2, before=1).columns  # S, B_1, P_2
    ((1, 1, 1), (1, 0, 0), (0, 0, 1))
    """
    columns = [(1,) * taps] * taps
    terms = []
    for phase in range(scale):
        q = [(phase - before + t) // scale for t in range(taps)]
        centre = min(max(0, q[0]), q[-1])  # the pixel that the output lies in, if it is seen
        terms.append((phase, 0, centre, 1))
        for j in range(1, taps):
            if q[j] > q[j - 1]:
                after = q[j] > centre
                columns[j] = tuple(int((t >= j) == after) for t in range(taps))
                sign = 1 if after else -1
                terms += [(phase, j, q[j], sign), (phase, j, q[j] - 1, -sign)]
    return Axis(tuple(columns), tuple(terms))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Pair, window: Window) -> Tensor:
    """y (N, O, H′, W′) of x (N, C, H, W) upsampled by `scale`, and weight (O, C, kh, kw)."""
    rows, columns = _axes(scale, window)
    height, width = window.count("convolve", (scale[0] * x.shape[2], scale[1] * x.shape[3]))
    kernel = _kernel(weight, rows, columns)
    y: Tensor | None = None
    for part, pixels in _chunks(native.layout(x), weight):
        z = _layout(F.conv2d(pixels, kernel), len(weight))
        z = torch.unflatten(z, 1, (*window.kernel_size, -1))  # (n, kh, kw, O, H, W)
        half = _empty(z, (len(z), *z.shape[2:4], height, x.shape[3]))  # (n, kw, O, H′, W)
        _spread(z, half, rows, scale[0], dim=-2)
        y = _empty(z, (len(x), len(weight), height, width)) if y is None else y
        _spread(half, y[part], columns, scale[1], dim=-1)
    assert y is not None
    return y if bias is None else inplace.add(y, bias[:, None, None])


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, scale: Pair, window: Window, input_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """(dweight, dx); dx is None without `input_grad`."""
    rows, columns = _axes(scale, window)
    (kh, kw), (height, width) = window.kernel_size, x.shape[2:]
    kernel = _kernel(weight, rows, columns)
    dkernel: Tensor | None = None
    dx: Tensor | None = None
    for part, pixels in _chunks(native.layout(x), weight):
        dy = _layout(grad[part], len(weight))
        half = _empty(dy, (len(dy), kw, *dy.shape[1:3], width))  # (n, kw, O, H′, W)
        _gather(dy, half, columns, scale[1], dim=-1)
        z = _empty(dy, (len(dy), kh, *half.shape[1:3], height, width))  # (n, kh, kw, O, H, W)
        _gather(half, z, rows, scale[0], dim=-2)
        dk, d = native.kernel_gradients(pixels, kernel, z.flatten(1, 3), input_grad)
        dkernel = dk if dkernel is None else dkernel.add_(dk)
        if d is None or len(d) == len(x):
            dx = d
        else:
            dx = _empty(d, x.shape) if dx is None else dx
            dx[part] = d
    assert dkernel is not None
    return _kernel_adjoint(dkernel, weight, rows, columns), dx


def _axes(scale: Pair, window: Window) -> tuple[Axis, Axis]:
    rows, columns = (
        axis_of(taps, s, before)
        for taps, s, (before, _) in zip(window.kernel_size, scale, window.sides, strict=True)
    )
    return rows, columns


def _kernel(weight: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """K (kh·kw·O, C, 1, 1): the weights summed into columns, on both axes."""
    sums = _sums(weight, rows, columns) @ weight.flatten(2).flatten(0, 1).t()
    return sums.reshape(-1, weight.shape[1], 1, 1)


def _kernel_adjoint(dkernel: Tensor, weight: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """dweight (O, C, kh, kw) of dK."""
    sums = _sums(weight, rows, columns)
    dtaps = (sums.t() @ dkernel.reshape(len(sums), -1)).reshape(
        *weight.shape[2:], *weight.shape[:2]
    )
    return dtaps.permute(2, 3, 0, 1).contiguous()


def _sums(weight: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """(kh·kw, kh·kw), 1 where a pair of columns sums a pair of taps."""
    both = [
        [row_tap * column_tap for row_tap in row for column_tap in column]
        for row in rows.columns
        for column in columns.columns
    ]
    return torch.tensor(both, dtype=weight.dtype, device=weight.device)


def _spread(z: Tensor, y: Tensor, axis: Axis, scale: int, dim: int) -> None:
    """y (n, …) of columns z (n, k, …), one dimension of the sum."""
    sums: list[list[Term]] = [[] for _ in range(scale)]
    for phase, column, shift, sign in axis.terms:
        sums[phase].append((z[:, column], shift, sign))
    for phase, terms in enumerate(sums):
        _add_up(_phase(y, phase, scale, dim), terms, dim)


def _gather(y: Tensor, z: Tensor, axis: Axis, scale: int, dim: int) -> None:
    """The adjoint of `_spread`: columns z (n, k, …) of y (n, …)."""
    sums: list[list[Term]] = [[] for _ in axis.columns]
    for phase, column, shift, sign in axis.terms:
        sums[column].append((_phase(y, phase, scale, dim), -shift, sign))
    for column, terms in enumerate(sums):
        _add_up(z[:, column], terms, dim)


def _phase(y: Tensor, phase: int, scale: int, dim: int) -> Tensor:
    """y[phase::scale] along `dim`."""
    index = (*(slice(None),) * (y.ndim + dim), slice(phase, None, scale))
    return y[index]


def _add_up(out: Tensor, terms: list[Term], dim: int) -> None:
    """out[i] = Σ sign · source[i + shift] along `dim`, with 0 outside a source."""
    length = out.shape[dim]
    everywhere = [(s, sign) for s, shift, sign in terms if shift == 0 and s.shape[dim] == length]
    if len(everywhere) > 1:
        _write_sum(out, everywhere)
        rest = [term for term in terms if term[1] != 0 or term[0].shape[dim] != length]
        for source, shift, sign in rest:
            start, stop = _reach(source, shift, length, dim)
            if start < stop:
                target = out.narrow(dim, start, stop - start)
                target.add_(source.narrow(dim, start + shift, stop - start), alpha=sign)
        return
    # Between two places where a source begins or ends, the same terms reach every entry.
    reach = [_reach(source, shift, length, dim) for source, shift, _ in terms]
    for start, stop in pairwise(sorted({0, length}.union(*reach))):
        here = [
            (source.narrow(dim, start + shift, stop - start), sign)
            for (source, shift, sign), (first, last) in zip(terms, reach, strict=True)
            if first <= start and stop <= last
        ]
        _write_sum(out.narrow(dim, start, stop - start), here)


def _reach(source: Tensor, shift: int, length: int, dim: int) -> tuple[int, int]:
    """From where to where i, below `length`, has a source[i + shift] along `dim`."""
    return min(max(0, -shift), length), max(0, min(length, source.shape[dim] - shift))


def _write_sum(out: Tensor, terms: list[tuple[Tensor, int]]) -> None:
    """out = Σ sign · source, in as few passes as there are pairs to add."""
    if not terms:
        out.zero_()
        return
    (first, sign), *rest = sorted(terms, key=lambda term: -term[1])
    if sign > 0 and rest:
        second, *rest = rest
        inplace.add_into(out, first, *second)
    else:
        out.copy_(first)
        if sign < 0:
            out.neg_()
    for source, sign in rest:
        out.add_(source, alpha=sign)


def _chunks(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Parts of the batch whose z has about `_CHUNK_ENTRIES` entries, and where they lie in it."""
    pixels = x.shape[2] * x.shape[3]
    columns = weight.numel() // weight.shape[1]
    batch = max(1, _CHUNK_ENTRIES // (pixels * columns))
    for start in range(0, max(len(x), 1), batch):
        part = slice(start, start + batch)
        yield part, x[part]


def _layout(pictures: Tensor, out_channels: int) -> Tensor:
    """Pictures (n, k·O, H, W) in the memory format in which sums over O channels are fastest."""
    return pictures.contiguous() if out_channels < _LANES else native.layout(pictures)


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """New memory for pictures (n, …, O, H, W), in the same format."""
    if shape[-3] < _LANES:
        return like.new_empty(tuple(shape))
    batch, *channels, height, width = shape
    last = range(3, 3 + len(channels))
    return like.new_empty((batch, height, width, *channels)).permute(0, *last, 1, 2)
