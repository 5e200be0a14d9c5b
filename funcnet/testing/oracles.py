"""What judges a gradient: autograd, central differences, and how fast Taylor's remainder falls.

All of it in float64. For φ(h) = ⟨grad, f(u + h·v)⟩ along a direction v, with φ′ = ⟨gradient, v⟩:

    central difference    (φ(h) − φ(−h)) / 2h = φ′ + O(h²), exact for any h if f is affine along v,
                          extrapolated to h → 0 otherwise (Ridders, "Accurate computation of F′(x)
                          and F′(x)F″(x)", Advances in Engineering Software, 1982)
    Taylor's remainder    φ(h) − φ(0) − h·φ′ falls as h² if φ′ is right and as h if it is wrong,
                          whatever the steps are
    a kink nearby         (f(h) − 2f(0) + f(−h)) / h falls with h where f is smooth; what stays is
                          the jump of the slope, and any slope between is a matter of choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from funcnet.testing.case import Case, Leaves

_LEVELS = 9
_FINEST = 2.0**-17
_EPSILON = torch.finfo(torch.float64).eps


def autograd_gradients(case: Case) -> Leaves | None:
    """The gradients by autograd of `apply`; None where it cannot be differentiated so, or where a
    backward pass of its own is hand-written, a `torch.autograd.Function`: that proves nothing.
    """
    leaves = [leaf.detach().clone() for leaf in case.leaves]
    inputs = [leaf.requires_grad_() for leaf in leaves if leaf.is_floating_point()]
    try:
        with torch.enable_grad():
            y = case.at(leaves).apply()
            if not y.requires_grad or _is_handwritten(y):
                return None
            found = iter(torch.autograd.grad((y * case.grad).sum(), inputs, allow_unused=True))
    except (RuntimeError, NotImplementedError):
        return None  # what apply does to its own memory, autograd may not follow
    gradients = (next(found) if leaf.is_floating_point() else None for leaf in leaves)
    return [
        torch.zeros_like(leaf) if gradient is None else gradient.detach()
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]


def _is_handwritten(y: Tensor) -> bool:
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
    """A numeric derivative: its value, how exact it is, how far the slope jumps at a kink, and
    whether f is affine as far as the largest step."""

    value: float
    error: float
    jump: float = 0.0
    affine: bool = False

    def tolerance(self) -> float:
        """How far off a right derivative may be."""
        return 8 * self.error + 0.505 * self.jump

    def refutes(self, derivative: float, slack: float) -> bool:
        """Whether a derivative is further off than this can be, and than `slack`."""
        if not math.isfinite(self.value + self.error):
            return False
        return not abs(derivative - self.value) <= self.tolerance() + slack


@dataclass
class Line:
    """y along a direction: one tensor a leaf, None for leaves that stay. `noise` is that of y.

    Derivatives are by h · `length`, so that they can be by an entry while steps are of its size.
    """

    case: Case
    direction: list[Tensor | None]
    noise: Tensor
    length: float = 1.0
    evaluations: int = 0
    _known: dict[float, Tensor] = field(default_factory=dict)

    def y(self, h: float) -> Tensor:
        if h not in self._known:
            pairs = zip(self.case.leaves, self.direction, strict=True)
            leaves = [leaf if v is None else leaf + h * v for leaf, v in pairs]
            self._known[h] = self._apply(leaves) if h else self.case.at(leaves).apply()
            self.evaluations += 1
        return self._known[h]

    def _apply(self, leaves: Leaves) -> Tensor:
        """y, or NaN where the layer refuses to go: it may be defined on one side only."""
        try:
            return self.case.at(leaves).apply()
        except Exception:  # whatever it refuses with
            return torch.full_like(self.y(0.0), math.nan)

    def central(self, h: float) -> float:
        """(φ(h) − φ(−h)) / 2h; what does not change cancels exactly before it is summed."""
        return self._dot(self.y(h) - self.y(-h)) / (2 * h * self.length)

    def rounding(self, h: float) -> float:
        """The error of `central` that rounding y makes."""
        return 4 * float((self.case.grad * self._blur).norm()) / (h * self.length)

    def jump(self, h: float) -> float:
        """Σ |grad| · |jump of the slope|, over kinks within h."""
        rest = (2 * self._bend(h / 2) - self._bend(h)).abs()
        rest -= 16 * self._blur / (h * self.length)
        return float((self.case.grad.abs() * rest.clamp(min=0)).sum())

    def bend(self, h: float) -> float:
        """(φ(h) − 2φ(0) + φ(−h)) / h, that of each output taken positive."""
        return float((self.case.grad * self._bend(h)).norm())

    def remainder(self, h: float, derivative: float) -> float:
        """φ(h) − φ(0) − h·derivative."""
        return self._dot(self.y(h) - self.y(0.0)) - h * self.length * derivative

    def _bend(self, h: float) -> Tensor:
        return ((self.y(h) - self.y(0.0)) - (self.y(0.0) - self.y(-h))) / (h * self.length)

    @cached_property
    def _blur(self) -> Tensor:
        """The noise of those entries of y that the direction reaches, as large steps show: of its
        own length, which may be lost in rounding, and of 1."""
        largest = max(float(v.abs().max()) for v in self.direction if v is not None)
        reached = torch.zeros_like(self.noise, dtype=torch.bool)
        for h in (1.0, 1 / largest) if 0 < largest < 1 else (1.0,):
            for step in (h, -h):
                reached |= self.y(step) != self.y(0.0)
        return torch.where(reached, self.noise, torch.zeros_like(self.noise))

    def _dot(self, change: Tensor) -> float:
        return float((self.case.grad * change).sum())


def slope(line: Line) -> Slope:
    """The derivative along a line: by large steps where f is affine, else by extrapolation."""
    coarse, rounding = line.central(1.0), line.rounding(0.25)
    if line.bend(1.0) <= 2 * rounding and all(
        abs(coarse - line.central(h)) <= 2 * line.rounding(h) for h in (0.25, 2.0**-10)
    ):
        return Slope(coarse, rounding, affine=True)
    value, error = _ridders(line)
    step = _FINEST
    fine, blur = line.central(step), line.rounding(step)
    return Slope(value, error + max(0.0, abs(value - fine) - blur), line.jump(step))


def _ridders(line: Line) -> tuple[float, float]:
    """(the derivative, its error): central differences extrapolated in all ways, the steadiest."""
    steps = [4.0**-level for level in range(_LEVELS)]
    table: list[float] = []
    best, least = math.nan, math.inf
    for level, h in enumerate(steps):
        row = [line.central(h)]
        blur = line.rounding(h)
        for order in range(1, level + 1):
            factor = 16.0**order
            row.append((factor * row[order - 1] - table[order - 1]) / (factor - 1))
            error = blur + max(abs(row[order] - row[order - 1]), abs(row[order] - table[order - 1]))
            if error < least:
                best, least = row[order], error
        table = row
    return best, least


def taylor_slope(line: Line, derivative: float) -> float | None:
    """The power of h with which Taylor's remainder falls: 2 for a right derivative, 1 for a wrong
    one; None where the remainder is nothing but rounding.
    """
    sizes: list[float] = []
    for level in range(2 * _LEVELS):
        h = 2.0**-level
        size = abs(line.remainder(h, derivative))
        rounding = 64 * h * line.length * (line.rounding(h) + _EPSILON * abs(derivative))
        if not size > rounding:
            vanished = sizes and sizes[-1] > 64 * rounding
            return math.inf if vanished else _power(sizes)
        sizes.append(size)
    return _power(sizes)


def _power(sizes: list[float]) -> float | None:
    """The power of h in sizes at halving steps, by the smallest of them."""
    count = min(6, len(sizes) - 1)
    return math.log2(sizes[-1 - count] / sizes[-1]) / count if count > 1 else None
