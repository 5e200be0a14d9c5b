"""Nearest upsampling by 2, then a convolution with 3 taps, by Karatsuba's trick.

In one dimension, padded by 1, the outputs 2i+1 and 2i+2 see the source pixels i and i+1 and no
others. As a pair they are

    v_i = a·x_i + b·x_{i+1},    a = (w₀+w₁, w₀),  b = (w₂, w₁+w₂),

two products with each of the pixels. Both entries of a + b are the same, S = w₀+w₁+w₂; so the pairs
of even i can be made of the products in those of odd i, and one more:

    i odd     v_i = a·x_i + b·x_{i+1}
    i even    v_i = S·(x_i + x_{i+1}) − b·x_i − a·x_{i+1}.

That is 5 products for two source pixels, where `low_resolution.py` makes 6 and the upsampled signal
would take 12; in two dimensions, along both axes, 25 for four pixels instead of 36 and 144. Let F
be the map from pixels to the factors x_i, x_i + x_{i+1} and x_{i+1} (i even), K the map from taps
to the kernels b, S and a, and V the sums above. The gradients are the adjoints:

    forward    z = Kw·Fx,  y = V·z
    backward   dz = Vᵀ·dy,  dx = Fᵀ·(Kw)ᵀ·dz,  dw = Kᵀ·(dz·(Fx)ᵀ).

With few pixels or channels, the sums take longer than the products that they save. They are rounded
as well: errors are about twice those without, in float32 some 1e-6 of y. For even i, the large
products S·x_{i+1} and a·x_{i+1} cancel in an output that sees x_{i+1} through a small weight alone:
errors are relative to what is near, not to what an output sees.

A. Karatsuba and Yu. Ofman, "Multiplication of many-digital numbers by automatic computers", 1962.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from funcnet.ops import inplace, native, pixelwise
from funcnet.ops.low_resolution import empty, strided
from funcnet.ops.need import Need
from funcnet.ops.window import Pair, Window

_MANY_PIXELS, _MANY_PRODUCTS = 4096, 2**25
"""From how many source pixels, and products of them with a single tap, this is faster: measured."""

_WINDOW = Window((3, 3), sides=((1, 1), (1, 1)))

_TAPS = (
    ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0)),
    ((1.0, 1.0, 1.0),),
    ((1.0, 1.0, 0.0), (1.0, 0.0, 0.0)),
)
"""K in one dimension: the taps that make up each entry of b, of S and of a."""

_ENTRIES = [len(entries) for entries in _TAPS]

_SUMS = [
    [[h * w for h in down for w in across] for group in _TAPS for across in group for down in rows]
    for rows in _TAPS
]
"""K (5·k, kh·kw) for each factor along the height, which has k kernels."""


def fits(scale: Pair, window: Window) -> bool:
    """Whether this is upsampling by 2 before 3×3 taps with padding 1."""
    return scale == (2, 2) and window == _WINDOW


def is_faster(x: Tensor, weight: Tensor, scale: Pair, window: Window) -> bool:
    """Whether `fits` holds, height and width are even, and this is faster."""
    batch, channels, height, width = x.shape
    pixels = batch * height * width
    return (
        fits(scale, window)
        and height % 2 == width % 2 == 0
        and pixels >= _MANY_PIXELS
        and pixels * channels * len(weight) >= _MANY_PRODUCTS
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Pair, window: Window) -> Tensor:
    """y (N, O, 2H, 2W) of x (N, C, H, W) upsampled by 2, and weight (O, C, 3, 3)."""
    dtype, x, weight = x.dtype, native.upcast(x), native.upcast(weight)
    half = []
    kernels_of_rows = _kernels(weight, _sums_like(weight))
    along_height = zip(_factors(native.layout(x), -2), kernels_of_rows, strict=True)
    for rows, kernels in along_height:
        along_width = zip(_factors(rows, -1), kernels, strict=True)
        half.append(_spread([_products(factor, kernel) for factor, kernel in along_width], -1))
    y = _spread(half, -2)
    return (y if bias is None else inplace.add(y, bias[:, None, None])).to(dtype)


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, scale: Pair, window: Window, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx), None where it is not needed."""
    dtype, x, weight, grad = x.dtype, native.upcast(x), native.upcast(weight), native.upcast(grad)
    sums = _sums_like(weight)
    dtaps: list[Tensor] = []
    dhalf: list[Tensor] = []
    along_height = zip(
        _factors(native.layout(x), -2),
        sums,
        _kernels(weight, sums),
        _gather(native.layout(grad), -2),
        strict=True,
    )
    for rows, matrix, kernels, dy in along_height:
        dkernels: list[Tensor] = []
        dfactors: list[Tensor] = []
        along_width = zip(_factors(rows, -1), kernels, _gather(dy, -1), strict=True)
        for factor, kernel, dz in along_width:
            dkernel, dfactor = pixelwise.gradients(  # dkernel (e·k·O, C)
                native.layout(factor), kernel.flatten(0, 2), dz.flatten(1, 3), need
            )
            if dkernel is not None:
                dkernels.append(dkernel)
            if dfactor is not None:
                dfactors.append(dfactor)
        if need.params:
            dtaps.append(torch.mm(matrix.t(), torch.cat(dkernels).reshape(len(matrix), -1)))
        if need.input:
            dhalf.append(_join(dfactors, -1))
    dx = _join(dhalf, -2).to(dtype) if need.input else None
    if not need.params:
        return None, dx
    dweight = (dtaps[0] + dtaps[1] + dtaps[2]).reshape(3, 3, *weight.shape[:2])
    return native.like(weight, dweight.permute(2, 3, 0, 1)).to(dtype), dx


def _sums_like(weight: Tensor) -> list[Tensor]:
    return [weight.new_tensor(matrix) for matrix in _SUMS]


def _kernels(weight: Tensor, sums: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield Kw for each factor along the height, when it is asked for.

    It is a kernel (e, k, O, C) for each factor along the width, with e entries there and k along
    the height.
    """
    taps = weight.permute(2, 3, 0, 1).flatten(2).flatten(0, 1)
    for matrix in sums:
        kernels = torch.mm(matrix, taps).reshape(sum(_ENTRIES), -1, *weight.shape[:2])
        yield torch.split(kernels, _ENTRIES)


def _products(factor: Tensor, kernel: Tensor) -> Tensor:
    """z (N, e, k, O, H, W) of a factor (N, C, H, W) and its kernels (e, k, O, C)."""
    z = pixelwise.convolve(native.layout(factor), kernel.flatten(0, 2))
    return torch.unflatten(z, 1, kernel.shape[:3])


def _factors(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """F along `dim`: x_i, x_i + x_{i+1} and x_{i+1} for even i."""
    even, odd = strided(x, 0, 2, dim), strided(x, 1, 2, dim)
    return even, even + odd, odd


def _join(dfactors: list[Tensor], dim: int) -> Tensor:
    """The adjoint of `_factors`."""
    deven, dboth, dodd = dfactors
    dx = empty(dboth, _resized(dboth.shape, dim, 2 * dboth.shape[dim]))
    inplace.add_into(strided(dx, 0, 2, dim), deven, dboth)
    inplace.add_into(strided(dx, 1, 2, dim), dodd, dboth)
    return dx


def _spread(z: list[Tensor], dim: int) -> Tensor:
    """V along `dim`: y (N, …, O, H, W) of the products with b, S and a, each (N, e, …, O, H, W)."""
    shape = z[1][:, 0].shape
    y = empty(z[1], _resized(shape, dim, 4 * shape[dim]))
    line = _lines(y, dim)
    b, s, a = (_lines(products, dim).movedim(1, -1) for products in z)
    # A view at a time: autograd loses track of those that were taken before y was written to.
    even = _pairs(line, 0)
    inplace.add_into(even, s, b, -1)
    even.sub_(a)
    inplace.add_into(_pairs(line, 1), a[..., :-1, :], b[..., 1:, :])
    line[..., 0].copy_(b[..., 0, 1])
    line[..., -1].copy_(a[..., -1, 0])
    return y


def _gather(dy: Tensor, dim: int) -> Iterator[Tensor]:
    """The adjoint of `_spread`, made as it is asked for: dz for b, for S and for a."""
    line = _lines(dy, dim)
    even, odd = _pairs(line, 0), _pairs(line, 1)
    dz, db = _new_products(dy, 2, dim)
    inplace.add_into(db[..., 1:, :], odd, even[..., 1:, :], -1)
    db[..., 0, :].copy_(even[..., 0, :]).neg_()
    db[..., 0, 1].add_(line[..., 0])
    yield dz
    dz, ds = _new_products(dy, 1, dim)
    inplace.add_into(ds[..., 0], even[..., 0], even[..., 1])
    yield dz
    dz, da = _new_products(dy, 2, dim)
    inplace.add_into(da[..., :-1, :], odd, even[..., :-1, :], -1)
    da[..., -1, :].copy_(even[..., -1, :]).neg_()
    da[..., -1, 0].add_(line[..., -1])
    yield dz


def _new_products(dy: Tensor, entries: int, dim: int) -> tuple[Tensor, Tensor]:
    """New memory for z (N, e, …, O, H, W), and its `_lines` with the e entries after `dim`."""
    batch, *shape = _resized(dy.shape, dim, dy.shape[dim] // 4)
    z = empty(dy, (batch, entries, *shape))
    return z, _lines(z, dim).movedim(1, -1)


def _pairs(line: Tensor, parity: int) -> Tensor:
    """The v_i of even i, or of odd i from 1 to n−3, of a line (…, 2n): (…, 2) each.

    Of v_{−1} and v_{n−1}, the line has a single entry at its ends.
    """
    return torch.unflatten(line[..., 1:-1], -1, (-1, 2))[..., parity::2, :]


def _lines(x: Tensor, dim: int) -> Tensor:
    """x with `dim`, the last or the last but one, as its last."""
    return x if dim == -1 else x.mT


def _resized(shape: Sequence[int], dim: int, size: int) -> list[int]:
    resized = list(shape)
    resized[dim] = size
    return resized
