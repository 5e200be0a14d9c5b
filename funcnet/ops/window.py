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

Ints: TypeAlias = tuple[int, ...]
"""An int for each axis."""

Pair: TypeAlias = tuple[int, int]
"""(height, width), or (before, after)."""


@dataclass(frozen=True)
class Window:
    """A kernel that slides over an image: one entry, or pair (before, after), for each axis.

    Stride and dilation are 1 and the sides (0, 0) where they are not given.
    """

    kernel_size: Ints
    stride: Ints = ()
    sides: tuple[Pair, ...] = ()
    dilation: Ints = ()
    groups: int = 1
    reach: Ints = field(init=False, repr=False, compare=False)
    """d(k−1) + 1 for each axis."""
    cuts_patches: bool = field(init=False, repr=False, compare=False)
    """Whether windows lie side by side: stride k, no padding, no dilation, one group."""
    is_even: bool = field(init=False, repr=False, compare=False)
    """Whether the padding is the same on both sides of each axis, and nothing is cropped."""
    is_dilated: bool = field(init=False, repr=False, compare=False)
    is_strided: bool = field(init=False, repr=False, compare=False)
    sees_entries: bool = field(init=False, repr=False, compare=False)
    """Whether the padding of each side is smaller than the kernel, so that each window sees an
    entry."""
    is_plain: bool = field(init=False, repr=False, compare=False)
    """Whether there is no stride, no dilation and one group, and each window sees an entry."""
    before: Ints = field(init=False, repr=False, compare=False)
    """The padding before each axis."""
    both: Ints = field(init=False, repr=False, compare=False)
    """The padding that both sides of each axis have."""
    of_height_1: Window | None = field(init=False, repr=False, compare=False)
    """The same over images of height 1, for a window over signals, which have a single axis."""
    _padding: Ints = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ones, none = (1,) * len(self.kernel_size), ((0, 0),) * len(self.kernel_size)
        stride, sides = self.stride or ones, self.sides or none
        dilation, of_height_1 = self.dilation or ones, None
        if len(ones) == 1:
            of_height_1 = Window(
                (1, *self.kernel_size), (1, *stride), ((0, 0), *sides), (1, *dilation), self.groups
            )
        reach = tuple(d * (k - 1) + 1 for k, d in zip(self.kernel_size, dilation, strict=True))
        rest = stride == self.kernel_size, dilation == ones, self.groups == 1
        axes = zip(sides, self.kernel_size, strict=True)
        sees_entries = all(0 <= side < k for both, k in axes for side in both)
        derived = {
            "stride": stride,
            "sides": sides,
            "dilation": dilation,
            "reach": reach,
            "cuts_patches": all(rest) and sides == none,
            "is_even": all(before == after >= 0 for before, after in sides),
            "is_dilated": dilation != ones,
            "is_strided": stride != ones,
            "sees_entries": sees_entries,
            "is_plain": stride == dilation == ones and self.groups == 1 and sees_entries,
            "before": tuple(before for before, _ in sides),
            "both": tuple(max(0, min(side)) for side in sides),
            "of_height_1": of_height_1,
            "_padding": tuple(map(sum, sides)),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def flat_sides(self) -> Ints:
        """(left, right, top, bottom) of images: the order of torch.nn.functional.pad."""
        return tuple(side for sides in reversed(self.sides) for side in sides)

    def padded(self, size: Sequence[int]) -> Ints:
        """The size with the padding on both sides."""
        return tuple(n + padding for n, padding in zip(size, self._padding, strict=True))

    def count(self, size: Sequence[int]) -> Ints:
        """The number of windows that fit on each axis; less than 1 where none fits."""
        counts = []  # a loop, which costs no Python call: this runs in a training step
        for n, padding, reach, stride in zip(
            size, self._padding, self.reach, self.stride, strict=True
        ):
            counts.append((n + padding - reach) // stride + 1)
        return tuple(counts)


def padding_sides(padding: Any, kernel_size: Ints, dilation: Ints = ()) -> tuple[Pair, ...]:
    """(before, after) on each axis, for a padding of one int an axis, "same" or "valid".

    "same" halves d(k−1); if it is odd, the larger half goes after, as in PyTorch.
    """
    if padding == "same":
        dilation = dilation or (1,) * len(kernel_size)
        whole = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        return tuple((n // 2, n - n // 2) for n in whole)
    return tuple((n, n) for n in ((0,) * len(kernel_size) if padding == "valid" else padding))
