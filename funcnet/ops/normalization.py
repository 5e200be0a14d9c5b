"""Normalisation over examples or the batch, by PyTorch's kernels, and a scale for each channel.

`layer_norm` and `batch_norm` return (y, mean, 1/√(variance + ε)), and their `…_gradients` take the
last two back. `group_norm.py` does so over groups of channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_exporting

from funcnet.ops import inplace
from funcnet.ops.accumulation import widened
from funcnet.ops.need import Need
from funcnet.ops.norm_kernels import (
    Gradients,
    Normalised,
    as_asked,
    dense,
    exact,
    in_dtype,
    in_float32,
    is_half,
    laid_out,
    spatial,
)

_layer_norm = torch.native_layer_norm
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default
_batch_norm = torch.native_batch_norm
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


def layer_norm(
    x: Tensor, num_dims: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Normalised:
    """Normalise over the last `num_dims` axes."""
    shape = x.shape[-num_dims:]
    x = exact(x, math.prod(shape))
    if _is_by_formula(x):
        return _scaled(_standardised(x, _last(num_dims), eps), weight, bias, x.dtype)
    weight, bias = in_float32(x, weight, shape), in_float32(x, bias)
    return _layer_norm(x, shape, weight, bias, eps)


def layer_norm_gradients(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_dims: int,
    eps: float,
    need: Need,
) -> Gradients:
    mask = need.input, need.params and weight is not None, need.params and bias is not None
    if _is_by_formula(x):
        shared = tuple(range(x.ndim - num_dims))
        grads = _gradients_by_formula(dy, x, weight, _last(num_dims), shared, eps)
        return as_asked(grads, mask, x.dtype)
    shape = x.shape[-num_dims:]
    weight, bias = in_float32(x, weight, shape), in_float32(x, bias)
    x = exact(x, math.prod(shape))
    sets = dy, x, mean, rstd

    def by_kernel(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, mask: _Mask) -> Any:
        return _layer_norm_backward(dy, x, shape, mean, rstd, weight, bias, mask)

    dx: Tensor | None
    if not (is_half(x) and x.is_cpu and any(mask[1:])):
        dx, *others = by_kernel(*sets, mask)
    # A graph would use this number of chunks for every x.
    elif inplace.has_open_sizes(x) or x.numel() <= _CHUNK_ENTRIES:
        dx, *others = by_kernel(dy.float(), x.float(), mean, rstd, mask)
    else:
        dx = by_kernel(*sets, (True, False, False))[0] if need.input else None
        rows = [t.flatten(0, -num_dims - 1) for t in sets]
        others = _sums_in_float32(by_kernel, rows, (False, *mask[1:]))
    return as_asked((x if math.prod(shape) == 1 else dx, *others), mask, x.dtype)


_Mask: TypeAlias = tuple[bool, bool, bool]

_CHUNK_ENTRIES = 2**16
"""Entries of x that are put into float32 at a time: few enough for a cache."""


def _sums_in_float32(
    by_kernel: Callable[..., Any], sets: Sequence[Tensor], mask: _Mask
) -> list[Tensor | None]:
    """[dweight, dbias] of sets in half precision: (dy, x, mean, rstd), a row for each.

    PyTorch's kernel adds up row after row in x's dtype: in bfloat16, it is off by a sixth of the
    largest entry after 16,000 rows.
    """
    at_once = max(1, _CHUNK_ENTRIES // sets[1][0].numel())
    sums: list[Tensor | None] = [None, None]
    for dy, x, *statistics in zip(*(torch.split(t, at_once) for t in sets), strict=True):
        _, *found = by_kernel(dy.float(), x.float(), *statistics, mask)
        sums = [t if s is None else inplace.add(s, t) for s, t in zip(sums, found, strict=True)]
    return sums


def layer_normalised(x: Tensor, mean: Tensor, rstd: Tensor, num_dims: int, eps: float) -> Tensor:
    """x̂, in float32 for half precision."""
    if inplace.is_untracked(x):
        return (exact(widened(x), math.prod(x.shape[-num_dims:])) - mean) * rstd
    # To autograd, the mean and rstd that the kernel returns are constants.
    return _standardised(x, _last(num_dims), eps)[0]


def rms_norm(
    x: Tensor, num_dims: int, weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """(y, rstd (…, 1)), over the last `num_dims` axes."""
    # PyTorch takes ε of the dtype in which it computes.
    rows = widened(x).flatten(-num_dims)
    eps = torch.finfo(rows.dtype).eps if eps is None else eps
    rstd = torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    y = rows * rstd
    if weight is not None:
        y = inplace.multiply(y, weight.flatten())
    return y.to(x.dtype).reshape(x.shape), rstd


def rms_norm_gradients(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, num_dims: int, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight), None where it is not needed."""
    rows, grad = widened(x).flatten(-num_dims), widened(dy).flatten(-num_dims)
    products = (grad * rows).flatten(0, -2)  # (rows, entries of a set), for products of matrices
    dx = dweight = None
    if need.params and weight is not None:
        dweight = _weighted_sum(rstd.flatten(), products)
        dweight = dweight.to(weight.dtype).reshape(weight.shape)
    if need.input:
        if weight is None:
            along = products.sum(-1)
        else:
            scale = weight.flatten().to(rows.dtype)
            grad, along = grad * scale, products @ scale
        slope = along.reshape(rstd.shape) * rstd * rstd / rows.shape[-1]
        dx = inplace.multiply(torch.addcmul(grad, rows, slope, value=-1), rstd)
        dx = dx.to(x.dtype).reshape(x.shape)
    return dx, dweight


_BLOCK, _MANY_ROWS = 512, 4096
"""Rows that one product adds up, and from how many rows on there are several products."""


def _weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """weights · rows. Many rows are added up in blocks: one product adds up row after row, and is
    off by 10⁻⁵ after 10⁵ rows in float32."""
    whole = 0 if inplace.has_open_sizes(rows) else len(rows) // _BLOCK * _BLOCK
    if whole < _MANY_ROWS:
        return weights @ rows
    blocks = rows[:whole].reshape(-1, _BLOCK, rows.shape[1])
    sums = weights[:whole].reshape(-1, 1, _BLOCK) @ blocks
    return sums.sum((0, 1)) + weights[whole:] @ rows[whole:]


def rms_normalised(x: Tensor, rstd: Tensor, num_dims: int) -> Tensor:
    """x̂, in float32 for half precision."""
    return (widened(x).flatten(-num_dims) * rstd).reshape(x.shape)


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Normalised:
    """Normalise each channel over the batch and all positions."""
    if _is_transformed() or not x.numel():  # the kernel refuses an empty x
        weight, bias = (None if t is None else spatial(t, x) for t in (weight, bias))
        y, mean, rstd = _scaled(_standardised(x, _of_channel(x), eps), weight, bias, x.dtype)
        return y, mean.flatten(), rstd.flatten()
    weight, bias = in_float32(x, weight, x.shape[1:2]), in_float32(x, bias)
    x, _ = laid_out(x)
    return _batch_norm(x, weight, bias, None, None, True, 0.0, eps)


def batch_norm_gradients(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, eps: float, need: Need
) -> Gradients:
    mask = need.input, *(need.params and weight is not None,) * 2
    if _is_transformed() or not x.numel():
        scale, axes = None if weight is None else spatial(weight, x), _of_channel(x)
        return as_asked(_gradients_by_formula(dy, x, scale, axes, axes, eps), mask, x.dtype)
    # Where the two differ in layout, or the weight is strided, the kernel returns wrong numbers.
    x, memory_format = laid_out(x)
    dy = dense(dy, memory_format)
    weight = in_float32(x, weight, x.shape[1:2])
    grads = _batch_norm_backward(dy, x, weight, None, None, mean, rstd, True, eps, mask)
    return as_asked(grads, mask, x.dtype)


def _of_channel(x: Tensor) -> tuple[int, ...]:
    """The axes of a channel's entries."""
    return (0, *range(2, x.ndim))


def channel_affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """weight · x + bias, with one weight and one bias for each channel."""
    return torch.addcmul(spatial(bias, x), x, spatial(weight, x))


def channel_affine_gradients(dy: Tensor, x: Tensor, weight: Tensor, need: Need) -> Gradients:
    dx = dy * spatial(weight, x) if need.input else None
    if not need.params:
        return dx, None, None
    axes = _of_channel(x)
    dweight = (widened(x) * dy).sum(axes).to(weight.dtype)
    return dx, dweight, dy.sum(axes)


# --- The formulas at the head of `layers/normalization.py`, for derivatives of derivatives
#
# PyTorch's rules for its kernels under torch.func and in forward mode take the mean and rstd that
# these return for constants, which makes hessians wrong.


def _is_transformed() -> bool:
    """Whether torch.func or forward-mode autograd may differentiate: always inside torch.compile,
    eagerly if one is running."""
    return not (inplace.is_eager() or inplace.is_tracing() or is_exporting())


def _is_by_formula(x: Tensor) -> bool:
    """Whether LayerNorm is computed by formula. Under torch.func.vmap alone, its kernels take 0.4
    to 0.7 of the time; those of BatchNorm take longer, and neither are for half precision."""
    return _is_transformed() and (is_half(x) or not inplace.is_mapped_alone())


def _standardised(x: Tensor, axes: tuple[int, ...], eps: float) -> Normalised:
    """(x̂, μ, r), in float32 for half precision."""
    x = widened(x)
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    rstd = torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    return centred * rstd, mean, rstd


def _scaled(
    normalised: Normalised, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Normalised:
    """(weight ∘ x̂ + bias, μ, r)."""
    y, mean, rstd = normalised
    y = y if weight is None else y * weight
    return in_dtype((y if bias is None else y + bias, mean, rstd), dtype)


def _gradients_by_formula(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    axes: tuple[int, ...],
    shared: tuple[int, ...],
    eps: float,
) -> Gradients:
    """(dx, dweight, dbias), where entries along the axes `shared` share weight and bias."""
    normalised, _, rstd = _standardised(x, axes, eps)
    dy = widened(dy)
    grad = dy if weight is None else dy * weight
    slope = (grad * normalised).mean(axes, keepdim=True)
    dx = rstd * (grad - grad.mean(axes, keepdim=True) - normalised * slope)
    return dx, (dy * normalised).sum(shared), dy.sum(shared)


def _last(num_dims: int) -> tuple[int, ...]:
    return tuple(range(-num_dims, 0))
