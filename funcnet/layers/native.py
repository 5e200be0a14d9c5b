"""Convolution by PyTorch's own kernels, forward and backward, and the choice among them.

On the CPU, pictures are laid out in channels_last, which makes those kernels about twice as fast;
and a kernel whose stride is its size cuts the pictures into patches that do not overlap, so that
the convolution is a plain matrix product over them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from funcnet.layers.geometry import Pair, Window


def layout(x: Tensor) -> Tensor:
    """x in the memory format that is fastest on its device."""
    if x.device.type != "cpu":
        return x
    try:
        return x.contiguous(memory_format=torch.channels_last)
    except RuntimeError:  # torch.func.vmap knows no memory formats, but the same by another name
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """y (N, O, H′, W′) of x (N, C, H, W) and weight (O, C/groups, kh, kw)."""
    if _is_patchwise(x, window):
        return F.conv2d(to_patches(x, window.kernel_size), _patch_weight(weight), bias)
    x, padding = _pad_odd(x, window)
    return F.conv2d(x, weight, bias, window.stride, padding, window.dilation, window.groups)


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, window: Window, input_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """(dweight, dx); dx is None without `input_grad`."""
    if _is_patchwise(x, window):
        patches = to_patches(x, window.kernel_size)
        dmatrix, dpatches = kernel_gradients(patches, _patch_weight(weight), grad, input_grad)
        out_channels, channels, height, width = weight.shape
        dweight = dmatrix.reshape(out_channels, height, width, channels).permute(0, 3, 1, 2)
        dx = None if dpatches is None else _from_patches(dpatches, window.kernel_size, x)
        return _like(weight, dweight), dx
    padded, padding = _pad_odd(x, window)
    dweight, dx = kernel_gradients(
        padded,
        weight,
        grad,
        input_grad,
        window.stride,
        padding,
        window.dilation,
        window.groups,
    )
    if dx is not None and dx.shape != x.shape:
        dx = dx[:, :, : x.shape[2], : x.shape[3]]
    return dweight, dx


def kernel_gradients(
    x: Tensor,
    weight: Tensor,
    grad: Tensor,
    input_grad: bool,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    *,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(dweight, dx) of a convolution, or a transposed one, by PyTorch's backward kernels."""
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        layout(grad),
        x,
        weight,
        None,
        stride,
        padding,
        dilation,
        transposed,
        (0, 0),
        groups,
        (input_grad, True, False),
    )
    return _like(weight, dweight), dx if input_grad else None


def _like(weight: Tensor, dweight: Tensor) -> Tensor:
    """dweight in the memory format of the weight, so that an update runs through both alike."""
    return dweight if dweight.stride() == weight.stride() else dweight.contiguous()


def to_patches(x: Tensor, size: Pair) -> Tensor:
    """(N, kh·kw·C, ⌊H/kh⌋, ⌊W/kw⌋): the pixels of each patch, one after another, as channels."""
    rows, columns = x.shape[2] // size[0], x.shape[3] // size[1]
    x = layout(x[:, :, : rows * size[0], : columns * size[1]])
    x = x.reshape(*x.shape[:2], rows, size[0], columns, size[1])  # (N, C, R, kh, S, kw)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).permute(0, 3, 1, 2)


def _from_patches(patches: Tensor, size: Pair, like: Tensor) -> Tensor:
    """The adjoint of `to_patches`: pixels back in their places, zero where no patch reached."""
    pixels = torch.unflatten(patches.permute(0, 2, 3, 1), 3, (*size, -1))  # (N, R, S, kh, kw, C)
    x = pixels.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
    missing = (like.shape[2] - x.shape[2], like.shape[3] - x.shape[3])
    return F.pad(x, (0, missing[1], 0, missing[0])) if any(missing) else x


def _patch_weight(weight: Tensor) -> Tensor:
    """(O, kh·kw·C, 1, 1), in the order of `to_patches`."""
    return weight.permute(0, 2, 3, 1).flatten(1)[:, :, None, None]


def _is_patchwise(x: Tensor, window: Window) -> bool:
    """Whether the kernel's stride is its size, with nothing else to heed."""
    return (
        window.stride == window.kernel_size
        and window.sides == ((0, 0), (0, 0))
        and window.dilation == (1, 1)
        and window.groups == 1
        and x.device.type == "cpu"
    )


def _pad_odd(x: Tensor, window: Window) -> tuple[Tensor, Pair]:
    """(x with what "same" pads only after, the padding that is left, equal on both sides)."""
    (top, bottom), (left, right) = window.sides
    if (top, left) != (bottom, right):
        x = F.pad(x, (0, right - left, 0, bottom - top))
    return x, (top, left)
