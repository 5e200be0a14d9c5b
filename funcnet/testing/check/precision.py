"""The comparison of a low-precision dtype with float64, up to what rounding in it can do."""

from __future__ import annotations

import torch
from torch import Tensor

from funcnet.testing.check.case import Case
from funcnet.testing.check.comparison import Errors, excess, largest_error, worst
from funcnet.testing.check.rounding import TRIALS, allowance, gradient_moves, value_moves
from funcnet.testing.check.tolerances import ACROSS_DTYPES, OVERFLOW
from funcnet.testing.errors import GradientMismatch


def check_precision(case: Case, double: Case, errors: Errors) -> None:
    """Raise GradientMismatch if y or a gradient is further from float64 than rounding explains."""
    dtype = case.x.dtype
    epsilon = torch.finfo(dtype).eps
    y, exact = case.apply(), double.apply()
    if _off(y, exact, value_moves(double, epsilon, 1)) is not None:
        if case.key is not None:
            return  # in another dtype a layer may draw other numbers from the same key
        _expect_exact("y", y, exact, value_moves(double, epsilon, TRIALS))
    compared = list(zip(case.gradients(), double.gradients(), strict=True))
    moves = gradient_moves(double, epsilon, 2)
    if any(_off(*pair, move) is not None for pair, move in zip(compared, moves, strict=True)):
        moves = gradient_moves(double, epsilon, TRIALS)
    for name, (a, b), move in zip(case.names, compared, moves, strict=True):
        _expect_exact(f"the gradient for {name}", a, b, move)
        errors.working = max(errors.working, epsilon * largest_error(a, b, move))


def _off(a: Tensor, b: Tensor, move: Tensor) -> tuple[int, ...] | None:
    """The index of the entry of a that is furthest from float64's b; None if none is too far."""
    info = torch.finfo(a.dtype)
    off = excess(a, b, allowance(move, a.dtype) + ACROSS_DTYPES * info.eps * b.abs())
    return worst(off.masked_fill(b.abs() > OVERFLOW * info.max, 0.0))


def _expect_exact(name: str, a: Tensor, b: Tensor, move: Tensor) -> None:
    index = _off(a, b, move)
    if index is not None:
        raise GradientMismatch(
            f"in {a.dtype}, {name} is further from float64 than rounding explains: "
            f"at {list(index)}, expected about {float(b[index]):.9g}, got {float(a[index]):.9g}"
        )
