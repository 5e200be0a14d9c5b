"""A tensor in other memory layouts, and the bits that are the same in all of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """x in other layouts, and other tensors of its shape that only a layout can make."""
    if not x.ndim or not x.numel():
        return
    yield "strided", strided(x)
    yield "at an offset in its memory", torch.cat([x.new_full((1,), 7), x.flatten()])[1:].view_as(x)
    if x.ndim > 1:
        yield "transposed in memory", x.mT.contiguous().mT
    if x.ndim == 4:
        yield "in channels_last", x.contiguous(memory_format=torch.channels_last)
    yield "expanded", x.flatten()[:1].clone().reshape((1,) * x.ndim).expand(x.shape)
    yield "expanded along one axis", x[..., :1].clone().expand(x.shape)


def row_major(x: Tensor) -> Tensor:
    """A copy in PyTorch's default layout."""
    return x.clone(memory_format=torch.contiguous_format)


def strided(x: Tensor) -> Tensor:
    """x, as every other entry of something larger."""
    return torch.stack([x, torch.full_like(x, 7)], -1)[..., 0] if x.is_floating_point() else x


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the bit, in whatever layouts."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def bits(x: Tensor) -> Tensor:
    """The bytes of all entries, in row-major order."""
    return row_major(x.detach()).reshape(-1).view(torch.uint8)
