"""Memory layouts: one tensor at other strides and offsets."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "channels_last", "strided", "transposed", "offset", "expanded")
"""Every memory layout that is tried: `strided` skips every other element of a larger tensor,
`transposed` is column-major, `offset` starts inside its storage, `expanded` has stride 0 along the
last axis, where it repeats its first entry."""


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return a contiguous x in one of `LAYOUTS`.

    >>> laid_out(torch.zeros(2, 3), "transposed").stride()
    (1, 2)
    """
    if layout not in LAYOUTS:
        raise ValueError(f"laid_out: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if not x.ndim:
        return x
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]
    if layout == "transposed":
        reverse = tuple(reversed(range(x.ndim)))
        return x.permute(reverse).contiguous().permute(reverse)
    if layout == "offset":
        return torch.cat([x.new_full((1,), 7), x.flatten()])[1:].view(x.shape)
    if layout == "expanded":
        return x[..., :1].clone().expand(x.shape)
    return x


def fits(layout: str, ndim: int) -> bool:
    """Whether a tensor of so many axes can have this layout: channels_last needs four."""
    return layout != "channels_last" or ndim == 4


def other_layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield x in every layout but contiguous, then its first entry expanded along all axes."""
    if not x.ndim or not x.numel():
        return
    for layout in LAYOUTS[1:]:
        if fits(layout, x.ndim):
            yield layout, laid_out(x, layout)
    yield "expanded along all axes", x.flatten()[:1].clone().reshape((1,) * x.ndim).expand(x.shape)


def row_major(x: Tensor) -> Tensor:
    """Copy x into contiguous memory."""
    return x.clone(memory_format=torch.contiguous_format)


def copied(x: Tensor) -> Tensor:
    """Copy x with its strides and an offset like its own.

    `clone` keeps strides only where no entry is skipped and none is repeated.
    """
    if not x.numel():
        return x.clone()
    offset = x.storage_offset() % 16  # entries, so that memory is aligned as before
    memory = x.as_strided((offset + reach(x),), (1,), x.storage_offset() - offset).clone()
    return memory.as_strided(x.shape, x.stride(), offset)


def reach(x: Tensor) -> int:
    """The number of entries in memory from x's first to its last."""
    if not x.numel():
        return 0
    return sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) + 1


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, in any layouts."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def bits(x: Tensor) -> Tensor:
    """The bytes of all entries, in row-major order."""
    return row_major(x.detach()).reshape(-1).view(torch.uint8)
