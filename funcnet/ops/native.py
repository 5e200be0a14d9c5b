"""Convolution of images and volumes by PyTorch's own kernels, forward and backward.

On the CPU, images are laid out in channels_last, which makes those kernels about twice as fast, and
volumes in channels_last_3d, which makes them up to 1.5 times as fast. Images of one row or column,
and depthwise kernels, gain as well. Images of one channel have no memory format of their own: the
kernels take them for row-major, make a row-major y, and copy grad to that format. A second channel,
of zeros, makes them up to ten times as fast: measured on an AMD EPYC (Zen 4), from 1 to 8, 32 and
64 channels. Where y has few channels, it is cheaper to copy y to channels_last, in which the layers
behind, pooling above all, are faster: measured on an Intel Xeon, from 1 to 2 up to 32 channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from funcnet.compat import is_transformed
from funcnet.ops import inplace, processor
from funcnet.ops.need import Need
from funcnet.ops.window import Ints, Window

_backward = torch.ops.aten.convolution_backward.default
_CONVOLUTIONS = {4: F.conv2d, 5: F.conv3d}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""By the number of x's axes."""

Sizes: TypeAlias = tuple[Ints, Ints, Ints, int]
"""Stride, padding, dilation and groups, as PyTorch's kernels take them."""


def layout(x: Tensor) -> Tensor:
    """x in the memory format that is fastest on its device; row-major if it has one channel.

    An exporter has formats of its own.
    """
    if is_laid_out(x) or not x.is_cpu:
        return x
    channels = x.shape[1]
    if inplace.has_open_sizes(x):
        return x.clone(memory_format=torch.contiguous_format) if channels == 1 else x
    memory_format = _format(x.ndim, channels)
    if not torch.compiler.is_compiling():
        try:
            x = x.contiguous(memory_format=memory_format)
            return _canonical(x, memory_format) if 1 in x.shape else x
        except RuntimeError:
            pass
    if channels == 1:
        return x.clone(memory_format=memory_format)
    # torch.func.vmap refuses memory formats; a permuted tensor has the same strides.
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def layout_for(weight: Tensor, x: Tensor) -> Tensor:
    """x, or grad, in the memory format that is fastest for a convolution by this weight.

    torch.func.vmap over weights makes a single convolution of them, with a group for each, whose
    kernels are faster on row-major images: 0.5 to 0.8 of the time, of 6 networks with 3 to 16
    channels of 16×16 pixels (AMD Zen 4, one thread, float32).
    """
    if _is_wrapped(weight) and inplace.is_mapped_alone():
        return _canonical(x) if 1 in x.shape else x
    return layout(x)


def _is_wrapped(x: Tensor) -> bool:
    """Whether torch.func has wrapped x, which hides an axis or derivatives."""
    return not is_dynamo_compiling() and is_transformed(x)


def is_laid_out(x: Tensor) -> bool:
    """Whether x has the strides of new images in channels_last, which most x have in a step."""
    if x.ndim != 4 or is_dynamo_compiling():
        return False
    _, channels, height, width = x.shape
    if channels == 1 or type(height) is not int or type(width) is not int:  # an open size
        return False
    return x.stride() == (channels * height * width, 1, width * channels, channels)


def _canonical(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Return x with the strides of a new tensor, row-major or in channels_last, if it has others.

    The stride of an axis of size 1 can be any number. Some of PyTorch's kernels use it all the
    same: they read past the end of one-channel images and kernels in channels_last, and return
    wrong numbers.
    """
    if x.stride() == strides(x.shape, torch.contiguous_format):
        return x
    if x.shape[1] > 1 and x.stride() == strides(x.shape, _CHANNELS_LAST[x.ndim]):
        return x
    return x.clone(memory_format=memory_format)


def memory_format(x: Tensor) -> torch.memory_format:
    """x's memory format: channels_last for images or volumes that have it, else row-major."""
    # torch.func.vmap does not support memory formats.
    if x.ndim in _CHANNELS_LAST and inplace.is_eager() and not x.is_contiguous():
        last = _CHANNELS_LAST[x.ndim]
        if x.is_contiguous(memory_format=last):
            return last
    return torch.contiguous_format


def memory_format_of_new(like: Tensor) -> torch.memory_format:
    """The memory format in which `layout` puts images or volumes with these channels."""
    if like.is_cpu and inplace.is_eager():
        return _format(like.ndim, like.shape[1])
    return torch.contiguous_format


def _format(ndim: int, channels: int) -> torch.memory_format:
    return _CHANNELS_LAST[ndim] if channels > 1 else torch.contiguous_format


def strides(shape: Sequence[int], memory_format: torch.memory_format) -> Ints:
    """The strides of a new tensor of a shape (N, C, …)."""
    _, *inner = shape
    if memory_format != torch.contiguous_format:
        inner = [*inner[1:], inner[0]]
    steps = [1]
    for size in reversed(inner):
        steps.insert(0, steps[0] * size)
    if memory_format != torch.contiguous_format:
        steps.insert(1, steps.pop())
    return tuple(steps)


def empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """New memory for images, in the memory format of `layout`."""
    return like.new_empty_strided(tuple(shape), strides(shape, _format(len(shape), shape[1])))


_SOME_CHANNELS, _MANY_CHANNELS, _MANY_PIXELS = 4, 8, 1024
"""The channels of y from which it is laid out, those from which a second channel of x saves time,
and the pixels of x from which either does."""


def _gains_by_second_channel(x: Tensor) -> bool:
    """Whether x, of one channel, is images that a second one would make faster."""
    return (
        x.ndim == 4
        and x.is_cpu
        and x.element_size() <= 4  # in float64 there is one kernel for every layout
        and not inplace.has_open_sizes(x)
        and x.numel() >= _MANY_PIXELS
    )


def _with_second_channel(x: Tensor) -> Tensor:
    """x (N, 1, H, W) with a channel of zeros behind it, in channels_last."""
    return F.pad(x.permute(0, 2, 3, 1), (0, 1)).permute(0, 3, 1, 2)


def upcast(x: Tensor) -> Tensor:
    """Return x, in float32 if it is in half precision on the CPU.

    PyTorch's gradients in bfloat16 are wrong there for images of few columns.
    """
    return x.float() if _is_narrow(x) else x


def _is_narrow(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16) and x.is_cpu


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """y (N, O, H′, W′) of x (N, C, H, W) and weight (O, C/groups, kh, kw); volumes likewise."""
    channels = weight.shape[0]
    gains = x.shape[1] == 1 and channels >= _SOME_CHANNELS and _gains_by_second_channel(x)
    if gains and channels >= _MANY_CHANNELS:
        x, weight = _with_second_channel(x), _with_second_channel(weight)
    if not window.is_dilated and not (x.element_size() < 4 and _fails_in_half(x, weight, window)):
        y = run_forward(x, weight, bias, window)
    else:
        # oneDNN 3.x has crashed where dilated windows see nothing but padding, with a bias or in
        # bfloat16.
        y = run_forward(upcast(x), upcast(weight), None, window)
        if bias is not None:
            y = inplace.add(y, bias.reshape(-1, *(1,) * (y.ndim - 2)))
        y = y.to(x.dtype)
    return layout_for(weight, y) if gains else y


_WIDE = 15
"""From how many taps in a row oneDNN may never return from making a depthwise kernel."""


def _fails_in_half(x: Tensor, weight: Tensor, window: Window) -> bool:
    """Whether oneDNN 3.x may return wrong numbers in half precision, or none at all.

    They are wrong with a stride, for volumes with one channel a group, and where `overruns_tiles`.
    With up to 16 groups of one channel and 15 taps or more in a row, it never returned on an Intel
    Xeon with AVX-512, in bfloat16 and float16. In float32 it did.
    """
    if not _is_narrow(x):
        return False
    if window.is_strided or x.ndim == 5 or overruns_tiles(x, weight, window):
        return True
    return window.groups > 1 and weight.shape[1] == 1 and weight.shape[-1] >= _WIDE


def overruns_tiles(x: Tensor, weight: Tensor, window: Window) -> bool:
    """Whether oneDNN's kernel for bfloat16 on processors with AMX returns wrong numbers for y.

    It does where a row of taps, of few channels each, fills several tiles of 32 numbers exactly; of
    kernels with a single column, a column of taps. Measured on an Intel Xeon (Sapphire Rapids) with
    1 to 128 channels, 1 to 64 taps in a row and strides of 1 to 8: of up to 15 channels, or 31 with
    a stride of 4 and more, nearly all are off by as much as y; no other one is.
    """
    if not processor.multiplies_in_tiles(x):
        return False
    axis = -2 if weight.shape[-1] == 1 else -1
    channels, taps = weight.shape[1], weight.shape[axis]
    numbers = channels * taps
    few = 32 if window.stride[axis] >= 4 else 16
    return channels < few and numbers > 32 and numbers % 32 == 0


def run_forward(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """y by PyTorch's kernels, in x's dtype."""
    stride, padding, dilation, groups = window.stride, window.both, window.dilation, window.groups
    convolve = _CONVOLUTIONS[x.ndim]
    x = x if window.is_even else _padded(x, window, padding)
    weight = _canonical(weight) if 1 in weight.shape else weight
    return convolve(x, weight, bias, stride, padding, dilation, groups)


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, window: Window, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx), None where it is not needed."""
    both = window.both
    if need.params and x.ndim == 5 and _starts_far_before(x, window):
        both = (0, *both[1:])
    padded = x if window.is_even and both is window.both else _padded(x, window, both)
    sizes = window.stride, both, window.dilation, window.groups
    dweight, dx = kernel_gradients(padded, weight, grad, need, sizes)
    if dx is not None and padded is not x:
        dx = pad(dx, [-side for side in _sides_beyond(window, both)])
    return dweight, dx


def _starts_far_before(x: Tensor, window: Window) -> bool:
    """Whether windows over a volume start in the padding, more than a stride > 1 before it.

    oneDNN 3.x has then read and written past the end of x, for the gradient of the weight: where
    its depth is small, in float32. Padding x beforehand prevents this.
    """
    return x.is_cpu and x.element_size() <= 4 and 1 < window.stride[0] < window.before[0]


def kernel_gradients(
    x: Tensor, weight: Tensor, grad: Tensor, need: Need, sizes: Sizes = ((1, 1), (0, 0), (1, 1), 1)
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx) of a convolution, by PyTorch's backward kernels."""
    if x.element_size() < 4 and _is_narrow(x):
        dweight, dx = kernel_gradients(x.float(), weight.float(), grad.float(), need, sizes)
        return cast(dweight, x.dtype), cast(dx, x.dtype)
    if x.shape[1] == 1 and _gains_by_second_channel(x):
        both = _with_second_channel(x), _with_second_channel(weight)
        dweight, dx = kernel_gradients(*both, grad, need, sizes)
        first = None if dweight is None else dweight[:, :1].contiguous()
        return first, None if dx is None else dx[:, :1].contiguous()
    return run_backward(x, weight, grad, need, sizes)


def run_backward(
    x: Tensor, weight: Tensor, grad: Tensor, need: Need, sizes: Sizes
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx) of a convolution, by PyTorch's backward kernels in x's dtype and layout."""
    stride, padding, dilation, groups = sizes
    if x.shape[0] == 0 and torch.compiler.is_compiling():
        # PyTorch 2.13 expects other strides of what the kernel returns here.
        dweight = torch.zeros_like(weight) if need.params else None
        return dweight, torch.zeros_like(x) if need.input else None
    if 1 in x.shape[1:] and _is_wrapped(x):
        # PyTorch's kernel for float64 refuses strides that could be those of channels_last.
        x = x.clone(memory_format=torch.contiguous_format)
    if x.ndim == 5 and x.shape[1] == 1:
        # Volumes of one channel are row-major, and PyTorch would lay grad out anew.
        grad = _canonical(grad.contiguous())
    elif not is_laid_out(grad):
        grad = layout_for(weight, grad)
    dx, dweight, _ = _backward(
        grad,
        x,
        _canonical(weight) if 1 in weight.shape else weight,
        None,
        stride,
        padding,
        dilation,
        False,
        (0,) * len(stride),
        groups,
        (need.input, need.params, False),
    )
    return None if dweight is None else like(weight, dweight), dx


def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """x in another dtype; None for None."""
    return None if x is None else x.to(dtype)


def like(weight: Tensor, dweight: Tensor) -> Tensor:
    """dweight in the memory format of the weight, so that an update runs through both alike."""
    return dweight if dweight.stride() == weight.stride() else dweight.contiguous()


def pad(x: Tensor, sides: Sequence[int]) -> Tensor:
    """x padded, then cropped where a side is negative; F.pad alone would crop first."""
    grown = F.pad(x, [max(side, 0) for side in sides])
    return F.pad(grown, [min(side, 0) for side in sides]) if min(sides) < 0 else grown


def _padded(x: Tensor, window: Window, both: Ints) -> Tensor:
    """x with the padding that a kernel does not add, which pads both sides of an axis alike."""
    return layout(pad(x, _sides_beyond(window, both)))


def _sides_beyond(window: Window, both: Ints) -> list[int]:
    """The padding of each side beyond `both`, in the order of F.pad."""
    axes = zip(window.sides, both, strict=True)
    return [side - padding for sides, padding in reversed([*axes]) for side in sides]
