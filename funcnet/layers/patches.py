"""Convolution with the stride of the kernel's size: a matrix product over patches.

Such a kernel cuts the picture into patches that do not overlap. With the kh·kw·C numbers of a patch
as the channels of one pixel, the convolution is pixelwise, a 1×1 convolution, and so are its
gradients; dx is the patches back in their places.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from funcnet.layers import native
from funcnet.layers.geometry import Pair, Window

_CHANNELS, _PATCHES = 16, 256
"""From how many channels and patches on the product gains more than the copies cost: measured."""


def are_worth_it(x: Tensor, window: Window) -> bool:
    """Whether this is a convolution over patches, and faster so than by PyTorch's own kernels."""
    return (
        window.stride == window.kernel_size
        and window.sides == ((0, 0), (0, 0))
        and window.dilation == (1, 1)
        and window.groups == 1
        and x.is_cpu
        and x.shape[1] >= _CHANNELS
        and x.numel() >= _PATCHES * math.prod(window.kernel_size) * x.shape[1]
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """y (N, O, H′, W′) of x (N, C, H, W) and weight (O, C, kh, kw)."""
    return F.conv2d(to_patches(x, window.kernel_size), _matrix(weight), bias)


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, window: Window, input_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """(dweight, dx); dx is None without `input_grad`."""
    patches = to_patches(x, window.kernel_size)
    dmatrix, dpatches = native.kernel_gradients(patches, _matrix(weight), grad, input_grad)
    out_channels, channels, height, width = weight.shape
    dweight = dmatrix.reshape(out_channels, height, width, channels).permute(0, 3, 1, 2)
    dx = None if dpatches is None else _from_patches(dpatches, window.kernel_size, x)
    return native.like(weight, dweight), dx


def to_patches(x: Tensor, size: Pair) -> Tensor:
    """(N, kh·kw·C, ⌊H/kh⌋, ⌊W/kw⌋): the pixels of each patch, one after another, as channels."""
    rows, columns = x.shape[2] // size[0], x.shape[3] // size[1]
    x = native.layout(x[:, :, : rows * size[0], : columns * size[1]])
    x = x.reshape(*x.shape[:2], rows, size[0], columns, size[1])  # (N, C, R, kh, S, kw)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).permute(0, 3, 1, 2)


def _from_patches(patches: Tensor, size: Pair, like: Tensor) -> Tensor:
    """The adjoint of `to_patches`: pixels back in their places, zero where no patch reached."""
    pixels = torch.unflatten(patches.permute(0, 2, 3, 1), 3, (*size, -1))  # (N, R, S, kh, kw, C)
    x = pixels.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
    missing = (like.shape[2] - x.shape[2], like.shape[3] - x.shape[3])
    return F.pad(x, (0, missing[1], 0, missing[0])) if any(missing) else x


def _matrix(weight: Tensor) -> Tensor:
    """(O, kh·kw·C, 1, 1), in the order of `to_patches`."""
    return weight.permute(0, 2, 3, 1).flatten(1)[:, :, None, None]
