"""Learning rates as functions of the number of steps taken, which starts at 0.

A schedule is a value: comparable, hashable, picklable, with code for its repr. It takes an int and
returns a float, or takes a tensor of counts and returns a float64 tensor of its shape, on the CPU
for a tensor on MPS, which has no float64:

    >>> from funcnet import schedules
    >>> lr = schedules.cosine(0.1, steps=100, warmup=10)
    >>> lr
    schedules.cosine(0.1, steps=100, warmup=10)
    >>> lr(0), lr(9), lr(100)
    (0.01, 0.1, 0.0)
    >>> import torch
    >>> lr(torch.tensor([0, 9, 100]))
    tensor([0.0100, 0.1000, 0.0000], dtype=torch.float64)

In the formulas t is the number of steps taken. Learning rates are finite numbers ≥ 0, and `steps`
is an int ≥ 1: anything else raises a ValueError or TypeError.
"""

# ruff: noqa: N801 - the classes are called as functions are, and so is their repr

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias, overload

import torch
from torch import Tensor

from funcnet.checks import as_int, as_number, is_items, shown
from funcnet.fields import Hyperparameters, NonNegative, Size, Whole, source
from funcnet.ops.accumulation import in_float64

__all__ = ["constant", "cosine", "exponential", "linear", "one_cycle", "piecewise"]

Count: TypeAlias = Annotated[int, Whole(0)]


@dataclass(frozen=True, repr=False)
class Schedule(Hyperparameters):
    """A function of the number of steps taken that is a value. A subclass writes `_at`."""

    def __repr__(self) -> str:
        return f"schedules.{source(self)}"

    @overload
    def __call__(self, step: int) -> float: ...
    @overload
    def __call__(self, step: Tensor) -> Tensor: ...
    def __call__(self, step: Any) -> Any:
        """The learning rate after so many steps. Raises ValueError for an int below 0."""
        if isinstance(step, Tensor):
            return self._at(in_float64(step))
        return self._at(as_int(type(self).__name__, "step", step, 0))

    def _at(self, t: Any) -> Any:
        """The learning rate after t steps, an int or a float64 tensor."""
        raise NotImplementedError


@dataclass(frozen=True)
class constant(Schedule):
    """lr at every step.

    >>> constant(0.1)(1000)
    0.1
    """

    lr: NonNegative

    def _at(self, t: Any) -> Any:
        return _fill(t, self.lr)


@dataclass(frozen=True)
class linear(Schedule):
    """first + (last − first) · min(t, steps) / steps.

    >>> linear(1.0, last=0.0, steps=4)(1)
    0.75
    """

    first: NonNegative
    last: NonNegative
    steps: Size

    def _at(self, t: Any) -> Any:
        lr = self.first + (self.last - self.first) * _min(t, self.steps) / self.steps
        return _max(lr, 0.0)  # rounding may go below 0


@dataclass(frozen=True)
class cosine(Schedule):
    """A linear rise to the peak, then half a period of a cosine down to `last`:

        peak · (t + 1) / warmup                                          while t < warmup
        last + (peak − last) · (1 + cos(π · (t − warmup) / (steps − warmup))) / 2
        last                                                             from t = steps on

    Raises ValueError unless warmup ≤ steps.
    Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", 2017.

    >>> lr = cosine(1.0, steps=6, warmup=2)
    >>> [round(lr(t), 3) for t in range(8)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """

    peak: NonNegative
    steps: Size
    warmup: Count = 0
    last: NonNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup > self.steps:
            raise ValueError(
                f"cosine: expected warmup <= steps, got warmup={self.warmup}, steps={self.steps}"
            )

    def _at(self, t: Any) -> Any:
        t = _min(t, self.steps)
        rise = self.peak * (t + 1) / max(self.warmup, 1)
        angle = math.pi * (t - self.warmup) / max(self.steps - self.warmup, 1)
        fall = self.last + (self.peak - self.last) * (1 + _cos(angle)) / 2
        return _where(t < self.warmup, rise, _where(t < self.steps, fall, _fill(t, self.last)))


_FOREVER = 2**63
"""A step after which rateᵗ is 0 or infinite for any rate but 1."""


@dataclass(frozen=True)
class exponential(Schedule):
    """first · rateᵗ.

    >>> exponential(0.5, rate=0.5)(2)
    0.125
    """

    first: NonNegative
    rate: NonNegative

    def _at(self, t: Any) -> Any:
        if self.first == 0:
            return _fill(t, 0.0)  # also where rateᵗ overflows
        try:
            if isinstance(t, Tensor):
                return self.first * self.rate**t
            return float(self.first * self.rate ** min(t, _FOREVER))
        except OverflowError:
            return math.inf


class _RatesKind:
    """A dict from steps to learning rates, kept as a sorted tuple of its items."""

    def convert(self, owner: type, name: str, value: Any) -> tuple[tuple[int, float], ...]:
        who = owner.__name__
        if not is_items(value):
            raise TypeError(f"{who}: expected a dict {{step: lr}}, got {shown(value)}")
        rates = {
            as_int(who, "every step", step, 0): as_number(who, "every lr", lr, 0.0)
            for step, lr in dict(value).items()
        }
        if 0 not in rates:
            raise ValueError(f"{who}: expected the lr of step 0, got steps {sorted(rates)}")
        return tuple(sorted(rates.items()))


@dataclass(frozen=True, repr=False)
class piecewise(Schedule):
    """Constant between the steps of a dict {step: lr}: the lr of the last step ≤ t.

    Raises ValueError unless step 0 is among them.

    >>> lr = piecewise({0: 0.1, 100: 0.01})
    >>> lr(99), lr(100)
    (0.1, 0.01)
    """

    rates: Annotated[Mapping[int, float] | tuple[tuple[int, float], ...], _RatesKind()]

    def __repr__(self) -> str:
        return f"schedules.piecewise({dict(self.rates)!r})"

    def _at(self, t: Any) -> Any:
        rates: Any = self.rates
        (_, first), *others = rates
        lr = _fill(t, first)
        for step, rate in others:
            lr = _where(t >= step, _fill(t, rate), lr)
        return lr


@dataclass(frozen=True)
class one_cycle(Schedule):
    """A rise to the peak, then a longer fall, each half a cosine: torch's OneCycleLR by default.

    From peak / 25 at t = 0 to the peak at t = 0.3 · steps − 1, then to peak / 250000 at
    t = steps − 1, where it stays. Fewer than 4 steps have no rise.

    Smith and Topin, "Super-convergence: very fast training of neural networks using large learning
    rates", 2018;
    https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.OneCycleLR.html

    >>> lr = one_cycle(1.0, steps=10)
    >>> [round(lr(t), 3) for t in range(11)]
    [0.04, 0.52, 1.0, 0.95, 0.812, 0.611, 0.389, 0.188, 0.05, 0.0, 0.0]
    """

    peak: NonNegative
    steps: Size

    def _at(self, t: Any) -> Any:
        first, top = self.peak / 25, 0.3 * self.steps - 1
        last, end = first / 1e4, self.steps - 1
        t = _min(t, end)
        rise = _anneal(first, self.peak, t / top)
        fall = _anneal(self.peak, last, (t - top) / (end - top))
        return _where(t <= top, rise, fall)


def _anneal(start: float, end: float, share: Any) -> Any:
    return end + (start - end) / 2 * (_cos(math.pi * share) + 1)


# --- Functions of an int or a float64 tensor


def _fill(t: Any, value: float) -> Any:
    return torch.full_like(t, value) if isinstance(t, Tensor) else float(value)


def _min(t: Any, most: int) -> Any:
    return t.clamp(max=most) if isinstance(t, Tensor) else min(t, most)


def _max(x: Any, least: float) -> Any:
    return x.clamp(min=least) if isinstance(x, Tensor) else max(x, least)


def _cos(x: Any) -> Any:
    return x.cos() if isinstance(x, Tensor) else math.cos(x)


def _where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b
