"""Convolution by matrix products: the derivation, with shapes.

`unfold` lays the L windows of an image out as columns of a matrix of patches, (P, L) with
P = C/groups · kh · kw entries a window. Then convolution is a product with the kernel as an
(O/groups, P) matrix, for each image n and group g:

    y = kernel · patches                    (O/g, L) = (O/g, P) · (P, L)

and the gradients of a product are products with the transposed factors:

    dkernel  = Σₙ grad · patchesᵀ           (O/g, P) = (O/g, L) · (L, P)
    dpatches = kernelᵀ · grad               (P, L)   = (P, O/g) · (O/g, L)
    dx       = fold(dpatches)

where `fold`, the adjoint of `unfold`, adds every entry of the patches to the pixel that it was a
copy of: that sum is the convolution of grad with the flipped kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from funcnet.ops.need import Need
from funcnet.ops.window import Window


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """y (N, O, H′, W′) of x (N, C, H, W) and weight (O, C/groups, kh, kw)."""
    size = window.count(x.shape[2:])
    y = _matrix(weight, window) @ _patches(x, window)
    y = y.reshape(x.shape[0], weight.shape[0], *size)
    return y if bias is None else y + bias.view(-1, 1, 1)


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, window: Window, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx), None where it is not needed."""
    grad = torch.unflatten(grad.flatten(2), 1, (window.groups, -1))  # (N, groups, O/groups, L)
    dweight = None
    if need.params:
        dkernel = torch.einsum("ngol,ngpl->gop", grad, _patches(x, window))
        dweight = dkernel.reshape(weight.shape)
    if not need.input:
        return dweight, None
    dpatches = _matrix(weight, window).transpose(1, 2) @ grad
    left, right, top, bottom = window.flat_sides
    height, width = x.shape[2:]
    padded = F.fold(
        dpatches.flatten(1, 2),
        (height + top + bottom, width + left + right),
        window.kernel_size,
        window.dilation,
        stride=window.stride,
    )
    return dweight, F.pad(padded, (-left, -right, -top, -bottom))


def _patches(x: Tensor, window: Window) -> Tensor:
    """(N, groups, P, L)"""
    columns = F.unfold(
        F.pad(x, window.flat_sides), window.kernel_size, window.dilation, stride=window.stride
    )
    return torch.unflatten(columns, 1, (window.groups, -1))


def _matrix(weight: Tensor, window: Window) -> Tensor:
    """(groups, O/groups, P)"""
    return torch.unflatten(weight.flatten(1), 0, (window.groups, -1))
