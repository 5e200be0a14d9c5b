"""The dtype of sums: in 16 bits, small terms would be lost, and in float32 some still are."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to add and count in: float32 for one of 16 bits, else the same."""
    return torch.promote_types(dtype, torch.float32)


def widened(x: Tensor) -> Tensor:
    """x in the dtype to add in."""
    return x.to(accumulator_dtype(x.dtype))


def with_float64(x: Tensor) -> Tensor:
    """x, or a copy on the CPU if x's device has no float64, as the GPU of a Mac."""
    # Moved before it is cast: PyTorch may cast on the device that it copies from.
    return x.cpu() if x.device.type == "mps" else x


def in_float64(x: Tensor) -> Tensor:
    """x in float64, on a device that has it."""
    return with_float64(x).double()
