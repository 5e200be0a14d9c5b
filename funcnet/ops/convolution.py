"""Convolution in two dimensions: the choice between its implementations.

unfold    the derivation by matrix products, for method "unfold"
patches   products of matrices over patches, where windows do not overlap and are few
native    PyTorch's convolution kernels, for all else
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from funcnet.ops import native, patches, unfold
from funcnet.ops.need import Need
from funcnet.ops.window import Window


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, method: str
) -> tuple[Tensor, Tensor]:
    """(y, x), x in the memory format that the gradients want."""
    if method == "auto":
        x = native.layout(x)
    return implementation(x, weight, window, method).convolve(x, weight, bias, window), x


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, window: Window, method: str, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx), None where it is not needed."""
    chosen = implementation(x, weight, window, method, backward=True)
    dweight, dx = chosen.gradients(x, weight, grad, window, need)
    return dweight, dx


def implementation(
    x: Tensor, weight: Tensor, window: Window, method: str, backward: bool = False
) -> Any:
    """The module that is fastest for images like x, or the one that the method names."""
    if method == "unfold":
        return unfold
    if window.cuts_patches and patches.are_worth_it(x, weight, window, backward):
        return patches
    return native
