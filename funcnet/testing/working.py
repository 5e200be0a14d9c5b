"""The dtype that came, against the same in float64, to what rounding in that dtype can do."""

from __future__ import annotations

import torch
from torch import Tensor

from funcnet.testing.case import Case
from funcnet.testing.mathematics import Errors, unravel
from funcnet.testing.rounding import TRIALS, allowance, gradient_moves, value_moves


def find_inexact(case: Case, double: Case, errors: Errors) -> str | None:
    """How the value or gradient in the case's dtype differs from those in float64, if it does."""
    dtype = case.x.dtype
    epsilon = torch.finfo(dtype).eps
    y, exact = case.apply(), double.apply()
    if _off(y, exact, allowance(value_moves(double, epsilon, 1), dtype)) is not None:
        if case.key is not None:
            return None  # in another dtype a layer may draw other numbers from the same key
        place = _off(y, exact, allowance(value_moves(double, epsilon, TRIALS), dtype))
        if place is not None:
            return _complaint("y", dtype, y, exact, place)
    ours, theirs = case.gradients(), double.gradients()
    moves = gradient_moves(double, epsilon, 2)
    checked = list(zip(case.names, ours, theirs, strict=True))
    if any(
        _off(a, b, allowance(m, dtype)) is not None
        for (_, a, b), m in zip(checked, moves, strict=True)
    ):
        moves = gradient_moves(double, epsilon, TRIALS)
    for (name, a, b), move in zip(checked, moves, strict=True):
        place = _off(a, b, allowance(move, dtype))
        if place is not None:
            return _complaint(f"the gradient for {name}", dtype, a, b, place)
        errors.working = max(errors.working, _error(a, b, move, epsilon))
    return None


def _off(a: Tensor, b: Tensor, allowed: Tensor) -> tuple[int, ...] | None:
    """Where the worst entry of a is that differs from float64's b by more than is allowed."""
    if not a.numel():
        return None
    info = torch.finfo(a.dtype)
    a = a.to(b)
    excess = (a - b).abs() / (allowed + 8 * info.eps * b.abs())
    excess = torch.where(a.isfinite(), excess, torch.full_like(b, torch.inf))
    excess = torch.where((b.abs() > info.max / 64) | ~b.isfinite(), torch.zeros_like(b), excess)
    worst = int(excess.argmax())
    return unravel(worst, b.shape) if float(excess.flatten()[worst]) > 1 else None


def _error(a: Tensor, b: Tensor, move: Tensor, epsilon: float) -> float:
    """The worst error in units of what a relative nudge by the dtype's ε does."""
    if not move.numel() or not float(move.max()) > 0:
        return 0.0
    error = (a.to(b) - b).abs()
    error = error[error.isfinite()]
    return epsilon * float(error.max() / move.max()) if error.numel() else 0.0


def _complaint(name: str, dtype: torch.dtype, a: Tensor, b: Tensor, place: tuple[int, ...]) -> str:
    return (
        f"in {dtype}, {name} is further from that in float64 than rounding explains: "
        f"at {list(place)}, {float(a[place]):.9g} and {float(b[place]):.9g}"
    )
