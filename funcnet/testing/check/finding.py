"""A finding: an entry of a gradient that a numeric derivative refutes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from funcnet.testing.check.case import Case, Leaves


@dataclass(frozen=True)
class Finding:
    """A wrong entry: its leaf and index, and the numbers to compare it with.

    Without an index it is a leaf that is wrong along a direction, whose derivative by the leaf's
    gradient is `along`; `beside` holds other leaves that move with it.
    """

    case: Case
    leaf: int
    index: tuple[int, ...] | None
    gradients: Leaves
    numeric: float
    floor: Tensor
    reference: Tensor | None = None
    taylor: float | None = None
    along: float = math.nan
    beside: tuple[int, ...] = ()

    @property
    def analytic(self) -> float:
        return self.along if self.index is None else float(self.gradients[self.leaf][self.index])
