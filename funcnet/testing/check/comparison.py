"""The comparison of results, entry by entry and at worst."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Errors:
    """The worst relative error against each oracle, and the worst power of Taylor's remainder.

    `resolved` says whether any oracle could have told a wrong gradient.
    """

    autograd: float = 0.0
    differences: float = 0.0
    taylor: float = math.inf
    rounding: float = 0.0
    resolved: bool = False

    def merge(self, other: Errors) -> None:
        self.autograd = max(self.autograd, other.autograd)
        self.differences = max(self.differences, other.differences)
        self.taylor = min(self.taylor, other.taylor)
        self.rounding = max(self.rounding, other.rounding)
        self.resolved = self.resolved or other.resolved


def excess(got: Tensor, want: Tensor, allowed: Tensor) -> Tensor:
    """The difference of each entry, in units of the difference that is allowed.

    0 where both are equal or `want` is not finite, infinite where only `got` is not finite.
    """
    got = got.to(want)
    ratio = (got - want).abs() / allowed
    ratio = torch.where(got.isfinite(), ratio, torch.full_like(ratio, math.inf))
    return torch.where((got == want) | ~want.isfinite(), torch.zeros_like(ratio), ratio)


def within(got: Tensor, want: Tensor, allowed: Tensor) -> bool:
    """Whether no entry differs by more than is allowed."""
    return not bool((excess(got, want, allowed) > 1).any())


def worst(excesses: Tensor) -> tuple[int, ...] | None:
    """The index of the largest excess, None if none is above 1."""
    if not excesses.numel():
        return None
    position = int(excesses.argmax())
    return unravel(position, excesses.shape) if excesses.flatten()[position] > 1 else None


def ravel(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The position of an entry in the flattened tensor, given its index."""
    return int(np.ravel_multi_index(index, shape)) if shape else 0


def unravel(position: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The index of an entry, given its position in the flattened tensor."""
    return tuple(int(i) for i in np.unravel_index(position, shape)) if shape else ()


def largest_error(got: Tensor, want: Tensor, unit: Tensor) -> float:
    """The largest finite difference, in units of the largest finite entry of `unit`."""
    error, size = (largest(x) for x in (got.to(want) - want, unit))
    return error / size if size else 0.0


def largest(x: Tensor) -> float:
    """The size of the largest finite entry; 0 if there is none."""
    x = x[x.isfinite()].abs()
    return float(x.max()) if x.numel() else 0.0
