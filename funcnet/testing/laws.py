"""Laws that need no oracle: the gradient is linear in grad, and a batch is the sum of its examples.

Each is a function of a float64 case that returns how the law is broken, or None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funcnet.testing.case import Case, Leaves, scale_of, signed
from funcnet.testing.rounding import allowance, gradient_moves, value_moves

_EPSILON = torch.finfo(torch.float64).eps


def not_linear_in_grad(case: Case) -> str | None:
    """vjp(a·g + b·h) = a·vjp(g) + b·vjp(h), for very large and very small multiples too."""
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
    return None if i is None else f"the gradient for {case.names[i]} is not linear in grad"


def not_sum_of_examples(case: Case) -> str | None:
    """For a layer that treats examples alone: dparams of a batch is the sum of the examples'
    dparams, and dx is their dx, one after the other."""
    if case.is_loss or case.x.ndim < 2 or not len(case.x):
        return None
    batch = _two_or_three(case)
    ones = [
        batch.at([*batch.leaves[:-1], x[None]], g[None])
        for x, g in zip(batch.x, batch.grad, strict=True)
    ]
    y, noise = batch.apply(), 1000 * value_moves(batch, _EPSILON)
    if not y.isfinite().all() or _off(y, torch.cat([one.apply() for one in ones]), noise):
        return None  # examples are coupled, by batch normalisation for instance
    each = [one.gradients() for one in ones]
    *sums, _ = (torch.stack(leaves).sum(0) for leaves in zip(*each, strict=True))
    terms = [torch.stack(leaves).abs().sum(0) for leaves in zip(*each, strict=True)]
    rows = torch.cat([leaves[-1] for leaves in each])
    i = _first_off(batch, batch.gradients(), [*sums, rows], [*terms[:-1], rows.abs()])
    if i is None:
        return None
    what = "the sum of those of its examples" if i < len(sums) else "that of each example"
    return (
        f"the gradient for {case.names[i]} of a batch of {len(batch.x)} is not {what}, "
        "although apply treats every example alone"
    )


def _two_or_three(case: Case) -> Case:
    """The first examples; one alone gets company."""
    x = torch.cat([case.x, case.x * 1.0625])[: max(2, min(3, len(case.x)))]
    company = signed(case.grad.shape, 3).to(case.grad) * scale_of(case.grad)
    grad = torch.cat([case.grad, company])[: len(x)]
    return case.at([*case.leaves[:-1], x], grad)


def _first_off(case: Case, got: Leaves, expected: Leaves, terms: Leaves) -> int | None:
    """The first leaf where results differ by more than rounding."""
    if not any(_off(a, b, 1e-10 * size) for a, b, size in zip(got, expected, terms, strict=True)):
        return None
    floors = [allowance(move, torch.float64) for move in gradient_moves(case, _EPSILON)]
    for i, (a, b, floor, size) in enumerate(zip(got, expected, floors, terms, strict=True)):
        if _off(a, b, 16 * floor + 1e-10 * size):
            return i
    return None


def _off(a: Tensor, b: Tensor, allowed: Tensor) -> bool:
    far = ~((a - b).abs() <= allowed) & (a != b) & b.isfinite()
    return a.shape != b.shape or bool(far.any())
