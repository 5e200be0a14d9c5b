"""The gradient of what computes in a dtype of its own, such as bfloat16 inside, whatever x's.

No step finds its derivative well: long ones cross bends and kinks, short ones are lost in rounding.
How well one does shows in how far it is from the next. With the gradient g of one leaf, n(h) =
(φ(h) − φ(−h)) / 2h along a random direction v of that leaf alone, and all sums over such
directions, the spread of a step is

    D(h) = Σ (n(h) − n(h/2))² + Σ s(h)² + roundings,

where s(h) is half the difference of the slopes on both sides. A kink at x leaves it however short
the step; what a bend makes of it falls with h, and is left out. The step h is taken for which
D(h) / Σ n(h)² is least, among shorter ones too before a gradient is refused: x / √(x² + 1e-12) at
0 bends within 1e-6. There, a right gradient has a

    Σ (n(h) − g·v)²  of about  ε Σ n(h)² + D(h)  at most.

So has one to which shorter steps come much nearer before rounding hides them: x³ / (x² + 1e-4) at 0
looks like x from afar.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from funcnet.testing.check.beside import movable
from funcnet.testing.check.case import Case, drawn_like
from funcnet.testing.check.oracles import Line
from funcnet.testing.check.rounding import TRIALS, gradient_moves, staircase_noise
from funcnet.testing.check.tolerances import LIKE_STEPS, SHORTER
from funcnet.testing.errors import GradientMismatch

Direction: TypeAlias = Callable[[Tensor, int], "Tensor | None"]
"""Makes a direction that moves a leaf, given a seed, or None to leave it."""

_FEW, _MANY = 4, 16
"""Directions that find a suspect, and those that decide about it."""
_HALVINGS, _MOST_HALVINGS = 14, 40
"""Halvings of the step that find a suspect, and those that decide about it."""


def check_own_dtype(case: Case, dtype: torch.dtype, direction: Direction = drawn_like) -> None:
    """Hold the gradient of each leaf to differences of `apply` in the dtype that it computes in."""
    epsilon = torch.finfo(dtype).eps
    noise = staircase_noise(case, epsilon, TRIALS).double() + torch.finfo(dtype).tiny
    blur = float((case.grad.double() * noise).norm())
    moves = gradient_moves(case, torch.finfo(case.dtype).eps)
    y = case.apply()
    each = zip(case.leaves, case.frozen, case.gradients(), moves, strict=True)
    for i, (leaf, frozen, gradient, move) in enumerate(each):
        if not movable(leaf):
            continue
        slopes: list[_Slope] = []
        for trials, most in ((range(_FEW), LIKE_STEPS / 2), (range(_FEW, _MANY), LIKE_STEPS)):
            for v in (direction(leaf, 53 * trial + i) for trial in trials):
                if v is not None:
                    v = v.masked_fill(frozen, 0.0)
                    along = [v if j == i else None for j in range(len(case.leaves))]
                    ours = float((gradient.double() * v.double()).sum())
                    moved = float((move.double() * v.double()).norm())
                    slopes.append(_Slope(Line(case, along, y, _UNUSED), ours, moved))
            wrong = _first_wrong(slopes, blur, epsilon, most)
            if wrong is None:
                break
        if wrong is not None:
            raise GradientMismatch(
                f"in {dtype}, the gradient is wrong: along a random direction of {case.names[i]}, "
                f"the derivative of apply is about {wrong[0]:.4g}, and the gradient's is "
                f"{wrong[1]:.4g}"
            )


class _Slope(NamedTuple):
    """The derivative along a line: by the gradient, and how far rounding moves that."""

    line: Line
    ours: float
    move: float


def _first_wrong(
    slopes: list[_Slope], noise: float, epsilon: float, most: float
) -> tuple[float, float] | None:
    """(n(h), g·v) where they differ most; None where the gradient is right, or no step tells."""
    if not slopes:
        return None
    halvings = min(_HALVINGS, round(-math.log2(epsilon)))
    wrong = _wrong_by(slopes, noise, epsilon, most, halvings)
    return wrong and _wrong_by(slopes, noise, epsilon, most, _MOST_HALVINGS)


def _wrong_by(
    slopes: list[_Slope], noise: float, epsilon: float, most: float, halvings: int
) -> tuple[float, float] | None:
    """Return what `_first_wrong` does, by the best of so many halvings."""
    steps = [2.0**-level for level in range(halvings + 1)]
    lines, ours, moves = zip(*slopes, strict=True)
    n = _table([[line.central(h) for h in steps] for line in lines])
    s = _table([[(line.change(h) + line.change(-h)) / (2 * h) for h in steps] for line in lines])
    longer, size = n[:, :-1], _squares(n[:, :-1])
    spread = _squares(longer - n[:, 1:])
    spread += torch.minimum(_squares(s[:, :-1]), _squares(2 * s[:, 1:] - s[:, :-1]))
    rounding = len(lines) * (noise / (4 * _table(steps[:-1]))).square() + _squares(_table(moves))
    spread += rounding
    quality = (spread / size).nan_to_num(math.inf, math.inf)
    best = int(quality.argmin())
    off = longer - _table(ours)[:, None]
    limit, far = most * (epsilon * size[best] + spread[best]), _squares(off)
    is_flat = not longer.any()  # and best the longest step, in which y's rounding is least
    is_nearer = (far + rounding)[best + 1 :] <= far[best] / SHORTER
    if not (is_flat or quality[best].isfinite()) or far[best] <= limit or is_nearer.any():
        return None
    worst = int(off[:, best].abs().nan_to_num(math.inf).argmax())
    return float(longer[worst, best]), ours[worst]


def _table(numbers: Sequence[object]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _squares(rows: Tensor) -> Tensor:
    """The sum of squares over the directions."""
    return rows.square().sum(0)


_UNUSED = torch.zeros(())
"""The noise of a line of which only differences are taken."""
