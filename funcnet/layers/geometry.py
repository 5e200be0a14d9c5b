"""Sizes of sliding windows: padding on both sides of an axis, and how many windows fit.

On an axis of length n, padded by (before, after), a kernel of k taps that are d apart reaches over
d(k−1) + 1 entries, and with stride s there is room for

    ⌊(n + before + after − d(k−1) − 1) / s⌋ + 1

windows (https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from funcnet.layer import as_pair

Pair: TypeAlias = tuple[int, int]
"""(height, width)"""

Padding: TypeAlias = int | tuple[int, int] | str
"""An int, a pair, or one of "same" and "valid", as in PyTorch."""


@dataclass(frozen=True)
class Window:
    """How a kernel slides over pictures: one entry, or pair (before, after), for each axis."""

    kernel_size: Pair
    stride: Pair = (1, 1)
    sides: tuple[Pair, Pair] = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1
    _reach: Pair = field(init=False, repr=False, compare=False)
    _padding: Pair = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        reach = tuple(d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))
        object.__setattr__(self, "_reach", reach)
        object.__setattr__(self, "_padding", tuple(map(sum, self.sides)))

    @property
    def flat_sides(self) -> tuple[int, int, int, int]:
        """(left, right, top, bottom), the order of torch.nn.functional.pad."""
        (top, bottom), (left, right) = self.sides
        return left, right, top, bottom

    def count(self, layer: object, size: Sequence[int]) -> Pair:
        """How many windows fit on each axis. Raises ValueError where not even one does."""
        height, width = size[0] + self._padding[0], size[1] + self._padding[1]
        rows = (height - self._reach[0]) // self.stride[0] + 1
        columns = (width - self._reach[1]) // self.stride[1] + 1
        if min(size) < 1:
            raise ValueError(f"{layer}: expected pictures of at least 1×1, got size {tuple(size)}")
        if rows < 1 or columns < 1:
            raise ValueError(
                f"{layer}: expected pictures at least as large as the kernel's reach "
                f"{self._reach}, got size {tuple(size)}, {(height, width)} with padding"
            )
        return rows, columns


def as_padding(who: str, padding: Padding) -> Pair | str:
    """A pair of ints ≥ 0, or "same" or "valid"."""
    if not isinstance(padding, str):
        return as_pair(who, "padding", padding, 0)
    if padding not in ("same", "valid"):
        raise ValueError(
            f'{who}: expected padding to be an int, a pair, "same" or "valid", got {padding!r}'
        )
    return padding


def padding_sides(
    padding: Padding, kernel_size: Pair, dilation: Pair = (1, 1)
) -> tuple[Pair, Pair]:
    """(before, after) on each axis. "same" halves d(k−1), an odd one going after, as in PyTorch."""
    if padding == "same":
        height, width = (d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True))
        return (height // 2, height - height // 2), (width // 2, width - width // 2)
    rows, columns = (0, 0) if isinstance(padding, str) else pair(padding)
    return (rows, rows), (columns, columns)


def pair(value: int | Pair) -> Pair:
    """(3, 3) for 3."""
    return value if isinstance(value, tuple) else (value, value)


def check_pictures(layer: object, x: Tensor, channels: int | str = "C") -> None:
    """Refuse x that is not a batch of pictures, with this many channels if a number is given."""
    if x.ndim != 4 or (channels != "C" and channels != x.shape[1]):
        raise ValueError(
            f"{layer}: expected x of shape (N, {channels}, H, W), got {tuple(x.shape)}"
        )
