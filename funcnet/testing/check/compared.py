"""A result beside float64's, up to rounding: entry by entry, and as a whole by a factor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from funcnet.testing.check.comparison import excess, worst
from funcnet.testing.check.rounding import allowance
from funcnet.testing.check.tolerances import (
    ACROSS_DTYPES,
    FACTOR,
    OVERFLOW,
    SAFETY,
    STEADY,
    SUSPICIOUS,
)
from funcnet.testing.errors import GradientMismatch


@dataclass(frozen=True)
class Compared:
    """A result a, computed in `dtype`, and float64's b, which rounding moves by about `move`."""

    a: Tensor
    b: Tensor
    move: Tensor
    dtype: torch.dtype

    @property
    def wrong_entry(self) -> tuple[int, ...] | None:
        """The index of the entry of a that is furthest from b; None if none is too far."""
        info = torch.finfo(self.dtype)
        allowed = allowance(self.move, self.dtype) + ACROSS_DTYPES * info.eps * self.b.abs()
        off = excess(self.a, self.b, allowed)
        return worst(off.masked_fill(self.b.abs() > OVERFLOW * info.max, 0.0))

    def expect_exact(self, name: str) -> None:
        """Raise GradientMismatch if an entry of a is too far from b."""
        index = self.wrong_entry
        if index is not None:
            raise GradientMismatch(
                f"in {self.dtype}, {name} is further from float64 than rounding explains: at "
                f"{list(index)}, expected about {float(self.b[index]):.9g}, "
                f"got {float(self.a[index]):.9g}"
            )

    @property
    def wrong_factor(self) -> float | None:
        """The factor that all entries are off by, if it is more than rounding explains.

        The best factor is ⟨a, b⟩ / ⟨b, b⟩. Roundings of about `move` shift it by
        ‖move ∘ b‖ / ⟨b, b⟩.
        """
        factor = factor_between(self.a, self.b)
        if factor is None:
            return None
        return factor if abs(factor - 1) > self._factor_rounding else None

    @property
    def is_suspicious(self) -> bool:
        """Whether a may be b times a factor, which is worth a look."""
        factor = factor_between(self.a, self.b)
        epsilon = torch.finfo(self.dtype).eps
        return factor is not None and not abs(factor - 1) <= SUSPICIOUS * epsilon

    @property
    def is_steady(self) -> bool:
        """Whether roundings at other points are others, so that their mean tells a factor."""
        return not self._factor_rounding > STEADY * torch.finfo(self.dtype).eps

    @property
    def _factor_rounding(self) -> float:
        """The most that rounding may shift the factor that fits a best to b, which is not 0."""
        b, info = self.b, torch.finfo(self.dtype)
        unit = b / b.abs().max()
        shifts = (self.move + info.tiny) / b.abs().max() * unit.abs()
        # What cancels entirely is all rounding.
        cancelled = SAFETY[self.dtype] * shifts[self.move > b.abs()].sum()
        return FACTOR * info.eps + float(shifts.norm() + cancelled) / float(unit.square().sum())


def factor_between(a: Tensor, b: Tensor) -> float | None:
    """⟨a, b⟩ / ⟨b, b⟩; None where there is none."""
    largest = b.abs().max() if b.numel() else b.new_zeros(())
    if not (0 < float(largest) < math.inf and a.isfinite().all()):
        return None
    unit = b / largest
    return float((a.to(b) / largest * unit).sum()) / float(unit.square().sum())


def explains(other: float | None, factor: float) -> bool | None:
    """Whether another factor is about as far off 1; None where there is none."""
    return None if other is None else abs(factor - 1) <= 2 * abs(other - 1)
