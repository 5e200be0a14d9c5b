"""Pooling of signals, images and volumes by PyTorch's own kernels, forward and backward.

A signal (N, C, L) is pooled as an image (N, C, 1, L). The backward kernels ask for x, and look at
its shape and memory format alone: they are handed new memory, which nobody reads or writes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from funcnet import compat
from funcnet.ops import inplace, native
from funcnet.ops.window import Ints, Window

_aten = torch.ops.aten
_MAX = {4: _aten.max_pool2d_with_indices.default, 5: _aten.max_pool3d_with_indices.default}
_MAX_BACKWARD = {
    4: _aten.max_pool2d_with_indices_backward.default,
    5: _aten.max_pool3d_with_indices_backward.default,
}
_AVG = {4: _aten.avg_pool2d.default, 5: _aten.avg_pool3d.default}
_AVG_BACKWARD = {4: _aten.avg_pool2d_backward.default, 5: _aten.avg_pool3d_backward.default}
_ADAPTIVE_MAX = {4: _aten.adaptive_max_pool2d.default, 5: _aten.adaptive_max_pool3d.default}
_ADAPTIVE_MAX_BACKWARD = {
    4: _aten.adaptive_max_pool2d_backward.default,
    5: _aten.adaptive_max_pool3d_backward.default,
}
"""By the number of x's axes."""

_LANES = 16
"""From how many channels the CPU's kernels are faster if these come last: measured."""


def count(window: Window, size: Ints, ceil_mode: bool) -> Ints:
    """The number of windows on each axis: whole ones, or all that start before x's end."""
    if not ceil_mode:
        return window.count(size)
    counts = []
    axes = zip(window.padded(size), window.reach, window.stride, window.before, size, strict=True)
    for padded, reach, stride, before, n in axes:
        windows = -((reach - padded) // stride) + 1
        counts.append(windows - 1 if (windows - 1) * stride >= n + before else windows)
    return tuple(counts)


def some_see_nothing(window: Window, size: Ints) -> bool:
    """Whether all taps of some window are outside x, which is possible with dilation.

    Such a window starts in the padding before x, and steps over all of x. With padding of at most
    half the kernel, some tap is not before x.
    """
    axes = zip(window.before, window.stride, window.dilation, size, strict=True)
    return any(
        start % dilation >= n  # the first tap that is not before x
        for before, stride, dilation, n in axes
        for start in range(-before, 0, stride)
    )


def maximum(x: Tensor, window: Window, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    """(y, indices): the largest entry of each window, and where in x's image it is, counted row by
    row."""
    if window.of_height_1 is not None:
        y, indices = maximum(x.unsqueeze(2), window.of_height_1, ceil_mode)
        return y.squeeze(2), indices.squeeze(2)
    sizes = window.kernel_size, window.stride, window.before, window.dilation
    y, indices = _MAX[x.ndim](_layout(x), *sizes, ceil_mode)
    return y, indices


def maximum_of_signal(x: Tensor, window: Window, ceil_mode: bool) -> Tensor:
    """y of `maximum` of signals (N, C, L), by a kernel that finds no indices."""
    if inplace.has_open_sizes(x):  # the kernel would hold the graph to one length
        return maximum(x, window, ceil_mode)[0]
    sizes = window.kernel_size, window.stride, window.before, window.dilation
    return torch.max_pool1d(x, *sizes, ceil_mode)


def maximum_backward(
    dy: Tensor, indices: Tensor, window: Window, ceil_mode: bool, shape: Ints
) -> Tensor:
    """dx of the shape: each entry of dy where the largest entry of its window was."""
    if window.of_height_1 is not None:
        image = (*shape[:2], 1, *shape[2:])
        whole = dy.unsqueeze(2), indices.unsqueeze(2), window.of_height_1, ceil_mode, image
        return maximum_backward(*whole).squeeze(2)
    sizes = window.kernel_size, window.stride, window.before, window.dilation
    dy = _layout(dy)
    dx: Tensor = _MAX_BACKWARD[dy.ndim](dy, _like(dy, shape), *sizes, ceil_mode, indices)
    return dx


def average(x: Tensor, window: Window, ceil_mode: bool, count_include_pad: bool) -> Tensor:
    """The mean of each window; with `count_include_pad`, the entries of padding count."""
    if window.of_height_1 is not None:
        whole = x.unsqueeze(2), window.of_height_1, ceil_mode, count_include_pad
        return average(*whole).squeeze(2)
    sizes = window.kernel_size, window.stride, window.before
    divisor = 1 if _is_compiled_wrongly(ceil_mode, count_include_pad) else None
    y: Tensor = _AVG[x.ndim](_for_averages(x), *sizes, ceil_mode, count_include_pad, divisor)
    return (y if divisor is None else y / _taps(window, x.shape[2:], y)).to(x.dtype)


def average_backward(
    dy: Tensor, window: Window, ceil_mode: bool, count_include_pad: bool, shape: Ints
) -> Tensor:
    """dx of the shape: each entry of dy, shared out evenly in its window."""
    if window.of_height_1 is not None:
        image = (*shape[:2], 1, *shape[2:])
        whole = dy.unsqueeze(2), window.of_height_1, ceil_mode, count_include_pad, image
        return average_backward(*whole).squeeze(2)
    sizes = window.kernel_size, window.stride, window.before
    grad, divisor = _for_averages(dy), None
    like = _like(grad, shape)
    if _is_compiled_wrongly(ceil_mode, count_include_pad):
        grad, divisor = grad / _taps(window, shape[2:], grad), 1
    dx: Tensor = _AVG_BACKWARD[dy.ndim](grad, like, *sizes, ceil_mode, count_include_pad, divisor)
    return dx.to(dy.dtype)


def _is_compiled_wrongly(ceil_mode: bool, count_include_pad: bool) -> bool:
    """Whether PyTorch 2.13 compiles a graph of windows that may reach beyond the padding.

    Then gradients, autograd's too, would be divided by all taps of a window.
    """
    if not (ceil_mode and count_include_pad and torch.compiler.is_compiling()):
        return False
    return not torch.compiler.is_exporting()


def _taps(window: Window, size: Ints, y: Tensor) -> Tensor:
    """The number of taps of each window that are in x or its padding, in the place of y's pixel."""
    taps = y.new_ones(())
    axes = zip(y.shape[2:], window.stride, window.padded(size), window.reach, strict=True)
    for count, stride, padded, reach in axes:
        start = torch.arange(count, device=y.device) * stride
        taps = taps.unsqueeze(-1) * (padded - start).clamp(max=reach)
    return taps


def adaptive_maximum(x: Tensor, size: Ints) -> tuple[Tensor, Tensor]:
    """(y, indices), as `maximum`, of windows that cut each axis into that many."""
    if x.ndim == 3:
        y, indices = adaptive_maximum(x.unsqueeze(2), (1, *size))
        return y.squeeze(2), indices.squeeze(2)
    y, indices = _ADAPTIVE_MAX[x.ndim](x, size)
    return y, indices


def adaptive_maximum_backward(dy: Tensor, indices: Tensor, shape: Ints) -> Tensor:
    """dx of the shape."""
    if dy.ndim == 3:
        image = (*shape[:2], 1, *shape[2:])
        return adaptive_maximum_backward(dy.unsqueeze(2), indices.unsqueeze(2), image).squeeze(2)
    dx: Tensor = _ADAPTIVE_MAX_BACKWARD[dy.ndim](dy, _like(dy, shape), indices)
    return dx


def adaptive_average(x: Tensor, size: Ints) -> Tensor:
    """The mean of each of the windows that cut each axis into that many."""
    if all(n == 1 for n in size):  # a single window, for which a sum is faster
        return x.mean(list(range(2, x.ndim)), keepdim=True)
    if x.ndim == 3:
        return adaptive_average(x.unsqueeze(2), (1, *size)).squeeze(2)
    y: Tensor = compat.adaptive_average[x.ndim](_for_averages_of_any_size(x), size)
    return y.to(x.dtype)


def adaptive_average_backward(dy: Tensor, shape: Ints) -> Tensor:
    """dx of the shape."""
    if dy.ndim == 3:
        image = (*shape[:2], 1, *shape[2:])
        return adaptive_average_backward(dy.unsqueeze(2), image).squeeze(2)
    if _is_pixel(dy):
        share = dy / math.prod(shape[2:])
        return share.expand(shape).clone(memory_format=native.memory_format_of_new(dy))
    grad = _for_averages_of_any_size(dy)
    dx: Tensor = compat.adaptive_average_backward[dy.ndim](grad, _like(grad, shape))
    return dx.to(dy.dtype)


def _layout(x: Tensor) -> Tensor:
    """x with its channels last where there are enough of them for the kernels' vectors."""
    return native.layout(x) if x.shape[1] >= _LANES else x


def _for_averages(x: Tensor) -> Tensor:
    """x as the kernels for averages want it: the CPU has none for volumes in half precision."""
    return _layout(x) if x.ndim == 4 else native.upcast(x)


def _for_averages_of_any_size(x: Tensor) -> Tensor:
    """x as the kernels for adaptive averages want it: for volumes, the CPU's add up in its dtype,
    where sums in half precision stop growing."""
    return x if x.ndim == 4 else native.upcast(x)


def _like(dy: Tensor, shape: Ints) -> Tensor:
    """A tensor of x's shape, in dy's memory format, for a kernel that will not read it."""
    # One pixel has no format of its own; dx gets the format that the layers below want.
    format_of = native.memory_format_of_new if _is_pixel(dy) else native.memory_format
    return dy.new_empty_strided(shape, native.strides(shape, format_of(dy)))


def _is_pixel(y: Tensor) -> bool:
    return math.prod(y.shape[2:]) == 1
