"""Convolution in one, two or three dimensions: the choice between its implementations.

unfold        the derivation by matrix products, for images and method "unfold"
patches       products of matrices over patches of images, where windows lie side by side
few_channels  products with each tap, then their sums, from many channels of images to few
bfloat16      images in bfloat16, by products of matrices where PyTorch's kernels are wrong
native        PyTorch's convolution kernels, for everything else

A signal (N, C, L) is convolved as an image (N, C, 1, L), whose kernels are faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcnet.ops import bfloat16, few_channels, native, patches, unfold
from funcnet.ops.need import Need
from funcnet.ops.window import Window


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, method: str
) -> tuple[Tensor, Tensor]:
    """(y, x), x in the memory format that the gradients want."""
    if window.of_height_1 is not None:
        image, kernel = x.unsqueeze(2), weight.unsqueeze(2)
        y, image = convolve(image, kernel, bias, window.of_height_1, method)
        return y.squeeze(2), image.squeeze(2)
    if method == "auto" and not native.is_laid_out(x):
        x = native.layout_for(weight, x)
    for_y, _ = _implementations(x, weight, window, method, backward=False)
    return for_y.convolve(x, weight, bias, window), x


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, window: Window, method: str, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx), None where it is not needed."""
    if window.of_height_1 is not None:
        image, kernel, dy = x.unsqueeze(2), weight.unsqueeze(2), grad.unsqueeze(2)
        dweight, dx = gradients(image, kernel, dy, window.of_height_1, method, need)
        dweight = None if dweight is None else dweight.squeeze(2)
        return dweight, None if dx is None else dx.squeeze(2)
    for_weight, for_x = _implementations(x, weight, window, method, backward=True)
    if for_weight is for_x:
        dweight, dx = for_x.gradients(x, weight, grad, window, need)
        return dweight, dx
    dweight, dx = None, None
    if need.params:
        only = need._replace(input=False)
        dweight, _ = for_weight.gradients(x, weight, grad, window, only)
    if need.input:
        only = need._replace(params=False)
        _, dx = for_x.gradients(x, weight, grad, window, only)
    return dweight, dx


def layout(x: Tensor) -> Tensor:
    """x, images or weights, in the memory format that the kernels want."""
    if x.ndim == 3:
        return native.layout(x.unsqueeze(2)).squeeze(2)
    return native.layout(x)


def _implementations(
    x: Tensor, weight: Tensor, window: Window, method: str, backward: bool
) -> tuple[Any, Any]:
    """(the module for y or dweight, the module for dx): the fastest, or those of the method."""
    if method == "unfold":
        return unfold, unfold
    if x.dtype == torch.bfloat16 and bfloat16.serves(x, window):
        return bfloat16, bfloat16
    if window.cuts_patches and x.ndim == 4 and patches.are_faster(x, weight, window, backward):
        return patches, patches
    if window.cuts_patches and backward:
        of_weight = patches if patches.dweight_is_faster(x, weight) else native
        return of_weight, patches if patches.dx_is_faster(x, weight) else native
    to_few, from_few = few_channels.which_are_faster(x, weight, window)
    return few_channels if to_few else native, few_channels if from_few else native
