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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from funcnet.layers import native
from funcnet.layers.geometry import Pair, Window

_CHUNK_ENTRIES = 2**21
"""Entries of z made at a time: what is written should still be in the cache when it is read."""

_LANES = 16
"""With fewer channels than a vector register has lanes, planes are added faster than pixels."""


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
    parts = []
    for pixels in native.layout(x).chunk(_chunk_count(x, weight)):
        z = _layout(F.conv2d(pixels, kernel), len(weight))
        z = torch.unflatten(z, 1, (*window.kernel_size, -1))  # (n, kh, kw, O, H, W)
        half = _spread(z, rows, scale[0], height, dim=-2)  # (n, kw, O, H′, W)
        parts.append(_spread(half, columns, scale[1], width, dim=-1))
    y = _join(parts)
    return y if bias is None else y + bias[:, None, None]


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, scale: Pair, window: Window, input_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """(dweight, dx); dx is None without `input_grad`."""
    rows, columns = _axes(scale, window)
    height, width = x.shape[2:]
    kernel = _kernel(weight, rows, columns)
    dkernels: list[Tensor] = []
    dxs: list[Tensor] = []
    count = _chunk_count(x, weight)
    for pixels, dy in zip(native.layout(x).chunk(count), grad.chunk(count), strict=True):
        half = _gather(_layout(dy, len(weight)), columns, scale[1], width, dim=-1)
        z = _gather(half, rows, scale[0], height, dim=-2)  # (n, kh, kw, O, H, W)
        dkernel, dx = native.kernel_gradients(pixels, kernel, z.flatten(1, 3), input_grad)
        dkernels.append(dkernel)
        if dx is not None:
            dxs.append(dx)
    dweight = _kernel_adjoint(sum(dkernels[1:], dkernels[0]), weight, rows, columns)
    return dweight, _join(dxs) if input_grad else None


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
    return (dkernel.reshape(len(sums), -1).t() @ sums).reshape(weight.shape)


def _sums(weight: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """(kh·kw, kh·kw), 1 where a pair of columns sums a pair of taps."""
    both = [
        [row_tap * column_tap for row_tap in row for column_tap in column]
        for row in rows.columns
        for column in columns.columns
    ]
    return torch.tensor(both, dtype=weight.dtype, device=weight.device)


def _spread(z: Tensor, axis: Axis, scale: int, length: int, dim: int) -> Tensor:
    """y (n, …), `length` long on `dim`, of columns z (n, k, …)."""
    y = _empty_like(z[:, 0], length, dim)
    steps = [(phase, column, shift, sign) for phase, column, shift, sign in axis.terms]
    _add_up(_phases(y, scale, dim), [z[:, v] for v in range(z.shape[1])], steps, dim)
    return y


def _gather(y: Tensor, axis: Axis, scale: int, length: int, dim: int) -> Tensor:
    """The adjoint of `_spread`: columns z (n, k, …), `length` long on `dim`, of y (n, …)."""
    taps = len(axis.columns)
    z = _empty_like(y[:, None].expand(-1, taps, *y.shape[1:]), length, dim)
    steps = [(column, phase, -shift, sign) for phase, column, shift, sign in axis.terms]
    _add_up([z[:, v] for v in range(taps)], _phases(y, scale, dim), steps, dim)
    return z


def _phases(y: Tensor, scale: int, dim: int) -> list[Tensor]:
    """y[a::scale] along `dim`, for each phase a."""
    before = (slice(None),) * (y.ndim + dim)
    indices = [(*before, slice(phase, None, scale)) for phase in range(scale)]
    return [y[index] for index in indices]


def _add_up(
    outs: Sequence[Tensor],
    sources: Sequence[Tensor],
    steps: Iterable[tuple[int, int, int, int]],
    dim: int,
) -> None:
    """outs[o][i] = Σ sign · sources[v][i + shift] along `dim`, over steps (o, v, shift, sign)."""
    written = set()
    for o, v, shift, sign in steps:
        out, source = outs[o], sources[v]
        start = max(0, -shift)
        count = min(out.shape[dim], source.shape[dim] - shift) - start
        if o not in written and count < out.shape[dim]:
            out.zero_()
            written.add(o)
        if count > 0:
            out = out.narrow(dim, start, count)
            source = source.narrow(dim, start + shift, count)
            if o in written:
                out.add_(source) if sign > 0 else out.sub_(source)
            else:
                out.copy_(source if sign > 0 else -source)
        written.add(o)


def _chunk_count(x: Tensor, weight: Tensor) -> int:
    entries = x.numel() // max(x.shape[1], 1) * weight.numel() // weight.shape[1]  # of z
    return -(-entries // _CHUNK_ENTRIES) or 1


def _layout(pictures: Tensor, out_channels: int) -> Tensor:
    """Pictures (n, k·O, H, W) in the memory format in which sums over O channels are fastest."""
    return pictures.contiguous() if out_channels < _LANES else native.layout(pictures)


def _empty_like(pictures: Tensor, length: int, dim: int) -> Tensor:
    """New memory in `_layout` for pictures (n, …, O, H, W), `length` long on `dim`."""
    shape = list(pictures.shape)
    shape[dim] = length
    if shape[-3] < _LANES:
        return pictures.new_empty(shape)
    batch, *channels, height, width = shape
    last = range(3, 3 + len(channels))
    return pictures.new_empty((batch, height, width, *channels)).permute(0, *last, 1, 2)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
