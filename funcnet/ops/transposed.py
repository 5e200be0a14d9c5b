"""Nearest upsampling by s, then a convolution with k taps, as one transposed convolution.

With padding p before, source pixel i reaches output e through all taps that see one of its copies:

    y[e] = Σ_i E[e − s·i + k − 1 − p] · x[i],    E[u] = Σ_{t : 0 ≤ u − (k−1) + t < s} w_t,

a transposed convolution of stride s whose kernel E, the taps convolved with a block of s ones, has
k + s − 1 entries: few calls, which add up in PyTorch's own precision, float32 for half
precision. The gradients are those of `conv_transpose.py`: PyTorch's own kernel for them
reads beyond a grad of one channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from funcnet.ops import conv_transpose, native
from funcnet.ops.need import Need
from funcnet.ops.window import Pair, Window


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Pair, window: Window) -> Tensor:
    """y (N, O, H′, W′) of x (N, C, H, W) upsampled by `scale`, and weight (O, C, kh, kw)."""
    y = F.conv_transpose2d(native.layout(x), _kernel(weight, scale), stride=scale)
    y = F.pad(y, _crop(window))
    return y if bias is None else y + bias.view(-1, 1, 1)


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, scale: Pair, window: Window, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dx), None where it is not needed."""
    whole, kernel = F.pad(grad, tuple(-side for side in _crop(window))), _kernel(weight, scale)
    strided = Window(tuple(kernel.shape[2:]), scale)
    dkernel, dx = conv_transpose.gradients(native.layout(x), kernel, whole, strided, need)
    if dkernel is None:
        return None, dx
    rows, columns = (_tap_sums(weight, axis, scale) for axis in (0, 1))
    return torch.einsum("ut,vr,couv->octr", rows, columns, dkernel), dx


def _kernel(weight: Tensor, scale: Pair) -> Tensor:
    """E (C, O, kh + s_h − 1, kw + s_w − 1) of weight (O, C, kh, kw)."""
    rows, columns = (_tap_sums(weight, axis, scale) for axis in (0, 1))
    kernel = torch.einsum("ut,vr,octr->couv", rows, columns, weight)
    return kernel.clone(memory_format=torch.contiguous_format)


def _tap_sums(weight: Tensor, axis: int, scale: Pair) -> Tensor:
    """(k + s − 1, k), 1 where E[u] sums tap t."""
    taps, s = weight.shape[2 + axis], scale[axis]
    # Made on the device: a copy from the host would stop it, and cannot be in a CUDA graph.
    u, t = (torch.arange(n, device=weight.device) for n in (taps + s - 1, taps))
    reach = u.unsqueeze(1) - (taps - 1) + t
    return ((reach >= 0) & (reach < s)).to(weight.dtype)


def _crop(window: Window) -> tuple[int, int, int, int]:
    """The entries that padding p adds to each side of the whole result, which has k−1 too many."""
    height, width = window.kernel_size
    left, right, top, bottom = window.flat_sides
    return left - width + 1, right - width + 1, top - height + 1, bottom - height + 1
