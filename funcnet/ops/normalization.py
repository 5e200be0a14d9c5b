"""Normalisation over examples or the batch, by PyTorch's kernels, and a scale for each channel.

`layer_norm` and `batch_norm` return (y, mean, 1/√(variance + ε)), and their `…_gradients` take the
last two back. `group_norm.py` does so over groups of channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from funcnet.ops import inplace
from funcnet.ops.accumulation import accumulator_dtype, widened
from funcnet.ops.need import Need
from funcnet.ops.norm_kernels import (
    Gradients,
    Normalised,
    as_asked,
    dense,
    exact,
    in_dtype,
    in_float32,
    laid_out,
    like_weights,
    spatial,
)

_layer_norm = torch.native_layer_norm
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default
_batch_norm = torch.native_batch_norm
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


def layer_norm(
    x: Tensor, num_dims: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Normalised:
    """Over the last `num_dims` axes."""
    shape = x.shape[-num_dims:]
    x = exact(x, math.prod(shape))
    weight, bias = in_float32(x, weight, shape), in_float32(x, bias)
    return in_dtype(_layer_norm(like_weights(x), shape, weight, bias, eps), x.dtype)


def layer_norm_gradients(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_dims: int,
    need: Need,
) -> Gradients:
    mask = need.input, need.params and weight is not None, need.params and bias is not None
    shape = x.shape[-num_dims:]
    weight, bias = in_float32(x, weight, shape), in_float32(x, bias)
    dtype, x, dy = x.dtype, like_weights(exact(x, math.prod(shape))), like_weights(dy)
    dx, *others = _layer_norm_backward(dy, x, shape, mean, rstd, weight, bias, mask)
    return as_asked((x if math.prod(shape) == 1 else dx, *others), mask, dtype)


def layer_normalised(x: Tensor, mean: Tensor, rstd: Tensor, num_dims: int, eps: float) -> Tensor:
    """x̂, in float32 for half precision."""
    shape = x.shape[-num_dims:]
    x = exact(widened(x), math.prod(shape))
    if inplace.is_untracked(x):
        return (x - mean) * rstd
    # To autograd, the mean and rstd that the kernel returns are constants.
    normalised: Tensor = _layer_norm(x, shape, None, None, eps)[0]
    return normalised


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
        dweight = rstd.flatten() @ products
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


def rms_normalised(x: Tensor, rstd: Tensor, num_dims: int) -> Tensor:
    """x̂, in float32 for half precision."""
    return (widened(x).flatten(-num_dims) * rstd).reshape(x.shape)


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Normalised:
    """A channel at a time, over the batch and what stands behind the channels."""
    if not x.numel():  # the kernel refuses it
        nothing = x.new_zeros(x.shape[1], dtype=accumulator_dtype(x.dtype))
        return x.clone(), nothing, nothing
    weight, bias = in_float32(x, weight, x.shape[1:2]), in_float32(x, bias)
    x, _ = laid_out(x)
    normalised = _batch_norm(like_weights(x), weight, bias, None, None, True, 0.0, eps)
    return in_dtype(normalised, x.dtype)


def batch_norm_gradients(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, eps: float, need: Need
) -> Gradients:
    mask = need.input, *(need.params and weight is not None,) * 2
    if not x.numel():
        nothing = x.new_zeros(x.shape[1])
        return as_asked((torch.zeros_like(x), nothing, nothing.clone()), mask, x.dtype)
    # Where the two differ in layout, or the weight is strided, the kernel returns wrong numbers.
    x, memory_format = laid_out(x)
    dy = dense(dy, memory_format)
    weight = in_float32(x, weight, x.shape[1:2])
    dtype, x, dy = x.dtype, like_weights(x), like_weights(dy)
    grads = _batch_norm_backward(dy, x, weight, None, None, mean, rstd, True, eps, mask)
    return as_asked(grads, mask, dtype)


def channel_affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """weight · x + bias, a number of each for a channel."""
    return torch.addcmul(spatial(bias, x), x, spatial(weight, x))


def channel_affine_gradients(dy: Tensor, x: Tensor, weight: Tensor, need: Need) -> Gradients:
    dx = dy * spatial(weight, x) if need.input else None
    if not need.params:
        return dx, None, None
    axes = (0, *range(2, x.ndim))
    dweight = (widened(x) * dy).sum(axes).to(weight.dtype)
    return dx, dweight, dy.sum(axes)
