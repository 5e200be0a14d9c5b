"""Laws that need no oracle: the gradient is linear in grad, a batch is the sum of its examples,
`_bwd_each` finds the gradient of each, and what is frozen has gradient 0.

Each check is a function of a float64 case that raises `GradientMismatch`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.layer import Layer, writes
from funcnet.leaves import has_children
from funcnet.ops import products
from funcnet.ops.need import Need
from funcnet.testing.check.case import Case, Leaves, named_leaves, scale_of, signed, tried
from funcnet.testing.check.comparison import largest, within
from funcnet.testing.check.purity import pure
from funcnet.testing.check.rounding import (
    allowance,
    gradient_moves,
    is_extreme,
    noise_in,
    value_moves,
)
from funcnet.testing.check.tolerances import COUPLED, LAW_FAR, LAW_ROUNDING, LAW_TERMS, SAME_DTYPE
from funcnet.testing.errors import GradientMismatch
from funcnet.testing.layouts import same
from funcnet.trace import trace

_EPSILON = torch.finfo(torch.float64).eps
_AT_ZERO = ": at a grad of 0, or where some of its entries are, it is another one"


def check_linear_in_grad(case: Case) -> None:
    """vjp(a·g + b·h) = a·vjp(g) + b·vjp(h), also for very large and very small multiples, and 0.

    h is positive, as the gradient of a sum is, which drawn ones are not.
    A matrix function finds its gradient as a block of [[A, g], [0, A]], and loses as many digits as
    g is larger than A. So a very large multiple shows what is clipped, and no more.
    """
    if is_extreme(case):
        return  # multiples overflow
    other = signed(case.grad.shape, seed=2).abs().to(case.grad) * 3 * scale_of(case.grad)
    both = replace(case, grad=other - 2.5 * case.grad)
    mine, others = case.gradients(), replace(case, grad=other).gradients()
    expected = [b - 2.5 * a for a, b in zip(mine, others, strict=True)]
    terms = [2.5 * a.abs() + b.abs() for a, b in zip(mine, others, strict=True)]
    _expect_linear(both, both.gradients(), expected, terms)
    for multiple, why in ((2.0**10, ""), (2.0**40, ""), (2.0**-40, ""), (0.0, _AT_ZERO)):
        scaled = replace(case, grad=multiple * case.grad)
        expected = [multiple * leaf for leaf in mine]
        share = min(max(multiple, 1.0), LAW_FAR / LAW_TERMS)
        terms = [torch.full_like(leaf, share * largest(leaf)) for leaf in expected]
        _expect_linear(scaled, scaled.gradients(), expected, terms, why)
    _check_zeros_in_grad(case, mine)


def check_odd_in_grad(case: Case, dtype: torch.dtype) -> None:
    """vjp(−g) = −vjp(g), and vjp(0) = 0, which no dtype rounds."""
    gradients, share = case.gradients(), SAME_DTYPE[dtype] * torch.finfo(dtype).eps
    for multiple, why in ((-1.0, ""), (0.0, _AT_ZERO)):
        found = replace(case, grad=multiple * case.grad).gradients()
        for name, got, leaf in zip(case.names, found, gradients, strict=True):
            want = multiple * leaf
            if not within(got, want, share * want.abs()):
                raise GradientMismatch(f"the gradient for {name} is not linear in grad{why}")


def _check_zeros_in_grad(case: Case, gradients: Leaves) -> None:
    """vjp(g₁) + vjp(g₂) = vjp(g), where g₁ is g with zeros for the last entries, g₂ the others."""
    count = case.grad.numel()
    is_first = (torch.arange(count, device=case.grad.device) < count / 2).reshape(case.grad.shape)
    first, last = (replace(case, grad=case.grad * half) for half in (is_first, ~is_first))
    pairs = list(zip(first.gradients(), last.gradients(), strict=True))
    sums, terms = [a + b for a, b in pairs], [a.abs() + b.abs() for a, b in pairs]
    _expect_linear(case, sums, gradients, terms, _AT_ZERO)


def _expect_linear(
    case: Case, got: Leaves, expected: Leaves, terms: Iterable[Tensor], why: str = ""
) -> None:
    i = _first_off(case, got, expected, terms)
    if i is not None:
        why += _as_rounded(got[i], expected[i])
        raise GradientMismatch(f"the gradient for {case.names[i]} is not linear in grad{why}")


def _as_rounded(got: Tensor, expected: Tensor) -> str:
    """The end of a message, where results differ by about as much as float32 rounds."""
    off = float((got - expected).abs().max() / expected.abs().max())
    if not 1 / 64 < off / torch.finfo(torch.float32).eps < 4:
        return ""
    return f", by {off:.0e} of the largest entry: is a part of it computed in float32?"


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
    if not (y.isfinite().all() and within(y, alone, rounding)):
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


def check_each_example(case: Case) -> None:
    """Check that `_bwd_each` finds for an example what `bwd` finds for the grad of that one alone.

    The grad of the others is 0 then, so a mask that a key has drawn is the same on both sides. In a
    network, every layer that writes `_bwd_each` is held to it, on its own x and grad, without key.
    """
    for own in _cases_with_bwd_each(case):
        if own.grad.shape[:1] != (own.batch,) or is_extreme(own):
            continue
        batch = _two_or_three(own)
        if tried(batch.vjp) is not None:  # it may be undefined in company
            _check_each(batch)


def _check_each(case: Case) -> None:
    kept = case.layer._fwd(case.params, case.x, case.key)[1]
    named = named_leaves(residuals=kept)
    *gradients, dx = pure(case, "_bwd_each", partial(_gradients_of_each, case, kept), named)
    if not all(map(same, _gradients_of_each(case, kept), [*gradients, dx])):
        raise GradientMismatch("_bwd_each: the same call twice gives different bits")
    for i in range(len(case.grad)):
        is_this = torch.arange(len(case.grad), device=case.grad.device) == i
        alone = replace(case, grad=_only(case.grad, is_this))
        expected = alone.gradients()
        got = [*(leaf[i] for leaf in gradients), _only(dx, is_this)]
        wrong = _first_off(alone, got, expected, [leaf.abs() for leaf in expected])
        if wrong is not None:
            raise GradientMismatch(
                f"_bwd_each: the gradient for {case.names[wrong]} of example {i} is not what bwd "
                "finds for the grad of that example alone"
            )


def _cases_with_bwd_each(case: Case) -> list[Case]:
    """The layers with parameters that write `_bwd_each`: the case's own, or those inside."""
    if not (isinstance(case.layer, Layer) and isinstance(case.x, Tensor)):
        return []
    if has_children(case.layer) and case.key is None:
        records = tried(partial(trace, case.layer, case.params, case.x, case.grad)) or ()
        last = {id(record.layer): record for record in records}
        cases = [
            Case(record.layer, record.params, record.x, record.grad).double()
            for record in last.values()
            if record.grad is not None
        ]
    else:
        cases = [case]
    return [own for own in cases if _writes_bwd_each(own)]


def _writes_bwd_each(case: Case) -> bool:
    has_params, couples = case.first_of_x > 0, case.layer.couples_examples
    return has_params and not couples and writes(case.layer, "_bwd_each")


def _gradients_of_each(case: Case, residuals: Any) -> list[Any]:
    """The gradients of each example by `_bwd_each`, (N, …), and behind them dx, zeros for None."""
    each, dx = case.layer._bwd_each(case.params, residuals, case.grad, Need())
    structure = optree.tree_structure(case.params)
    try:
        leaves: list[Any] = structure.flatten_up_to(each)
    except ValueError:
        raise GradientMismatch(
            f"_bwd_each: expected gradients with the tree of params, {structure}, "
            f"got {optree.tree_structure(each)}"
        ) from None
    gradients = [None if leaf is None else products.formed(leaf) for leaf in leaves]
    gradients.append(torch.zeros_like(case.x, dtype=case.dtype) if dx is None else dx)
    expected = [*((len(case.grad), *leaf.shape) for leaf in case.leaves[:-1]), case.x.shape]
    for name, gradient, shape in zip(case.names, gradients, expected, strict=True):
        got = None if gradient is None else tuple(gradient.shape)
        if got != tuple(shape):
            raise GradientMismatch(
                f"_bwd_each: expected the gradient for {name} of shape {tuple(shape)}, got {got}"
            )
    return gradients


def _only(leaf: Tensor, examples: Tensor) -> Tensor:
    """A leaf with zeros for the other examples."""
    return torch.where(examples.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0.0)


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


def _first_off(case: Case, got: Leaves, expected: Leaves, terms: Iterable[Tensor]) -> int | None:
    """The first leaf where results differ by more than rounding."""
    compared = [(a, b, LAW_TERMS * size) for a, b, size in zip(got, expected, terms, strict=True)]
    if all(within(*leaf) for leaf in compared):
        return None

    def first_beyond(moves: Leaves) -> int | None:
        for i, ((a, b, share), move) in enumerate(zip(compared, moves, strict=True)):
            rounding = LAW_ROUNDING * allowance(move, torch.float64)
            if not within(a, b, share + rounding):
                return i
        return None

    if first_beyond(gradient_moves(case, _EPSILON)) is None:
        return None
    # What cancels whatever the inputs are, as where softmax saturates, more trials show.
    return first_beyond(noise_in(case, case))
