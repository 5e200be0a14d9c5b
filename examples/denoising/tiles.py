"""Denoising an image of any size in bounded memory, by tiles that overlap.

A network that keeps the size of images whose sizes are multiples of its `stride`, and whose
output at a pixel depends on the pixels up to `reach` away, gives the same numbers for a tile as for
the whole image, if the tile begins at a multiple of the stride and is seen with a margin of at
least `reach`. Both numbers are found by trying, for any network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import optree
import torch
from torch import Tensor

import funcnet as fn

TILE = 512
MOST_STRIDE, MOST_REACH = 128, 512

Tree: TypeAlias = Any
Window: TypeAlias = tuple[slice, slice]


@dataclass(frozen=True)
class Denoiser:
    """A network from (3, H, W) to (3, H, W), with its parameters."""

    net: fn.Layer
    params: Tree
    stride: int
    reach: int | None
    """The distance in pixels that the network sees; None if it may be the whole image."""

    @classmethod
    def of(cls, net: fn.Layer, params: Tree) -> Denoiser:
        """Find the stride and the reach. Raises ValueError for a network that does not keep
        (3, H, W), and what the network raises."""
        stride = stride_of(net)
        return cls(net, params, stride, reach_of(net, params, stride))

    def __call__(self, noisy: Tensor) -> Tensor:
        """(N, 3, H, W) denoised, between 0 and 1, for H and W that are multiples of the stride."""
        return self.net.apply(self.params, noisy.to(device_of(self.params))).clamp(0, 1).cpu()

    def picture(self, noisy: Tensor) -> Tensor:
        """(3, H, W) denoised, for any H and W."""
        _, height, width = noisy.shape
        bands = self.bands(lambda window: noisy[(slice(None), *window)], height, width)
        return torch.cat([band for _, band in bands], dim=1)

    def bands(
        self, read: Callable[[Window], Tensor], height: int, width: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """(rows, (3, rows, width) denoised) from top to bottom. `read` gives a window's pixels.

        Of the rows above those yielded, no more than the height of one band is read again.
        """
        if self.reach is None:
            tile, margin = max(height, width), 0
        else:
            margin = round_up(self.reach, self.stride)
            tile = round_up(max(TILE, margin), self.stride)
        for top in range(0, height, tile):
            rows = slice(top, min(top + tile, height))
            parts = [
                self._window(
                    read, rows, slice(left, min(left + tile, width)), height, width, margin
                )
                for left in range(0, width, tile)
            ]
            yield rows, torch.cat(parts, dim=2)

    def _window(
        self,
        read: Callable[[Window], Tensor],
        rows: slice,
        columns: slice,
        height: int,
        width: int,
        margin: int,
    ) -> Tensor:
        """A window of the image, denoised with a margin around it.

        At its right and lower end, the image is continued by reflection to a multiple of the
        stride.
        """
        seen = [
            slice(max(span.start - margin, 0), min(span.stop + margin, size))
            for span, size in ((rows, height), (columns, width))
        ]
        x = read((seen[0], seen[1]))
        missing = [(0, -size % self.stride) for size in x.shape[1:]]
        x = torch.from_numpy(np.pad(x.numpy(), [(0, 0), *missing], mode="reflect"))
        top, left = rows.start - seen[0].start, columns.start - seen[1].start
        y = self(x[None])[0]
        return y[:, top : top + rows.stop - rows.start, left : left + columns.stop - columns.start]


def stride_of(net: fn.Layer) -> int:
    """The least s such that the network keeps images whose sizes are multiples of s."""
    for stride in range(1, MOST_STRIDE + 1):
        first = -(-256 // stride)
        if all(keeps(net, k * stride) for k in (first, first + 1)):
            return stride
    raise ValueError(f"expected a network that keeps (3, H, W), got {net}")


def keeps(net: fn.Layer, size: int) -> bool:
    try:
        return net.out_shape((3, size, size)) == (3, size, size)
    except ValueError:
        return False


def reach_of(net: fn.Layer, params: Tree, stride: int) -> int | None:
    """The distance over which the output depends on the input: as far as a row of NaN is seen.

    Each row of one stride is tried, in an example of its own, and columns likewise. None if the
    reach is above `MOST_REACH`.
    """
    breadth = round_up(32, stride)
    length = round_up(128, 2 * stride)
    while length <= 4 * MOST_REACH:
        middle = length // 2 // stride * stride
        x = torch.zeros(stride, 3, length, breadth, device=device_of(params))
        for i in range(stride):
            x[i, :, middle + i] = torch.nan
        reaches = [
            reach
            for axis, example in ((2, x), (3, x.transpose(2, 3).contiguous()))
            for i, y in enumerate(net.apply(params, example))
            for reach in distances(y, axis - 1, middle + i)
        ]
        if None not in reaches:
            return max(reaches)
        length = round_up(2 * length, 2 * stride)
    return None


def distances(y: Tensor, axis: int, origin: int) -> list[int | None]:
    """The distances that NaN has come along an axis, in both directions; None at the end."""
    is_nan = y.isnan().movedim(axis, 0).flatten(1).any(1).nonzero().flatten().tolist()
    if not is_nan:
        return [0]
    first, last = is_nan[0], is_nan[-1]
    return [
        None if first == 0 else origin - first,
        None if last == y.shape[axis] - 1 else last - origin,
    ]


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def device_of(params: Tree) -> torch.device:
    leaves: Any = optree.tree_leaves(params)
    return leaves[0].device if leaves else torch.device("cpu")
