"""Normalisation over examples, groups of channels or the batch, by PyTorch's kernels.

Each function returns (y, mean, 1/√(variance + ε)), and its `…_gradients` take the last two back.

On the CPU, those kernels keep mean and variance in the dtype of the weight. In half precision,
where a mean of 100 would be off by a quarter, they are handed weights in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from funcnet.ops import inplace, native
from funcnet.ops.accumulation import accumulator_dtype, widened
from funcnet.ops.need import Need

_layer_norm = torch.ops.aten.native_layer_norm.default
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default
_group_norm = torch.ops.aten.native_group_norm.default
_group_norm_backward = torch.ops.aten.native_group_norm_backward.default
_batch_norm = torch.ops.aten.native_batch_norm.default
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default

Normalised: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""(y, mean, rstd), rstd = 1/√(variance + ε)."""

Gradients: TypeAlias = tuple["Tensor | None", "Tensor | None", "Tensor | None"]
"""(dx, dweight, dbias), None where it is not needed."""


def layer_norm(
    x: Tensor, num_dims: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Normalised:
    """Over the last `num_dims` axes."""
    shape = x.shape[-num_dims:]
    x = _exact(x, math.prod(shape))
    weight, bias = _in_float32(x, weight, shape), _in_float32(x, bias)
    return _in_dtype(_layer_norm(_like_weights(x), shape, weight, bias, eps), x.dtype)


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
    weight, bias = _in_float32(x, weight, shape), _in_float32(x, bias)
    dtype, x, dy = x.dtype, _like_weights(_exact(x, math.prod(shape))), _like_weights(dy)
    dx, *others = _layer_norm_backward(dy, x, shape, mean, rstd, weight, bias, mask)
    return _asked((x if math.prod(shape) == 1 else dx, *others), mask, dtype)


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


_SMALL_MEAN = 1.0
"""Up to how many standard deviations a mean may be from 0 for its square to leave the variance
exact: errors of y are up to 2.6 times as large as at 0."""


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Normalised:
    """Over the channels of each group and what stands behind them, an example at a time."""
    if not x.numel():  # PyTorch 2.14 refuses it
        nothing = x.new_zeros((len(x), groups), dtype=accumulator_dtype(x.dtype))
        return x.clone(), nothing, nothing
    memory_format = _memory_format(x)
    x = _dense(x, memory_format)
    is_small = _has_few(x, groups, memory_format) and math.prod(x.shape[2:]) < _FEW_POSITIONS
    # A trace would hold the sizes that the kernel takes for those of any x.
    if is_small or inplace.is_tracing():
        return _group_norm_by_channels(x, groups, weight, bias, eps)
    weight, bias = _in_float32(x, weight, x.shape[1:2]), _in_float32(x, bias)
    sizes = _sizes(x)
    x = _exact(x, sizes[1] * sizes[2] // groups)
    if memory_format == torch.contiguous_format or _is_half(x):
        normalised = _group_norm(_like_weights(x), weight, bias, *sizes, groups, eps)
        return _in_dtype(normalised, x.dtype)
    # In channels_last the kernel takes the variance for E[x²] − E[x]²: wrong for a large mean.
    if inplace.has_values(x):
        found: Normalised = _group_norm(x, weight, bias, *sizes, groups, eps)
        if bool((found[1] * found[2]).abs().max() <= _SMALL_MEAN):
            return found
    means = x.mean(tuple(range(2, x.ndim)))
    around = means.reshape(len(x), groups, -1).mean(2)
    centred = x - _spatial(around.repeat_interleave(x.shape[1] // groups, 1), x)
    y, mean, rstd = _group_norm(centred, weight, bias, *sizes, groups, eps)
    return y, mean + around, rstd


def group_norm_gradients(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    groups: int,
    need: Need,
) -> Gradients:
    mask = need.input, *(need.params and weight is not None,) * 2
    memory_format = _memory_format(x)
    x, dy = _dense(x, memory_format), _dense(dy, memory_format)
    if not x.numel():  # the kernel divides by the size
        nothing = x.new_zeros(x.shape[1])
        return _asked((torch.zeros_like(x), nothing, nothing.clone()), mask, x.dtype)
    # Autograd cannot differentiate the kernel, and a trace would hold sizes for those of any x.
    has_kernel = inplace.is_untracked(dy, x, mean, rstd, weight)
    if _has_few(x, groups, memory_format) or not has_kernel:
        grads = _group_norm_gradients_by_channels(dy, x, mean, rstd, weight, groups, mask)
        return _asked(grads, mask, x.dtype)
    weight = _in_float32(x, weight, x.shape[1:2])
    # In channels_last the kernel crashes where dx is not asked for.
    asked = (need.input or memory_format != torch.contiguous_format, *mask[1:])
    sizes = _sizes(x)
    entries = sizes[1] * sizes[2] // groups
    x = _exact(x, entries)
    dx, *others = _group_norm_backward(dy, x, mean, rstd, weight, *sizes, groups, asked)
    return _asked((x if entries == 1 else dx, *others), mask, x.dtype)


# --- Groups of few channels, in channels_last
#
# A row of X (N, P, C) is the numbers of a position, so that sums over positions are sums of rows,
# which processors add many channels at a time. With Σ over the rows of an example, 𝔾 for the mean
# over a group's channels and rows, and X° = X − μ,
#
#     μ = 𝔾 X,  r = 1/√(𝔾 X°² + ε),    Y = X° ∘ (r·weight) + bias
#     s = Σ dY,  t = r·Σ dY ∘ X°,       dbias, dweight = s, t, added up over examples
#     dX = dY ∘ (r·weight) − r·𝔾(weight·s)/P − X° ∘ (r²·𝔾(weight·t)/P)
#
# Where PyTorch's kernels go through one group after another, few channels leave them little to
# work on at a time.

_FEW, _FEW_IN_HALF = 8, 16
"""Below how many channels a group this way takes less time than PyTorch's kernels."""

_FEW_POSITIONS = 1024
"""From how many positions on PyTorch's forward kernel goes through rows too. All three were
measured on an AMD EPYC (Zen 4)."""


def _has_few(x: Tensor, groups: int, memory_format: torch.memory_format) -> bool:
    few = _FEW_IN_HALF if _is_half(x) else _FEW
    return memory_format != torch.contiguous_format and x.shape[1] < few * groups


def _group_norm_by_channels(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Normalised:
    rows = _rows(x)
    mean = _group_means(rows.sum(1, dtype=accumulator_dtype(x.dtype)), groups) / rows.shape[1]
    centred = rows - _of_channels(mean, x)
    variance = _group_means(centred.square().sum(1), groups) / rows.shape[1]
    rstd = torch.rsqrt(variance + eps)
    scale = _of_channels(rstd, x)
    if weight is not None:
        scale = scale * weight
    y = centred * scale if bias is None else torch.addcmul(bias, centred, scale)
    return _images(y.to(x.dtype), x), mean, rstd


def _group_norm_gradients_by_channels(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    groups: int,
    mask: tuple[bool, bool, bool],
) -> Gradients:
    grad, centred = _rows(dy), _rows(x) - _of_channels(mean, x)
    scale = _of_channels(rstd, x)
    total = grad.sum(1, keepdim=True, dtype=scale.dtype)
    along = (grad * centred).sum(1, keepdim=True) * scale
    dx = None
    if mask[0]:
        own = scale if weight is None else scale * weight
        shift, slope = (
            _of_channels(_group_means((own * sums).squeeze(1), groups) / -grad.shape[1], x)
            for sums in (total, along)
        )
        dx = torch.addcmul(shift, grad, own)
        dx = _images(inplace.add_product(dx, centred, slope * scale), x)
    return dx, along.sum((0, 1)), total.sum((0, 1))


def _rows(x: Tensor) -> Tensor:
    """(N, P, C) of images (N, C, …) in channels_last, with the same memory."""
    return x.movedim(1, -1).unsqueeze(1).flatten(1, -2)


def _images(rows: Tensor, x: Tensor) -> Tensor:
    """(N, C, …) in channels_last of (N, P, C), with the same memory."""
    return rows.movedim(-1, 1).reshape(x.shape)


def _group_means(channels: Tensor, groups: int) -> Tensor:
    """(N, groups) of (N, C)."""
    return torch.unflatten(channels, 1, (groups, -1)).mean(2)


def _of_channels(of_groups: Tensor, x: Tensor) -> Tensor:
    """(N, 1, C) of (N, groups)."""
    return of_groups.repeat_interleave(x.shape[1] // of_groups.shape[1], 1).unsqueeze(1)


def layer_normalised(x: Tensor, mean: Tensor, rstd: Tensor, num_dims: int, eps: float) -> Tensor:
    """x̂, in float32 for half precision."""
    shape = x.shape[-num_dims:]
    x = _exact(widened(x), math.prod(shape))
    if inplace.is_untracked(x):
        return (x - mean) * rstd
    # To autograd, the mean and rstd that the kernel returns are constants.
    normalised: Tensor = _layer_norm(x, shape, None, None, eps)[0]
    return normalised


def group_normalised(x: Tensor, mean: Tensor, rstd: Tensor, groups: int) -> Tensor:
    """x̂, in float32 for half precision."""
    grouped = torch.unflatten(widened(x).unsqueeze(2).flatten(2), 1, (groups, -1)).flatten(2)
    grouped = (_exact(grouped, grouped.shape[2]) - mean.unsqueeze(2)) * rstd.unsqueeze(2)
    return grouped.reshape(x.shape)


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Normalised:
    """A channel at a time, over the batch and what stands behind the channels."""
    if not x.numel():  # the kernel refuses it
        nothing = x.new_zeros(x.shape[1], dtype=accumulator_dtype(x.dtype))
        return x.clone(), nothing, nothing
    weight, bias = _in_float32(x, weight, x.shape[1:2]), _in_float32(x, bias)
    x = _dense(x, _memory_format(x))
    normalised = _batch_norm(_like_weights(x), weight, bias, None, None, True, 0.0, eps)
    return _in_dtype(normalised, x.dtype)


def batch_norm_gradients(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    eps: float,
    need: Need,
) -> Gradients:
    mask = need.input, *(need.params and weight is not None,) * 2
    if not x.numel():
        nothing = x.new_zeros(x.shape[1])
        return _asked((torch.zeros_like(x), nothing, nothing.clone()), mask, x.dtype)
    # Where the two differ in layout, or the weight is strided, the kernel returns wrong numbers.
    memory_format = _memory_format(x)
    x, dy = _dense(x, memory_format), _dense(dy, memory_format)
    weight = _in_float32(x, weight, x.shape[1:2])
    dtype, x, dy = x.dtype, _like_weights(x), _like_weights(dy)
    grads = _batch_norm_backward(dy, x, weight, None, None, mean, rstd, True, eps, mask)
    return _asked(grads, mask, dtype)


def channel_affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """weight · x + bias, a number of each for a channel."""
    return torch.addcmul(_spatial(bias, x), x, _spatial(weight, x))


def channel_affine_gradients(dy: Tensor, x: Tensor, weight: Tensor, need: Need) -> Gradients:
    dx = dy * _spatial(weight, x) if need.input else None
    if not need.params:
        return dx, None, None
    axes = (0, *range(2, x.ndim))
    dweight = (widened(x) * dy).sum(axes).to(weight.dtype)
    return dx, dweight, dy.sum(axes)


# --- How the kernels want it


def _in_dtype(normalised: Normalised, dtype: torch.dtype) -> Normalised:
    """y in x's dtype: under vmap, the kernels return it in the weight's."""
    y, mean, rstd = normalised
    return y.to(dtype), mean, rstd


def _in_float32(x: Tensor, weight: Tensor | None, ones: torch.Size | None = None) -> Tensor | None:
    """The weight, contiguous; in float32 for x in half precision on the CPU.

    There, None becomes ones of the shape `ones`, because the statistics take the weight's dtype.
    """
    if x.is_cpu and _is_half(x):
        if weight is not None:
            return weight.float()
        return None if ones is None else x.new_ones(ones, dtype=torch.float32)
    return None if weight is None else weight.contiguous()


def _like_weights(x: Tensor) -> Tensor:
    """x, in float32 as the weights are: under torch.func, the kernels take no two dtypes."""
    return x.float() if x.is_cpu and _is_half(x) and not inplace.is_eager() else x


def _exact(x: Tensor, entries: int) -> Tensor:
    """x, or for sets of one entry x − μ = 0, which the kernels find up to rounding alone."""
    return x - x if entries == 1 else x


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def _asked(
    grads: Sequence[Tensor | None], mask: tuple[bool, bool, bool], dtype: torch.dtype
) -> Gradients:
    """The gradients that were asked for, in the dtype."""
    dx, dweight, dbias = (
        grad.to(dtype) if asked and grad is not None else None
        for grad, asked in zip(grads, mask, strict=True)
    )
    return dx, dweight, dbias


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """(N, C, the number of entries of a channel)."""
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def _spatial(channels: Tensor, x: Tensor) -> Tensor:
    """(…, C) with an axis of size 1 for each axis of x that stands behind the channels."""
    return channels.reshape((*channels.shape, *(1,) * (x.ndim - 2)))


def _memory_format(x: Tensor) -> torch.memory_format:
    """The memory format that the kernels should see x in."""
    return native.memory_format(x) if x.is_cpu else torch.contiguous_format


def _dense(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """x in the memory format, with the strides of a new tensor."""
    if not inplace.is_eager():
        return x.clone(memory_format=memory_format)  # vmap may hide an expanded axis
    # Strides of axes of size 1 can be anything, and kernels have relied on them.
    is_dense = x.stride() == native.strides(x.shape, memory_format)
    return x if is_dense else x.clone(memory_format=memory_format)
