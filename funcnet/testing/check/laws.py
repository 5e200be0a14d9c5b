"""Laws that need no oracle: the gradient is linear in grad, a batch is the sum of its examples, and
what is frozen has gradient 0.

Each check is a function of a float64 case that raises `GradientMismatch`.
"""

from __future__ import annotations

from functools import partial

import optree
import torch
from torch import Tensor

from funcnet.testing.check.case import Case, Leaves, scale_of, signed
from funcnet.testing.check.comparison import excess, worst
from funcnet.testing.check.rounding import allowance, gradient_moves, is_extreme, value_moves
from funcnet.testing.check.tolerances import COUPLED, LAW_ROUNDING, LAW_TERMS
from funcnet.testing.errors import GradientMismatch

_EPSILON = torch.finfo(torch.float64).eps


def check_linear_in_grad(case: Case) -> None:
    """vjp(a·g + b·h) = a·vjp(g) + b·vjp(h), also for very large and very small multiples."""
    if is_extreme(case):
        return  # multiples overflow
    other = signed(case.grad.shape, seed=2).to(case.grad) * 3 * scale_of(case.grad)
    both = case.at(case.leaves, other - 2.5 * case.grad)
    mine, others = case.gradients(), case.at(case.leaves, other).gradients()
    expected = [b - 2.5 * a for a, b in zip(mine, others, strict=True)]
    terms = [2.5 * a.abs() + b.abs() for a, b in zip(mine, others, strict=True)]
    i = _first_off(both, both.gradients(), expected, terms)
    for multiple in (2.0**40, 2.0**-40):
        if i is None:
            scaled = case.at(case.leaves, multiple * case.grad)
            expected = [multiple * leaf for leaf in mine]
            i = _first_off(scaled, scaled.gradients(), expected, [leaf.abs() for leaf in expected])
    if i is not None:
        raise GradientMismatch(f"the gradient for {case.names[i]} is not linear in grad")


def check_frozen(case: Case) -> None:
    """The gradients of what is frozen are 0: parameters in `Frozen`, an embedding's padding."""
    for name, frozen, gradient in zip(case.names, case.frozen, case.gradients(), strict=True):
        if (frozen & (gradient != 0)).any():
            raise GradientMismatch(f"the gradient for what is frozen in {name} is not 0")


def check_sum_of_examples(case: Case) -> None:
    """dparams of a batch is the sum of its examples' dparams, and dx consists of their dx.

    A layer that couples examples is not held to this.
    """
    first = optree.tree_leaves(case.x)[0]
    if not case.batch or first.ndim + case.grad.ndim < 3 or len(case.grad) != case.batch:
        return
    if getattr(case.layer, "couples_examples", False) or is_extreme(case):
        return
    batch = _two_or_three(case)
    try:
        ones = [batch.with_x(partial(_row, i=i), g[None]) for i, g in enumerate(batch.grad)]
        y, alone = batch.apply(), torch.cat([one.apply() for one in ones])
        each = [one.gradients() for one in ones]
    except Exception:  # it may be undefined for one example, or for the company of one
        return
    for one, leaves in zip(ones, each, strict=True):
        for name, leaf, gradient in zip(case.names, one.leaves, leaves, strict=True):
            if gradient.shape != leaf.shape:
                raise GradientMismatch(
                    f"vjp of a batch of 1: expected the gradient for {name} of shape "
                    f"{tuple(leaf.shape)}, got {tuple(gradient.shape)}"
                )
    rounding = COUPLED * value_moves(batch, _EPSILON)
    if not y.isfinite().all() or worst(excess(y, alone, rounding)) is not None:
        return  # batch normalisation, for instance
    shared = case.first_of_x
    together = [torch.stack(leaves) for leaves in zip(*each, strict=True)]
    sums = [leaf.sum(0) for leaf in together[:shared]]
    terms = [leaf.abs().sum(0) for leaf in together[:shared]]
    rows = [leaf.flatten(0, 1) for leaf in together[shared:]]
    expected = [*sums, *rows]
    i = _first_off(batch, batch.gradients(), expected, [*terms, *(leaf.abs() for leaf in rows)])
    if i is not None:
        what = "the sum of its examples' gradients" if i < shared else "each example's gradient"
        raise GradientMismatch(
            f"the gradient for {case.names[i]} of a batch of {batch.batch} is not {what}, "
            "although apply treats every example alone"
        )


def _row(leaf: Tensor, i: int) -> Tensor:
    return leaf[i : i + 1]


def _two_or_three(case: Case) -> Case:
    """The first examples, at least two: a single one is repeated with other numbers."""
    count = max(2, min(3, case.batch or 0))

    def repeated(leaf: Tensor) -> Tensor:
        other = leaf * 1.0625 if leaf.is_floating_point() else leaf
        return torch.cat([leaf, other])[:count]

    company = signed(case.grad.shape, 3).to(case.grad) * scale_of(case.grad)
    return case.with_x(repeated, torch.cat([case.grad, company])[:count])


def _first_off(case: Case, got: Leaves, expected: Leaves, terms: Leaves) -> int | None:
    """The first leaf where results differ by more than rounding."""
    allowed = [LAW_TERMS * size for size in terms]
    compared = list(zip(got, expected, allowed, strict=True))
    if all(worst(excess(*leaf)) is None for leaf in compared):
        return None
    for i, move in enumerate(gradient_moves(case, _EPSILON)):
        a, b, share = compared[i]
        if worst(excess(a, b, share + LAW_ROUNDING * allowance(move, torch.float64))) is not None:
            return i
    return None
