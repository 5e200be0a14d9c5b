"""Sizes of sliding windows: padding on both sides of an axis, and how many windows fit.

On an axis of length n, padded by (before, after), a kernel of k taps that are d apart reaches over
d(k−1) + 1 entries, and with stride s there is room for

    ⌊(n + before + after − d(k−1) − 1) / s⌋ + 1

windows (https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Pair: TypeAlias = tuple[int, int]
"""(height, width)"""


@dataclass(frozen=True)
class Window:
    """How a kernel slides over pictures: one entry, or pair (before, after), for each axis."""

    kernel_size: Pair
    stride: Pair = (1, 1)
    sides: tuple[Pair, Pair] = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1
    reach: Pair = field(init=False, repr=False, compare=False)
    """d(k−1) + 1 for each axis."""
    cuts_patches: bool = field(init=False, repr=False, compare=False)
    """Whether windows lie side by side: stride k, no padding, no dilation, one group."""
    is_even: bool = field(init=False, repr=False, compare=False)
    """Whether the padding is the same on both sides of each axis."""
    _padding: Pair = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        reach = tuple(d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))
        rest = self.stride == self.kernel_size, self.dilation == (1, 1), self.groups == 1
        object.__setattr__(self, "reach", reach)
        object.__setattr__(self, "cuts_patches", all(rest) and self.sides == ((0, 0), (0, 0)))
        object.__setattr__(self, "is_even", all(before == after for before, after in self.sides))
        object.__setattr__(self, "_padding", tuple(map(sum, self.sides)))

    @property
    def flat_sides(self) -> tuple[int, int, int, int]:
        """(left, right, top, bottom), the order of torch.nn.functional.pad."""
        (top, bottom), (left, right) = self.sides
        return left, right, top, bottom

    def padded(self, size: Sequence[int]) -> Pair:
        """The size with the padding on both sides."""
        return size[0] + self._padding[0], size[1] + self._padding[1]

    def count(self, size: Sequence[int]) -> Pair:
        """How many windows fit on each axis; less than 1 where none does."""
        height, width = size[0] + self._padding[0], size[1] + self._padding[1]
        rows = (height - self.reach[0]) // self.stride[0] + 1
        return rows, (width - self.reach[1]) // self.stride[1] + 1


def padding_sides(padding: Any, kernel_size: Pair, dilation: Pair = (1, 1)) -> tuple[Pair, Pair]:
    """(before, after) on each axis, for a pair of ints, "same" or "valid".

    "same" halves d(k−1); of an odd one, the larger half goes after, as in PyTorch.
    """
    if padding == "same":
        height, width = (d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True))
        return (height // 2, height - height // 2), (width // 2, width - width // 2)
    rows, columns = (0, 0) if padding == "valid" else padding
    return (rows, rows), (columns, columns)
