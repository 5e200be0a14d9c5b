"""The oracles: autograd, central differences, and the power of h that Taylor's remainder falls by.

All of them in float64. For φ(h) = ⟨grad, f(u + h·v)⟩ along a direction v, with φ′ = ⟨gradient, v⟩:

    central difference    (φ(h) − φ(−h)) / 2h = φ′ + O(h²), exact for any h if f is affine along v,
                          extrapolated to h → 0 otherwise (Ridders, "Accurate computation of F′(x)
                          and F′(x)F″(x)", Advances in Engineering Software, 1982)
    Taylor's remainder    φ(h) − φ(0) − h·φ′ falls as h² if φ′ is right and as h if it is wrong
    a kink nearby         (f(h) − 2f(0) + f(−h)) / h falls with h where f is smooth; what stays is
                          the jump of the slope, and any slope between the two sides is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from funcnet.testing.check.case import Case, Leaves, tried_y
from funcnet.testing.check.tolerances import (
    AFFINE,
    CENTRAL_ROUNDING,
    ESTIMATE,
    FLAT,
    HALF_JUMP,
    JUMP_ROUNDING,
    STEADY_SLOPE,
    TAYLOR_ROUNDING,
)

_LEVELS, _MOST_LEVELS = 9, 26
"""The number of steps, each a quarter of the last: usually, and where none is steady yet."""
_FINE, _FINEST = 0.5, 2.0**-10
"""Shares of the last step: within a period of what oscillates faster than it, as sin(1e6·x)."""
_EPSILON = torch.finfo(torch.float64).eps
_TINY = torch.finfo(torch.float64).tiny
_KEPT = 2**22  # entries of y that a line keeps


def autograd_gradients(case: Case) -> Leaves | None:
    """The gradients by autograd of `apply`; None where it cannot follow `apply`.

    None also where `apply` contains a `torch.autograd.Function`: its backward pass is hand-written
    too, and so proves nothing.
    """
    leaves = [leaf.detach().clone() for leaf in case.leaves]
    inputs = [leaf.requires_grad_() for leaf in leaves if leaf.is_floating_point()]
    try:
        with torch.enable_grad():
            y = case.at(leaves).reference()
            if not y.requires_grad or is_handwritten(y):
                return None
            found = iter(torch.autograd.grad((y * case.grad).sum(), inputs, allow_unused=True))
    except RuntimeError:
        return None  # apply may write to its own intermediate results
    gradients = (next(found) if leaf.is_floating_point() else None for leaf in leaves)
    return [
        torch.zeros_like(leaf, dtype=torch.float64) if gradient is None else gradient.detach()
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]


def is_handwritten(y: Tensor) -> bool:
    """Whether a `torch.autograd.Function` is in the graph of y."""
    nodes = [y.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [behind for behind, _ in node.next_functions]
    return False


@dataclass(frozen=True)
class Slope:
    """A numeric derivative with its estimated error.

    `jump` is the difference of the two one-sided slopes at a kink. A bend that the finest step does
    not see is not a kink. `affine` says that f is affine as far as the largest step. `flat()` is
    the largest derivative that counts as 0, given f and its change by that step.
    """

    value: float
    error: float
    jump: float = 0.0
    affine: bool = False
    flat: Callable[[], float] = float

    def refutes(self, derivative: float, slack: float) -> bool:
        """Whether a derivative is off by more than this numeric one can be, and by `slack`."""
        if not math.isfinite(self.value + self.error):
            return False
        own = ESTIMATE * self.error + HALF_JUMP * self.jump
        return not abs(derivative - self.value) <= own + slack

    def resolves(self, difference: float) -> bool:
        """Whether it could tell two slopes apart, or there is a kink, where both may be right."""
        return self.jump > 0 or ESTIMATE * self.error < abs(difference)

    def tells(self, derivative: float, size: float, slack: float) -> bool:
        """Whether it could refute derivatives of this size, or of its own, or is this one.

        Where f is noise, steps are off each other by more, and agree with nothing. `slack` is
        forgiven.
        """
        if not math.isfinite(self.value + self.error):
            return False
        most = max(size, abs(self.value), self.flat())
        alike = size > 0 and abs(derivative - self.value) <= FLAT * size
        return alike or ESTIMATE * self.error + slack < most


@dataclass
class Line:
    """y along a direction, which has a tensor for each leaf or None for a leaf that stays.

    `still` is y at the case itself, `noise` its rounding. Derivatives are by h · `length`: the step
    can be as large as an entry while the derivative is by the entry itself. `evaluations` counts
    those of y, with the one at the case.
    """

    case: Case
    direction: list[Tensor | None]
    still: Tensor
    noise: Tensor
    length: float = 1.0
    evaluations: int = 1
    _known: dict[float, Tensor] = field(default_factory=dict)
    _changes: dict[float, float] = field(default_factory=dict)

    def y(self, h: float) -> Tensor:
        """y at h, or NaN if it has another shape or is refused: it may be defined on one side."""
        if h not in self._known:
            if len(self._known) * self.still.numel() > _KEPT:
                self._known.clear()
            y = tried_y(self.case.along(self.direction, h))
            self._known[h] = torch.full_like(self.still, math.nan) if y is None else y
            self.evaluations += 1
        return self._known[h]

    def change(self, h: float) -> float:
        """φ(h) − φ(0). Entries that do not change cancel before they are summed."""
        if h not in self._changes:
            self._changes[h] = float((self.case.grad * (self.y(h) - self.still)).sum())
        return self._changes[h]

    def central(self, h: float) -> float:
        """(φ(h) − φ(−h)) / 2h."""
        return (self.change(h) - self.change(-h)) / (2 * h * self.length)

    def rounding(self, h: float) -> float:
        """The error that y's rounding makes in `central`."""
        return CENTRAL_ROUNDING * self._noise_of_sum / (h * self.length)

    @cached_property
    def _noise_of_sum(self) -> float:
        return float((self.case.grad * self._blur).norm()) + _TINY  # where squares underflow

    def flat(self, h: float) -> float:
        """The largest derivative that counts as 0, given y and its change by steps of 1.

        Any does in a tail, where steps of 1 show rounding alone, and steps of h nothing.
        """
        most, least = (max(abs(self.change(s)), abs(self.change(-s))) for s in (1.0, h))
        if least == 0 and most <= self.length * self.rounding(1.0):
            return math.inf
        size = max(float((self.case.grad * self.still).norm()), most)
        return FLAT * size / self.length + math.sqrt(_TINY)

    def jump(self, h: float) -> tuple[float, float]:
        """Σ |grad| · |jump of the slope|, over kinks within h: the least and the most."""
        rest = (2 * self._bend(h / 2) - self._bend(h)).abs()
        rounding = JUMP_ROUNDING * self._blur / (h * self.length)
        size = self.case.grad.abs()
        least, most = (size * (rest - rounding).clamp(min=0), size * (rest + rounding))
        return float(least.sum()), float(most.sum())

    def is_straight(self) -> bool:
        """Whether every entry of y lies on a line at −1, 0 and 1, but for rounding."""
        largest = torch.maximum(self.y(1.0).abs(), self.y(-1.0).abs())
        rounding = CENTRAL_ROUNDING * (self._blur + _EPSILON * largest)
        return bool((self._bend(1.0).abs() <= AFFINE * rounding / self.length).all())

    def remainder(self, h: float, derivative: float) -> float:
        """φ(h) − φ(0) − h·derivative."""
        return self.change(h) - h * self.length * derivative

    def _bend(self, h: float) -> Tensor:
        return ((self.y(h) - self.still) - (self.still - self.y(-h))) / (h * self.length)

    @cached_property
    def _blur(self) -> Tensor:
        """The noise of the entries of y that depend on the direction; 0 elsewhere.

        Steps of the direction's own length show them, or steps of 1 if those are lost in rounding,
        or NaN along the direction if every step is. If even NaN shows none, all are taken to.
        """
        largest = max(float(v.abs().max()) for v in self.direction if v is not None)
        reached = torch.zeros_like(self.noise, dtype=torch.bool)
        for h in (1.0, 1 / largest) if 2.0**-1022 < largest < 1 else (1.0,):
            for step in (h, -h):
                reached |= self.y(step) != self.still
        reached |= self._poisoned().isnan() & ~self.still.isnan()
        if not reached.any():
            return self.noise
        return torch.where(reached, self.noise, torch.zeros_like(self.noise))

    def _poisoned(self) -> Tensor:
        """y where every entry that moves is NaN."""
        pairs = zip(self.case.leaves, self.direction, strict=True)
        leaves = [leaf if v is None else leaf.masked_fill(v != 0, math.nan) for leaf, v in pairs]
        y = tried_y(self.case.at(leaves))
        return self.still if y is None else y


def slope(line: Line) -> Slope:
    """The derivative along a line: by large steps where f is affine, by extrapolation elsewhere."""
    coarse, rounding = line.central(1.0), line.rounding(0.25)
    if line.is_straight() and all(
        abs(coarse - line.central(h)) <= AFFINE * line.rounding(h) for h in (0.25, 2.0**-10)
    ):
        return Slope(coarse, rounding, affine=True, flat=partial(line.flat, 2.0**-10))
    value, error, last = _ridders(line)
    fine, finest = last * _FINE, last * _FINEST
    for step in (fine, finest):
        error += max(0.0, abs(value - line.central(step)) - line.rounding(step))
    jump, _ = line.jump(fine)
    if jump and line.jump(finest)[1] <= jump / 2:
        jump = 0.0  # a bend, which the finest step does not see
    return Slope(value, error, jump, flat=partial(line.flat, finest))


def _ridders(line: Line) -> tuple[float, float, float]:
    """(derivative, error, last step): the steadiest of all extrapolations of central differences.

    Steps go on below the usual ones where nothing is steady yet, and rounding would not hide it:
    f may change within a small share of x, as sin(x) for large x.
    """
    table: list[float] = []
    best, least, last = math.nan, math.inf, 1.0
    for level in range(_MOST_LEVELS):
        h = 4.0**-level
        blur = line.rounding(h)
        is_steady = level >= _LEVELS and least <= STEADY_SLOPE * abs(best)
        if is_steady or not blur < least:
            break  # no error is below rounding, which grows from level to level
        row, last = [line.central(h)], h
        for order in range(1, level + 1):
            factor = 16.0**order
            row.append((factor * row[order - 1] - table[order - 1]) / (factor - 1))
            error = blur + max(abs(row[order] - row[order - 1]), abs(row[order] - table[order - 1]))
            if error < least:
                best, least = row[order], error
        table = row
    return best, least, min(last, 4.0 ** (1 - _LEVELS))  # the usual last step, if it was left out


def taylor_slope(line: Line, derivative: float, halvings: int = 2 * _LEVELS) -> float | None:
    """The power of h that Taylor's remainder falls by: 2 if the derivative is right, 1 if wrong.

    It is read off the last of so many halvings of h, from 1 on. A derivative's error shows there if
    it is larger than h times the curvature of f. None where the remainder is nothing but rounding.
    """
    sizes: list[float] = []
    for level in range(halvings):
        h = 2.0**-level
        size = abs(line.remainder(h, derivative))
        rounding = h * line.length * (line.rounding(h) + _EPSILON * abs(derivative))
        if not size > TAYLOR_ROUNDING * rounding:
            vanished = sizes and sizes[-1] > TAYLOR_ROUNDING**2 * rounding
            return math.inf if vanished else _power(sizes)
        sizes.append(size)
    return _power(sizes)


def _power(sizes: list[float]) -> float | None:
    """The power of h in sizes at halving steps, read off the smallest ones."""
    count = min(6, len(sizes) - 1)
    return math.log2(sizes[-1 - count] / sizes[-1]) / count if count > 1 else None
