"""Two results of one computation agree up to what rounding in their dtype can do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from funcnet.ops.accumulation import in_float64
from funcnet.testing.check.case import Case, Leaves, tried_y
from funcnet.testing.check.casts import coarsest, computed_in
from funcnet.testing.check.comparison import excess, worst
from funcnet.testing.check.rounding import Results, allowance, is_extreme, moves, noise_in
from funcnet.testing.check.tolerances import OVERFLOW, SAME_DTYPE, UNDECIDED
from funcnet.testing.errors import GradientMismatch
from funcnet.testing.layouts import same


def expect_close(
    case: Case,
    complaint: str,
    got: Leaves,
    want: Leaves,
    of: Results = Case.gradients,
    elsewhere: bool = False,
) -> None:
    """Raise GradientMismatch where a difference is more than rounding explains.

    Entries that are not finite on both sides are left out. So are those that are not on one, if
    `elsewhere` says that nobody gave these numbers, and if the result is undefined there.
    """
    if all(map(same, got, want)):
        return
    names = [""] if of is Case.value else [f" for {name}" for name in case.names]
    double, extreme = case.double(), is_extreme(case)
    exact = tried_y(double)
    if exact is None:
        double = case  # a kernel may refuse float64
    if elsewhere and not all(leaf.isfinite().all() for leaf in (*got, *want)):
        undefined = _undefined(double, of)
        got, want = _masked(got, undefined), _masked(want, undefined)

    def first_apart(noise: Leaves, dtype: torch.dtype) -> str | None:
        for name, a, b, move in zip(names, got, want, noise, strict=False):
            one, other = (in_float64(result) for result in (a, b))
            index = _furthest_apart(one, other, move, dtype, extreme)
            if index is not None:
                return f"{name}, at {list(index)}: {float(a[index]):.9g} and {float(b[index]):.9g}"
        return None

    def is_rounding_in(dtype: torch.dtype) -> bool:
        eps = torch.finfo(dtype).eps
        return first_apart(moves(double, eps, 1, of), dtype) is None

    if is_rounding_in(case.dtype):
        return
    dtype = case.dtype if exact is None else coarsest((case.dtype, computed_in(double, exact)))
    if dtype != case.dtype and is_rounding_in(dtype):
        return
    # Rounding may carry an entry across a kink, or be all of it in a tail: more trials show that.
    place = first_apart(noise_in(case, double, of), dtype)
    if place is not None:
        raise GradientMismatch(complaint + place)


def _furthest_apart(
    a: Tensor, b: Tensor, move: Tensor, dtype: torch.dtype, extreme: bool
) -> tuple[int, ...] | None:
    """The index where results in a dtype differ most; None if rounding explains every difference.

    `extreme` says that one computation may overflow on its way where another does not.
    """
    info = torch.finfo(dtype)
    allowed = allowance(move, dtype).to(b) + SAME_DTYPE[dtype] * info.eps * b.abs()
    off = excess(a, b, allowed).masked_fill(a.isnan() != b.isnan(), math.inf)
    off.masked_fill_(~(a.isfinite() | b.isfinite()), 0.0)
    if extreme:
        limit = OVERFLOW * info.max
        off.masked_fill_(~((a.abs() < limit) & (b.abs() < limit)), 0.0)
    return worst(off)


def _masked(leaves: Leaves, undefined: Leaves) -> Leaves:
    return [leaf.masked_fill(u, math.nan) for leaf, u in zip(leaves, undefined, strict=True)]


def _undefined(case: Case, of: Results) -> Leaves:
    """A mask for y, or for each gradient: True where rounding decides what it is.

    A smaller nudge moves what is smooth less. It moves (x − m)/s of equal numbers, whose mean may
    be rounded, by as much: from 0/0 to 1 or −1.
    """
    epsilon = torch.finfo(case.dtype).eps
    fine, coarse = (moves(case, step, 3, of) for step in (epsilon, math.sqrt(epsilon)))
    return [
        ~result.isfinite() | (small > UNDECIDED * large)
        for result, small, large in zip(of(case), fine, coarse, strict=True)
    ]
