"""Laws that need no oracle: the gradient is linear in grad, a batch is the sum of its examples, and
what is frozen has gradient 0.

Each check is a function of a float64 case that raises `GradientMismatch`.
"""

from __future__ import annotations

import torch

from funcnet.testing.check.case import Case, Leaves, scale_of, signed
from funcnet.testing.check.comparison import excess, worst
from funcnet.testing.check.rounding import allowance, gradient_moves, value_moves
from funcnet.testing.check.tolerances import COUPLED, LAW_ROUNDING, LAW_TERMS
from funcnet.testing.errors import GradientMismatch

_EPSILON = torch.finfo(torch.float64).eps


def check_linear_in_grad(case: Case) -> None:
    """vjp(a·g + b·h) = a·vjp(g) + b·vjp(h), also for very large and very small multiples."""
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
    """The gradients of parameters in a `Frozen` layer are 0."""
    for name, frozen, gradient in zip(case.names, case.frozen, case.gradients(), strict=True):
        if frozen and gradient.any():
            raise GradientMismatch(f"the gradient for {name}, which is frozen, is not 0")


def check_sum_of_examples(case: Case) -> None:
    """dparams of a batch is the sum of its examples' dparams, and dx consists of their dx.

    A layer that couples examples is not held to this.
    """
    if case.is_loss or case.x.ndim < 2 or not len(case.x):
        return
    if getattr(case.layer, "couples_examples", False):
        return
    batch = _two_or_three(case)
    ones = [
        batch.at([*batch.leaves[:-1], x[None]], g[None])
        for x, g in zip(batch.x, batch.grad, strict=True)
    ]
    y, rounding = batch.apply(), COUPLED * value_moves(batch, _EPSILON)
    alone = torch.cat([one.apply() for one in ones])
    if not y.isfinite().all() or worst(excess(y, alone, rounding)) is not None:
        return  # batch normalisation, for instance
    each = [one.gradients() for one in ones]
    *sums, _ = (torch.stack(leaves).sum(0) for leaves in zip(*each, strict=True))
    terms = [torch.stack(leaves).abs().sum(0) for leaves in zip(*each, strict=True)]
    rows = torch.cat([leaves[-1] for leaves in each])
    i = _first_off(batch, batch.gradients(), [*sums, rows], [*terms[:-1], rows.abs()])
    if i is not None:
        what = "the sum of its examples' gradients" if i < len(sums) else "each example's gradient"
        raise GradientMismatch(
            f"the gradient for {case.names[i]} of a batch of {len(batch.x)} is not {what}, "
            "although apply treats every example alone"
        )


def _two_or_three(case: Case) -> Case:
    """The first examples, at least two: a single one is repeated with other numbers."""
    x = torch.cat([case.x, case.x * 1.0625])[: max(2, min(3, len(case.x)))]
    company = signed(case.grad.shape, 3).to(case.grad) * scale_of(case.grad)
    grad = torch.cat([case.grad, company])[: len(x)]
    return case.at([*case.leaves[:-1], x], grad)


def _first_off(case: Case, got: Leaves, expected: Leaves, terms: Leaves) -> int | None:
    """The first leaf where results differ by more than rounding."""
    compared = list(zip(got, expected, (LAW_TERMS * size for size in terms), strict=True))
    if all(worst(excess(*leaf)) is None for leaf in compared):
        return None
    for i, move in enumerate(gradient_moves(case, _EPSILON)):
        a, b, allowed = compared[i]
        allowed = allowed + LAW_ROUNDING * allowance(move, torch.float64)
        if worst(excess(a, b, allowed)) is not None:
            return i
    return None
