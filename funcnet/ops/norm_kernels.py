"""PyTorch's kernels for normalisation: their arguments and what they return.

On the CPU, those kernels keep mean and variance in the dtype of the weight. In half precision,
where a mean of 100 would be off by a quarter, they are handed weights in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from funcnet.ops import inplace, native

Normalised: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""(y, mean, rstd), rstd = 1/√(variance + ε)."""

Gradients: TypeAlias = tuple["Tensor | None", "Tensor | None", "Tensor | None"]
"""(dx, dweight, dbias), None where it is not needed."""


def in_dtype(normalised: Normalised, dtype: torch.dtype) -> Normalised:
    """y in x's dtype: under vmap, the kernels return it in the weight's."""
    y, mean, rstd = normalised
    return y.to(dtype=dtype), mean, rstd


def in_float32(x: Tensor, weight: Tensor | None, ones: torch.Size | None = None) -> Tensor | None:
    """The weight, contiguous; in float32 for x in half precision on the CPU.

    There, None becomes ones of the shape `ones`, because the statistics take the weight's dtype.
    """
    if x.is_cpu and is_half(x):
        if weight is not None:
            return weight.float()
        return None if ones is None else x.new_ones(ones, dtype=torch.float32)
    return None if weight is None else weight.contiguous()


def like_weights(x: Tensor) -> Tensor:
    """x in the dtype of the weights: under torch.func, the kernels refuse two dtypes."""
    return x.float() if x.is_cpu and is_half(x) and not inplace.is_eager() else x


def exact(x: Tensor, entries: int) -> Tensor:
    """x; zeros for sets of one entry, since there x − μ is 0, which the kernels would round."""
    return x - x if entries == 1 else x


def is_half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def as_asked(
    grads: Sequence[Tensor | None], mask: tuple[bool, bool, bool], dtype: torch.dtype
) -> Gradients:
    """The gradients that were asked for, in the dtype."""
    dx, dweight, dbias = (
        grad.to(dtype=dtype) if asked and grad is not None else None
        for grad, asked in zip(grads, mask, strict=True)
    )
    return dx, dweight, dbias


def spatial(channels: Tensor, x: Tensor) -> Tensor:
    """(…, C) with an axis of size 1 for each axis of x that stands after the channels."""
    return channels.reshape((*channels.shape, *(1,) * (x.ndim - 2)))


def laid_out(x: Tensor) -> tuple[Tensor, torch.memory_format]:
    """(x, the memory format that the kernels should see it in), x with a new tensor's strides."""
    if inplace.is_eager() and x.is_cpu and native.is_laid_out(x):
        return x, torch.channels_last
    memory_format = native.memory_format(x) if x.is_cpu else torch.contiguous_format
    return dense(x, memory_format), memory_format


def dense(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """x in the memory format, with the strides of a new tensor."""
    if not inplace.is_eager():
        return x.clone(memory_format=memory_format)  # vmap may hide an expanded axis
    # Strides of axes of size 1 can be anything, and kernels have relied on them.
    is_dense = x.stride() == native.strides(x.shape, memory_format)
    return x if is_dense else x.clone(memory_format=memory_format)
