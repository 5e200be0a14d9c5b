"""Convolution with the stride of the kernel's size: products of matrices over patches.

Such windows do not overlap: they cut the image into patches. With the kh·kw·C numbers of a patch
as the channels of one pixel, the convolution is pixelwise, and so are its gradients. The gradients
of the patches, put back in their places, are dx.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from funcnet.ops import inplace, native, pixelwise
from funcnet.ops.need import Need
from funcnet.ops.window import Ints, Window

_FEW, _FEW_BACKWARD = 256, 1024
"""Up to how many patches this may be faster than PyTorch's kernels, forward and backward, if the
products are few, too: measured."""

_LARGE, _WIDE = 3 * 2**19, 2**15
"""The numbers of one image, and of the weight, from which dweight alone is faster over patches:
oneDNN's sums slow down where an image leaves the cache. With a weight (256, 128, 2, 2), PyTorch
took 1.0 times as long for an image of 64×64 pixels, 1.6 times for 128×128 and 4.1 times for
212×212; with (128, 64, 2, 2), 1.7 times for 160×160 (AMD Zen 4, one thread, float32)."""

_FEW_CHANNELS, _MANY_TAPS = 8, 9
"""Up to how many channels of x, and from how many taps, dx alone is faster over patches: for 3
channels PyTorch's kernel took 1.9 times as long with 3×3 taps, 3 to 5 times with 4×4 and 4 to 12
times with 8×8 to 16×16 (AMD Zen 4, one thread, float32)."""

_PIXEL = (1, 1)
"""The size of a patch that is a pixel, as it stands in x."""

_TINY = 20480
"""Up to how many numbers in all PyTorch has a leaner kernel for a single image."""


def are_faster(x: Tensor, weight: Tensor, window: Window, backward: bool) -> bool:
    """Whether y, or dweight and dx together, are faster over patches."""
    if not x.is_cpu or inplace.has_open_sizes(x):
        return False
    if x.element_size() < 4 or _is_tiny(x):
        return False
    rows, columns = window.count(x.shape[2:])
    windows = x.shape[0] * rows * columns
    few = _FEW_BACKWARD if backward else _FEW
    return windows <= few and pixelwise.are_faster(windows, weight)


def dweight_is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether dweight alone is faster over patches."""
    return _are_in_float32(x) and math.prod(x.shape[1:]) > _LARGE and weight.numel() >= _WIDE


def dx_is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether dx alone is faster over patches."""
    return _are_in_float32(x) and have_few_channels(weight) and not _is_tiny(x)


def have_few_channels(weight: Tensor) -> bool:
    """Whether patches have few channels and many pixels."""
    return weight.shape[1] <= _FEW_CHANNELS and math.prod(weight.shape[2:]) >= _MANY_TAPS


def _are_in_float32(x: Tensor) -> bool:
    """Whether x is images in float32 on the CPU."""
    is_on_cpu = x.ndim == 4 and x.is_cpu
    return is_on_cpu and x.element_size() == 4 and not inplace.has_open_sizes(x)


def _is_tiny(x: Tensor) -> bool:
    return x.shape[0] == 1 and x.numel() <= _TINY


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """y (N, O, H′, W′) of x (N, C, H, W) and weight (O, C, kh, kw)."""
    return pixelwise.convolve(to_patches(x, window), matrix(weight), bias)


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, window: Window, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx), None where it is not needed."""
    grad = native.layout(grad)
    if need.params:
        patches = to_patches(x, window)
    else:  # sizes are enough for dx
        batch, _, *rows_and_columns = grad.shape
        taps = x.shape[1] * math.prod(window.kernel_size)
        patches = x.new_empty(batch, *rows_and_columns, taps).permute(0, 3, 1, 2)
    dmatrix, dpatches = pixelwise.gradients(patches, matrix(weight), grad, need)
    dx = None if dpatches is None else _from_patches(dpatches, window.kernel_size, x)
    if dmatrix is None:
        return None, dx
    out_channels, channels, height, width = weight.shape
    dweight = dmatrix.reshape(out_channels, height, width, channels).permute(0, 3, 1, 2)
    return native.like(weight, dweight), dx


def to_patches(x: Tensor, window: Window) -> Tensor:
    """(N, kh·kw·C, ⌊H/kh⌋, ⌊W/kw⌋): the pixels of each patch, one after another, as channels."""
    return x if window.kernel_size == _PIXEL else windows(x, window)


def windows(x: Tensor, window: Window) -> Tensor:
    """(N, kh·kw·C, H′, W′): the pixels that each window sees, one after another, as channels."""
    found = x.permute(0, 2, 3, 1)
    for axis, (reach, stride) in enumerate(zip(window.reach, window.stride, strict=True), 1):
        found = found.unfold(axis, reach, stride)
    taps = found[..., :: window.dilation[0], :: window.dilation[1]]
    return taps.permute(0, 1, 2, 4, 5, 3).flatten(3).permute(0, 3, 1, 2)


def _from_patches(patches: Tensor, size: Ints, like: Tensor) -> Tensor:
    """The adjoint of `to_patches`: pixels back in their places, zero where no patch reached."""
    if size == _PIXEL:
        return patches
    pixels = torch.unflatten(patches.permute(0, 2, 3, 1), 3, (*size, -1))  # (N, R, S, kh, kw, C)
    x = pixels.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
    missing = (like.shape[2] - x.shape[2], like.shape[3] - x.shape[3])
    return F.pad(x, (0, missing[1], 0, missing[0])) if any(missing) else x


def matrix(weight: Tensor) -> Tensor:
    """(O, kh·kw·C), in the order of `to_patches`."""
    return weight.permute(0, 2, 3, 1).flatten(1)
