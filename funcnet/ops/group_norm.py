"""Normalisation over groups of channels, by PyTorch's kernels or by sums of rows.

`group_norm` returns (y, mean, 1/√(variance + ε)); `group_norm_gradients` takes the last two back.
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
    is_half,
    laid_out,
    like_weights,
    spatial,
)

_group_norm = torch.native_group_norm
_group_norm_backward = torch.ops.aten.native_group_norm_backward.default

_SMALL_MEAN, _SMALL_MEAN_IN_HALF = 1.0, 16.0
"""Up to how many standard deviations a mean may be from 0 for its square to leave the variance
exact: in float32, errors of y are up to 2.6 times as large as at 0. In half precision, whose
variance is of float32, they are not larger."""


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Normalised:
    """Normalise over the channels of each group and all positions, in each example."""
    if not x.numel():  # PyTorch 2.14 refuses it
        nothing = x.new_zeros((len(x), groups), dtype=accumulator_dtype(x.dtype))
        return x.clone(), nothing, nothing
    if torch.compiler.is_compiling() and inplace.is_transforming():
        # The kernel has no rule there that fake tensors can follow.
        return _group_norm_by_channels(x, groups, weight, bias, eps)
    x, memory_format = laid_out(x)
    x = exact(x, _entries(x, groups))
    few = _has_few(x, groups, memory_format) and math.prod(x.shape[2:]) < _FEW_POSITIONS
    if few and x.numel() <= _FEW_ENTRIES:
        y, mean, rstd = group_norm(_row_major(x), groups, weight, bias, eps)
        return y.contiguous(memory_format=memory_format), mean, rstd
    if few and is_half(x):
        weight, bias = in_float32(x, weight), in_float32(x, bias)
        return in_dtype(group_norm(x.float(), groups, weight, bias, eps), x.dtype)
    # A trace would use the sizes that the kernel takes for every x.
    if few or inplace.is_tracing():
        return _group_norm_by_channels(x, groups, weight, bias, eps)
    weight, bias = in_float32(x, weight, x.shape[1:2]), in_float32(x, bias)
    sizes = _sizes(x)
    if memory_format == torch.contiguous_format:
        normalised = _group_norm(like_weights(x), weight, bias, *sizes, groups, eps)
        return in_dtype(normalised, x.dtype)
    # In channels_last the kernel adds up one position after another, and computes the variance as
    # E[x²] − E[x]²: wrong for many positions, and for a large mean.
    if inplace.has_values(x):
        if sizes[2] >= _MANY_POSITIONS and not is_half(x):
            return _group_norm_by_channels(x, groups, weight, bias, eps)
        found: Normalised = _group_norm(x, weight, bias, *sizes, groups, eps)
        small = _SMALL_MEAN_IN_HALF if is_half(x) else _SMALL_MEAN
        least, most = (found[1] * found[2]).aminmax()
        if -small <= least.item() and most.item() <= small:  # not for NaN
            return found
    wide = widened(x)
    means = wide.mean(tuple(range(2, x.ndim)))
    around = means.reshape(len(x), groups, -1).mean(2)
    centred = wide - spatial(around.repeat_interleave(x.shape[1] // groups, 1), x)
    y, mean, rstd = _group_norm(centred, weight, bias, *sizes, groups, eps)
    return y.to(x.dtype), mean + around, rstd


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
    x, memory_format = laid_out(x)
    dy = dense(dy, memory_format)
    if not x.numel():  # the kernel divides by the size
        nothing = x.new_zeros(x.shape[1])
        return as_asked((torch.zeros_like(x), nothing, nothing.clone()), mask, x.dtype)
    entries = _entries(x, groups)
    x = exact(x, entries)
    # Autograd cannot differentiate the kernel, and a trace would use its sizes for every x.
    has_kernel = inplace.is_untracked(dy, x, mean, rstd, weight)
    some = x.numel() <= _SOME_ENTRIES and x.shape[1] >= _SOME * groups and not is_half(x)
    few = _has_few(x, groups, memory_format) and not some
    if few and has_kernel and x.numel() <= _FEW_ENTRIES:
        x, dy = _row_major(x), _row_major(dy)
        dx, dweight, dbias = group_norm_gradients(dy, x, mean, rstd, weight, groups, need)
        dx = None if dx is None else dx.contiguous(memory_format=memory_format)
        return dx, dweight, dbias
    if few and is_half(x):
        weight = in_float32(x, weight)
        grads = group_norm_gradients(dy.float(), x.float(), mean, rstd, weight, groups, need)
        return as_asked(grads, mask, x.dtype)
    if few or not has_kernel:
        dx, *others = _group_norm_gradients_by_channels(dy, x, mean, rstd, weight, groups, mask)
    else:
        weight = in_float32(x, weight, x.shape[1:2])
        # In channels_last the kernel crashes where dx is not asked for.
        asked = (need.input or memory_format != torch.contiguous_format, *mask[1:])
        sizes = (*_sizes(x), groups)
        dx, *others = _group_norm_backward(dy, x, mean, rstd, weight, *sizes, asked)
    return as_asked((x if entries == 1 else dx, *others), mask, x.dtype)


def group_normalised(x: Tensor, mean: Tensor, rstd: Tensor, groups: int) -> Tensor:
    """x̂, in float32 for half precision."""
    grouped = torch.unflatten(widened(x).unsqueeze(2).flatten(2), 1, (groups, -1)).flatten(2)
    grouped = (exact(grouped, grouped.shape[2]) - mean.unsqueeze(2)) * rstd.unsqueeze(2)
    return grouped.reshape(x.shape)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """(N, C, the number of entries of a channel)."""
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def _entries(x: Tensor, groups: int) -> int:
    """The number of entries of a group; 0 in a trace, which has to work for any number."""
    return 0 if inplace.is_tracing() else math.prod(x.shape[1:]) // groups


def _row_major(x: Tensor) -> Tensor:
    """A copy, with the strides of a new tensor: images of one pixel may have others."""
    return x.clone(memory_format=torch.contiguous_format)


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
"""Below how many channels a group sums of rows take less time than PyTorch's kernels. Below the
second, half precision is put into float32: its gradients take 0.5 to 0.9 of the time of sums of
rows in bfloat16, from 2 to 8 channels a group (Intel Xeon with AVX-512)."""

_FEW_POSITIONS = 1024
"""From how many positions on PyTorch's forward kernel goes through rows too."""

_MANY_POSITIONS = 2**20
"""From how many positions on PyTorch's forward kernel in channels_last loses digits. In float32, it
is off by 5·10⁻⁵ of the largest entry of y at 512×512, 2·10⁻⁴ at 1024×1024 and 2·10⁻³ at 2048×2048;
sums of rows are off by 10⁻⁷, and take 2.3 times the time with 32 and 64 channels."""

_FEW_ENTRIES = 2**15
"""Up to how many entries PyTorch's kernels take less time on a row-major copy: calls take most of
it. With 8 groups of 4 channels, 8×8 pixels and 4 examples, they take 19 µs instead of 64 forward,
and 26 instead of 91 backward."""

_SOME, _SOME_ENTRIES = 4, 2**17
"""From how many channels a group, and up to how many entries, PyTorch's backward kernel takes less
time in channels_last as well. All were measured on an AMD EPYC (Zen 4)."""


def _has_few(x: Tensor, groups: int, memory_format: torch.memory_format) -> bool:
    few = _FEW_IN_HALF if is_half(x) else _FEW
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
    return rows.transpose(1, 2).reshape(x.shape)


def _group_means(channels: Tensor, groups: int) -> Tensor:
    """(N, groups) of (N, C)."""
    return torch.unflatten(channels, 1, (groups, -1)).mean(2)


def _of_channels(of_groups: Tensor, x: Tensor) -> Tensor:
    """(N, 1, C) of (N, groups)."""
    return of_groups.repeat_interleave(x.shape[1] // of_groups.shape[1], 1).unsqueeze(1)
