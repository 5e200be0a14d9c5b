"""The comparison of a low-precision dtype with float64, up to what rounding in it can do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from funcnet.testing.check.beside import moved
from funcnet.testing.check.case import Case, Leaves, drawn_like, scale_of, tried, tried_y
from funcnet.testing.check.compared import Compared, explains, factor_between
from funcnet.testing.check.comparison import Errors, excess, largest_error
from funcnet.testing.check.oracles import autograd_gradients
from funcnet.testing.check.own_dtype import check_own_dtype
from funcnet.testing.check.rounding import (
    NOTICED,
    allowance,
    gradient_moves,
    is_extreme,
    noise_in,
    nudge,
    value_moves,
)
from funcnet.testing.check.tolerances import ERRORS_OF_MEAN, FACTOR, ROUGHLY, SMOOTH
from funcnet.testing.errors import GradientMismatch

_AROUND, _POINTS = 2.0**-4, 16
"""A distance at which roundings in half precision are others, and the number of points there."""
_WITHIN_RANGE = (1.0, 0.25, 0.0625)
"""Sizes of params and x that are tried in float16: smaller ones where sums are too large."""
_NEAR_ZERO = (2.0**-10, 2.0**-11, 2.0**-12, 2.0**-13, 2.0**-14, 2.0**-15)
"""Sizes from above √ε of float32 to below it, where an ε that is added to a square counts."""


def check_precision(case: Case, errors: Errors) -> None:
    """Raise GradientMismatch if y or a gradient is further from float64 than rounding explains.

    Single entries are held to `SAFETY` roundings, and each leaf as a whole to a few: the factor
    that fits it best to float64's, in which the roundings of its entries cancel.
    """
    if is_extreme(case):  # what overflows or underflows in this dtype need not in float64
        within = _within_range(case)
        if within is None:
            return
        case = within
    double, y = case.double(), case.apply()
    moves = value_moves(double, torch.finfo(case.dtype).eps, 1)
    quick = Compared(y, double.apply(), moves, y.dtype)
    off = None if quick.wrong_entry is None else _off_float64(case)
    if off is not None:
        # A layer may draw other numbers from the key in another dtype.
        if case.key is not None or _is_another_function(case, off):
            check_own_dtype(case, case.dtype)
            return
        off.expect_exact("y")
    try:
        _check_gradients(case, errors)
        beside = moved(case)
        if not _agrees_with_double(beside):
            _check_gradients(beside, errors)
    except GradientMismatch:
        if _draws_other_numbers(case):
            check_own_dtype(case, case.dtype)
            return
        size = _size_of_another_function(case)
        if size is None:
            raise
        check_own_dtype(case, case.dtype, partial(_away_from_zero, size=size))


def _within_range(case: Case) -> Case | None:
    """The case at numbers of everyday size, if it is extreme in float16 alone.

    There, sums above 40 and weights below 1/40 count as extreme, and occur in every network.
    """
    if case.dtype != torch.float16:
        return None
    for size in _WITHIN_RANGE:
        there = case.with_leaves(partial(_of_size, size=size), _of_size(case.grad, 1.0))
        y = tried_y(there)
        if y is not None and bool(y.isfinite().all()) and not is_extreme(there):
            return there
    return None


def _of_size(x: Tensor, size: float) -> Tensor:
    """x times a power of two, so that it is about as large as `size`; its digits stay."""
    if not x.is_floating_point():
        return x
    return x * 2.0 ** round(math.log2(size / scale_of(x)))


def _check_gradients(case: Case, errors: Errors) -> None:
    """Raise GradientMismatch if a gradient is further from float64 than rounding explains."""
    double, epsilon = case.double(), torch.finfo(case.dtype).eps
    ours, exact = case.gradients(), double.gradients()

    def compared(moves: Leaves) -> list[Compared]:
        return [Compared(a, b, m, a.dtype) for a, b, m in zip(ours, exact, moves, strict=True)]

    leaves = compared(gradient_moves(double, epsilon, 2))
    if any(leaf.wrong_entry is not None or leaf.wrong_factor is not None for leaf in leaves):
        # Two moves of a single entry may both be small by chance.
        leaves = compared(noise_in(case, double))
    for i, leaf in enumerate(leaves):
        leaf.expect_exact(f"the gradient for {case.names[i]}")
        check_factor(case, i, leaf)
        errors.rounding = max(errors.rounding, epsilon * largest_error(leaf.a, leaf.b, leaf.move))


def _agrees_with_double(case: Case) -> bool:
    """Whether gradients are near to float64's, each as a whole: they may be those of another x."""
    share = ROUGHLY * torch.finfo(case.dtype).eps
    pairs = zip(case.gradients(), case.double().gradients(), strict=True)
    return all(float((a.to(b) - b).norm()) <= share * float(b.norm()) for a, b in pairs)


def check_factor(
    case: Case, i: int, leaf: Compared, exactly: Callable[[Case], Case] = Case.double
) -> None:
    """Raise GradientMismatch if the gradient of leaf i is float64's times a factor that rounding
    does not explain.

    `exactly` makes the case of float64's at other points.
    """
    what, factor = f"in {leaf.dtype}, the gradient for {case.names[i]}", leaf.wrong_factor
    if (
        factor is not None
        and not _is_autograds(case, i, leaf, factor)
        and _stays(case, i, factor, exactly)
    ):
        raise GradientMismatch(
            f"{what} is about {factor:.6g} times that in float64, which is more than rounding "
            "explains"
        )
    mean = _wrong_mean_factor(case, i, leaf, exactly)
    if mean is not None:
        raise GradientMismatch(
            f"{what} is on average about {mean:.4g} times that in float64 at points beside x, "
            "which is more than rounding explains"
        )


def check_factors_of_value(
    case: Case, double: Case, names: Sequence[str], parts: Callable[[Tensor], Sequence[Tensor]]
) -> None:
    """Raise GradientMismatch if an output is float64's times a factor, and its reference is not.

    Roundings cancel in such a factor. In half precision, those of a single entry hide half of it.
    `parts` splits y into the outputs, which have `names`.
    """
    if is_extreme(case):
        return
    y, exact = case.apply(), double.apply()

    def wrong_factors(moves: Tensor) -> list[float | None]:
        compared = zip(parts(y), parts(exact), parts(moves), strict=True)
        return [Compared(*output, case.dtype).wrong_factor for output in compared]

    def factor_of(i: int, a: Tensor | None, b: Tensor | None) -> float | None:
        return None if a is None or b is None else factor_between(parts(a)[i], parts(b)[i])

    quick = wrong_factors(value_moves(double, torch.finfo(case.dtype).eps))
    if all(factor is None for factor in quick):
        return
    (blur,) = noise_in(case, double, Case.value)
    there = nudge(case, NOTICED, 0)
    there_y, there_exact = tried_y(there), tried_y(there.double())
    with torch.no_grad():
        reference = tried(case.reference)  # which may refuse this dtype
    for i, (name, factor) in enumerate(zip(names, wrong_factors(blur), strict=True)):
        if (
            factor is not None
            and not explains(factor_of(i, reference, exact), factor)
            and explains(factor_of(i, there_y, there_exact), factor) is not False
        ):
            raise GradientMismatch(
                f"in {case.dtype}, {name} is about {factor:.6g} times that of the reference in "
                "float64, which is more than rounding explains"
            )


def _draws_other_numbers(case: Case) -> bool:
    """Whether the numbers that a layer draws from its key depend on the dtype.

    Where a leaf is so large that y does not show what is drawn, y shows it without that leaf.
    """
    if case.key is None:
        return False
    for i, leaf in enumerate(case.leaves):
        if leaf.is_floating_point():
            without = case.with_leaf(i, torch.zeros_like(leaf))
            if _off_float64(without) is not None:
                return True
    return False


def _off_float64(case: Case) -> Compared | None:
    """y beside float64's if it is further from that than rounding explains, else None."""
    double = case.double()
    y, exact = tried_y(case), tried_y(double)
    if y is None or exact is None:
        return None
    (noise,) = noise_in(case, double, Case.value)
    compared = Compared(y, exact, noise, y.dtype)
    return None if compared.wrong_entry is None else compared


def _size_of_another_function(case: Case) -> float | None:
    """The size of numbers for which y depends on the dtype, if zeros in their place hide that.

    So it is for x / √(x² + ε), which is 0 at 0 whatever the dtype's ε is.
    """
    if all(x.all() for x in case.leaves if x.is_floating_point()):
        return None
    for trial, size in enumerate(_NEAR_ZERO):
        directions = [_away_from_zero(x, 100 * trial + i, size) for i, x in enumerate(case.leaves)]
        there = case.along(directions)
        off = _off_float64(there)
        if off is not None and _is_another_function(there, off):
            return size
    return None


def _away_from_zero(leaf: Tensor, seed: int, size: float) -> Tensor | None:
    """A direction that moves a leaf's zeros by about `size` of its scale; None if it has none."""
    if not leaf.is_floating_point() or leaf.all():
        return None
    return torch.where(leaf == 0, size * drawn_like(leaf, seed), 0.0)


def _is_another_function(case: Case, compared: Compared) -> bool:
    """Whether y depends on the dtype beyond rounding, as 1 / √(x² + ε) does for x of about √ε.

    `compared` holds y at x. If y depends on the dtype, it is off float64's by nearly as much beside
    x as at x; roundings are not. Roundings also leave an entry where it is, most times that
    float64's moves; what is smooth does so now and then. A reference, where there is one, has to
    depend on the dtype as well.
    """
    y, exact = compared.a, compared.b
    too_little = 2 * torch.finfo(y.dtype).eps * exact.abs()  # to move an entry
    if not _is_the_references(case, compared):
        return False
    off, changes, moves, holds = exact - y, [], [], []
    for trial in range(4):
        there = nudge(case, NOTICED, trial)
        moved, moved_exact = tried_y(there), tried_y(there.double())
        if moved is None or moved_exact is None:
            return False
        changes.append(moved_exact - moved - off)
        moves.append((moved_exact - exact).abs() > too_little)
        holds.append(moves[-1] & (moved == y))
    mostly = 2 * torch.stack(holds).sum(0) > torch.stack(moves).sum(0)
    return all(
        float(torch.where(held & mostly, off, change).norm()) <= SMOOTH * float(off.norm())
        for held, change in zip(holds, changes, strict=True)
    )


def _is_the_references(case: Case, compared: Compared) -> bool:
    """Whether the reference in this dtype is about as far from float64 as y, in units of rounding.

    Without a reference of its own, a case's is y.
    """
    with torch.no_grad():
        reference = tried(case.reference)  # which may refuse this dtype
    if reference is None:
        return False
    y, exact, unit = compared.a, compared.b, allowance(compared.move, compared.dtype)
    return bool(excess(y, exact, unit).max() <= 2 * excess(reference, exact, unit).max())


def _wrong_mean_factor(
    case: Case, i: int, leaf: Compared, exactly: Callable[[Case], Case]
) -> float | None:
    """The mean of the factors that a leaf is off by at points beside x, if it is wrong.

    A leaf of few entries has few roundings, which do not cancel at one point. In half precision
    they may hide several percent. At other points they are others, unless what they leave is so
    coarse that these points see the same: such leaves are passed over. So are functions whose y is
    off as well: they are other ones in this dtype.
    """
    is_half = leaf.dtype in (torch.bfloat16, torch.float16)
    if not (is_half and leaf.is_suspicious and leaf.is_steady):
        return None
    mean, error = _mean_factor(case, lambda there: there.gradients()[i], exactly)
    off = abs(mean - 1)
    if not off > FACTOR * torch.finfo(leaf.dtype).eps + ERRORS_OF_MEAN * error:
        return None
    for other in (Case.apply, partial(_autograds, i=i)):
        others, error = _mean_factor(case, other, exactly)
        if not abs(others - 1) + error <= off / 4:
            return None
    return mean


def _autograds(case: Case, i: int) -> Tensor:
    """Autograd's gradient of a leaf; ours in float64 where autograd cannot follow."""
    found = autograd_gradients(case)
    return case.double().gradients()[i] if found is None else found[i]


def _mean_factor(
    case: Case, result: Callable[[Case], Tensor], exactly: Callable[[Case], Case]
) -> tuple[float, float]:
    """The mean factor between a result and float64's at points beside x, and its error."""
    factors = []
    for trial in range(_POINTS):
        there = nudge(case, _AROUND, trial)
        found, exact = tried(partial(result, there)), tried(partial(result, exactly(there)))
        factor = None if found is None or exact is None else factor_between(found, exact)
        if factor is None:
            return math.nan, math.nan
        factors.append(factor)
    return statistics.fmean(factors), statistics.stdev(factors) / math.sqrt(_POINTS)


def _stays(case: Case, i: int, factor: float, exactly: Callable[[Case], Case]) -> bool:
    """Whether leaf i is off by about as much beside x. Equal terms all round to one side."""
    there = nudge(case, NOTICED, 0)
    found, exact = tried(there.gradients), tried(exactly(there).gradients)
    if found is None or exact is None:
        return True
    return explains(factor_between(found[i], exact[i]), factor) is not False


def _is_autograds(case: Case, i: int, leaf: Compared, factor: float) -> bool:
    """Whether autograd in this dtype is off by about as much: 1 − σ(x) is 0 in a tail."""
    found = autograd_gradients(case)
    return found is not None and explains(factor_between(found[i], leaf.b), factor) is True
