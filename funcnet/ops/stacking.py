"""Tensors of one shape as one, along a new first axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack` that leaves each tensor in its memory format, such as channels_last."""
    first = tensors[0]
    if torch.compiler.is_compiling() or first.is_contiguous():
        return torch.stack(tuple(tensors))
    strides = first.stride()
    order = sorted(range(first.ndim), key=lambda axis: -strides[axis])
    back = (0, *(order.index(axis) + 1 for axis in range(first.ndim)))
    return torch.stack([tensor.permute(order) for tensor in tensors]).permute(back)
