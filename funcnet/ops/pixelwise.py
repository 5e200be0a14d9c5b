"""Convolution by kernels of one pixel: products of matrices.

With the C channels of each of the P = N·H·W pixels as a row of X, and the kernel K (O, C),

    Y = X·Kᵀ + bias        dX = dY·K        dK = dYᵀ·X.

In channels_last these rows are how images lie in memory. Yᵀ = K·Xᵀ has the channels of y apart
from each other, plane by plane.

PyTorch's convolution kernels do the same, but lay K out anew at every call, which takes most of the
time of a small product. Large products are left to them where `torch.mm`, done by MKL, is slower:
on processors that are not Intel's. In bfloat16, products of matrices are right on every processor:
they add up in float32, and round what they return. Those kernels are not, for windows with a stride
(`native.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from funcnet.ops import native, processor
from funcnet.ops.need import Need

_FEW = 1_000_000_000 if processor.IS_INTEL else 20_000_000
"""Up to how many multiplications `torch.mm` is as fast: measured."""

_MUCH_BIAS = 2**16
"""Entries of y in bfloat16 from which PyTorch's convolution, which adds bias as it multiplies,
takes 0.4 to 1.0 times as long as `torch.addmm`: measured on an AMD EPYC (Zen 4), one thread, from 3
to 512 channels. Below, it takes up to 1.2 times as long."""


def are_faster(pixels: int, kernel: Tensor) -> bool:
    """Whether `torch.mm` beats PyTorch's convolution: for few multiplications, or in bfloat16."""
    return pixels * kernel.numel() <= _FEW or kernel.dtype == torch.bfloat16


def upcast(x: Tensor) -> Tensor:
    """x, in float32 if the processor does not multiply matrices in its dtype."""
    return x if processor.multiplies_bfloat16(x) else native.upcast(x)


def convolve(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (N, O, H, W) in channels_last, of x (N, C, H, W) and the kernel (O, C)."""
    if not are_faster(_pixels(x), kernel) or _copies_much_bias(x, kernel, bias):
        return F.conv2d(x, kernel[:, :, None, None], bias)
    rows, transposed = _rows(x), kernel.t()
    y = torch.mm(rows, transposed) if bias is None else torch.addmm(bias, rows, transposed)
    return _images(y, x)


def _copies_much_bias(x: Tensor, kernel: Tensor, bias: Tensor | None) -> bool:
    """Whether y is in bfloat16, and so large that `torch.addmm` loses by copying bias into it."""
    if bias is None or kernel.dtype != torch.bfloat16:
        return False
    return _pixels(x) * len(kernel) >= _MUCH_BIAS


def convolve_to_planes(x: Tensor, kernel: Tensor) -> Tensor:
    """y (N, O, H, W), where each channel of an image is a plane in memory."""
    if not are_faster(_pixels(x), kernel):
        return convolve(x, kernel).contiguous()
    planes = torch.unflatten(torch.mm(kernel, _rows(x).t()), 1, (len(x), *x.shape[2:]))
    return planes.transpose(0, 1)


def gradients(
    x: Tensor, kernel: Tensor, grad: Tensor, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dkernel, dx), None where it is not needed."""
    if not are_faster(_pixels(x), kernel):
        weight = kernel[:, :, None, None]
        dweight, dx = native.kernel_gradients(x, weight, grad, need)
        return None if dweight is None else dweight.flatten(1), dx
    dx = _images(torch.mm(_rows(grad), kernel), x) if need.input else None
    return dkernel(x, grad) if need.params else None, dx


def dkernel(x: Tensor, grad: Tensor) -> Tensor:
    """dK (O, C), as a product."""
    return torch.mm(_rows(grad).t(), _rows(x))


def _pixels(x: Tensor) -> int:
    return len(x) * x.shape[2] * x.shape[3]


def _rows(x: Tensor) -> Tensor:
    """X (N·H·W, C), a view of x (N, C, H, W) if that is in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _images(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_rows`, with N, H and W as `like` has them."""
    batch, _, height, width = like.shape
    return torch.unflatten(rows, 0, (batch, height, width)).permute(0, 3, 1, 2)
