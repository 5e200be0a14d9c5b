"""The gradients of convolutions' weights for each example, as products over windows.

Let windows(x) have a row for each of the L windows on an image, with the K · C/groups entries that
the K taps of a kernel see there. Then a convolution is a product, and so is its weight's gradient:

    dweightₙ = grad·windows(x)               (O, K · C/groups) = (O, L)·(L, K · C/groups)

for each group separately. In a transposed convolution x and grad change their roles. After nearest
upsampling by s, all entries of grad that see one source pixel are added up first, so that L is the
number of source pixels:

    dweightₙ[o, c, t] = Σ_a x[c, a] · Σ_{v<s} grad[o, s·a + v − t + p]

whose inner sums, of s neighbours in grad, are seen through windows with stride s and their taps in
reverse (`low_resolution.py`). Signals and volumes likewise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from funcnet.ops import low_resolution
from funcnet.ops.products import Products
from funcnet.ops.window import Ints, Pair, Window


def convolution(x: Tensor, weight: Tensor, grad: Tensor, window: Window) -> Products:
    """dweight (O, C/groups, …) of y = weight ∗ x, for each example."""
    seen = _windows(x, window, grad.shape[2:])
    return Products(_pixels(grad, window.groups), seen, _as(weight.shape))


def upsampled(x: Tensor, weight: Tensor, grad: Tensor, scale: Pair, window: Window) -> Products:
    """dweight (O, C, kh, kw) of y = weight ∗ upsampled x, for each example."""
    taps = window.kernel_size
    sums = low_resolution.neighbour_sums(grad, scale, window).to(grad.dtype)
    seen = _windows(sums, Window(taps, scale), x.shape[2:])

    def finish(product: Tensor) -> Tensor:  # (N, 1, kh·kw·O, C)
        by_tap = product.reshape(len(product), *taps, *weight.shape[:2])
        return by_tap.flip(1, 2).permute(0, 3, 4, 1, 2)

    return Products(seen, _pixels(x, 1), finish)


def _pixels(x: Tensor, groups: int) -> Tensor:
    """(N, groups, L, C/groups) of x (N, C, …)."""
    return torch.unflatten(x.flatten(2), 1, (groups, -1)).mT


def _windows(x: Tensor, window: Window, size: Ints) -> Tensor:
    """(N, groups, L, K · C/groups): what the first L = Π size windows on x (N, C, …) see.

    Channels come last, as they lie in memory in channels_last.
    """
    x, axes = F.pad(x, window.flat_sides), len(size)
    for axis in range(axes):
        x = x.unfold(2 + axis, window.reach[axis], window.stride[axis])
        x = x.narrow(2 + axis, 0, size[axis])[..., :: window.dilation[axis]]
    x = torch.unflatten(x, 1, (window.groups, -1)).movedim(2, -1)
    return x.flatten(2 + axes).flatten(2, 1 + axes)


def _as(shape: torch.Size) -> Callable[[Tensor], Tensor]:
    """The function from products (N, groups, A/groups, K · B/groups) to weights (N, *shape),
    for a shape (A, B/groups, …)."""
    first, second, *taps = shape
    return lambda product: product.reshape(len(product), first, *taps, second).movedim(-1, 2)
