"""A guess at the mistake: the transform that turns the right gradient into the wrong one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from funcnet.testing.check.case import Case
from funcnet.testing.check.comparison import excess, within
from funcnet.testing.check.finding import Finding
from funcnet.testing.check.oracles import autograd_gradients
from funcnet.testing.check.tolerances import ALIKE, ALIKE_IN_LEAF

_SMALL = 8
"""The largest number in a factor that is guessed for a single number."""


def guess(finding: Finding, bad: Tensor | None) -> str | None:
    """Explain a wrong leaf, and its wrong entries, in words; None if no simple mistake does."""
    wrong = finding.gradients[finding.leaf]
    right = finding.reference
    if _ignores_grad(finding.case, finding.leaf, wrong):
        return "it does not depend on grad"
    if math.isnan(finding.analytic):
        return "it is not a number: a division by 0, or 0·∞?"
    if right is None or bad is None or not (wrong.isfinite().all() and right.isfinite().all()):
        return None
    if not wrong.any():
        return "it is zero: is it computed at all?"
    for explanation, candidate in _transforms(finding, right):
        if _alike(wrong, candidate):
            return explanation
    return (
        _factor(finding.case, wrong, right)
        or _of_wrong_entries(wrong, right, bad)
        or _missing_term(finding, wrong - right)
        or _factors_along_an_axis(wrong, right)
    )


def where(bad: Tensor) -> str:
    """The index of the part that holds all wrong entries; "" if that is the whole leaf."""
    if not bad.ndim:
        return ""
    places, parts = bad.nonzero(), []
    edges = zip(places.amin(0).tolist(), places.amax(0).tolist(), bad.shape, strict=True)
    for low, high, size in edges:
        whole = (low, high) == (0, size - 1)
        parts.append(":" if whole else str(low) if low == high else f"{low}:{high + 1}")
    return "" if set(parts) == {":"} else f"[{', '.join(parts)}]"


def wrong_entries(finding: Finding) -> Tensor | None:
    """A mask of the leaf's wrong entries; None without a reference to compare all with."""
    right = finding.reference
    if right is None:
        return None
    return excess(finding.gradients[finding.leaf], right, ALIKE * right.abs() + finding.floor) > 1


def _transforms(finding: Finding, right: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "the sign is wrong", -right
    yield "its sign is lost: it is the size of the right one", right.abs()
    if right.shape == finding.case.grad.shape:
        yield "it is grad itself: the slope is missing", finding.case.grad
    yield from _of_other_leaves(finding)
    yield from _over_part_of(finding)
    axes = range(right.ndim)
    for i, j in itertools.combinations(axes, 2):
        if right.shape[i] == right.shape[j] > 1:
            yield f"axes {i} and {j} are transposed", right.transpose(i, j)
    for count in (1, 2, 3):
        for some in itertools.combinations(axes, count):
            if all(right.shape[axis] > 1 for axis in some):
                yield f"it is flipped along {_axes(some)}", right.flip(some)
    for axis in axes:
        for step in range(1, min(right.shape[axis], 4)):
            for shift in (step, -step):
                rolled = right.roll(shift, axis)
                yield f"it is shifted by {shift} along axis {axis}", rolled
                edge = slice(0, shift) if shift > 0 else slice(shift, None)
                cut = rolled.clone()
                cut[(slice(None),) * axis + (edge,)] = 0
                yield f"it is shifted by {shift} along axis {axis}", cut


def _of_other_leaves(finding: Finding) -> Iterator[tuple[str, Tensor]]:
    found = autograd_gradients(finding.case) or []
    for name, other in zip(finding.case.names, found, strict=False):
        if name != finding.case.names[finding.leaf]:
            yield f"it is the gradient for {name}", other


def _over_part_of(finding: Finding) -> Iterator[tuple[str, Tensor]]:
    """The gradient by the first or the last example, or by the first or the last time step."""
    case = finding.case
    for axis, what in ((0, "example counts: the sum over the batch is missing"), (1, "of axis 1")):
        if case.is_loss or case.grad.ndim < axis + 1 or case.grad.shape[axis] < 2:
            continue
        for which, name in ((0, "first"), (case.grad.shape[axis] - 1, "last")):
            grad = torch.zeros_like(case.grad)
            grad.select(axis, which).copy_(case.grad.select(axis, which))
            part = autograd_gradients(replace(case, grad=grad))
            if part is not None:
                place = what if axis == 0 else f"entry {what} of y counts, as of one time step"
                yield f"only the {name} {place}", part[finding.leaf]


def _ignores_grad(case: Case, leaf: int, wrong: Tensor) -> bool:
    """Whether a leaf's gradient stays the same with another grad."""
    other = replace(case, grad=-3 * case.grad).gradients()[leaf]
    return bool(wrong.any()) and _alike(other, wrong)


def _factor(case: Case, wrong: Tensor, right: Tensor) -> str | None:
    """Name a factor that all entries are off by."""
    if not right.any():
        return None
    factor = float((wrong * right).sum() / right.square().sum())
    if not (abs(factor - 1) > ALIKE and _alike(wrong, factor * right)):
        return None
    shape = case.grad.shape
    batch = shape[0] if shape and not case.is_loss else 1
    positions = case.grad[0, 0].numel() if case.grad.ndim > 2 else 1
    for divisor, what in (
        (batch, "a mean over the batch instead of a sum"),
        (positions, "a mean over positions instead of a sum"),
        (batch * positions, "a mean over batch and positions instead of a sum"),
        (case.grad.numel(), "divided by the number of entries"),
        *_products_of_sizes(shape),
    ):
        if divisor > 1 and abs(factor * divisor - 1) < ALIKE:
            return f"it is too small by a factor of {divisor:.6g}: {what}"
        if divisor > 1 and abs(factor / divisor - 1) < ALIKE:
            if "instead" in what:
                what = "a sum instead of a mean?"
            return f"it is too large by a factor of {divisor:.6g}: {what}"
    if right.numel() > 1 or _simple(factor):  # any error in a single number is a factor
        return f"a factor of {_number(factor)} is wrong"
    return None


def _simple(factor: float) -> bool:
    """Whether a factor is one that formulas have: a fraction of small numbers."""
    fraction = Fraction(factor).limit_denominator(_SMALL)
    return 0 < abs(fraction.numerator) <= _SMALL and abs(factor - fraction) < ALIKE * abs(factor)


def _products_of_sizes(shape: tuple[int, ...]) -> Iterator[tuple[float, str]]:
    """Products of y's sizes, and the roots of single sizes, as of attention's scale."""
    for count, kind in ((1, "a size"), (2, "sizes"), (3, "sizes")):
        for axes in itertools.combinations(range(len(shape)), count):
            sizes = [shape[axis] for axis in axes]
            yield math.prod(sizes), f"{'·'.join(map(str, sizes))}, {kind} of y"
    for size in shape:
        yield size**0.5, f"√{size}, the root of a size of y"


def _missing_term(finding: Finding, off: Tensor) -> str | None:
    """Name a term that it is off by: one number a row, or a multiple of the leaf in each row."""
    for axis in range(off.ndim):
        constant = off.mean(axis, keepdim=True).expand_as(off)
        if off.shape[axis] > 1 and _alike(off, constant):
            return f"it is off by a constant along axis {axis}: a term of the mean is missing?"
    x, name = finding.case.leaves[finding.leaf], finding.case.names[finding.leaf]
    for axis in range(1, x.ndim):
        axes = tuple(range(axis, x.ndim))
        count = math.prod(x.shape[axis:])
        centred = x - x.mean(axes, keepdim=True)
        for basis, what in (((x,), name), ((torch.ones_like(x), centred), f"1 and of {name}")):
            fitted = sum(
                b * (off * b).sum(axes, keepdim=True) / b.square().sum(axes, keepdim=True)
                for b in basis
            )
            if count > len(basis) and isinstance(fitted, Tensor) and _alike(off, fitted):
                return (
                    f"in each row of {_axes(axes)}, it is off by a multiple of {what}: the "
                    f"part along the normalised {name} is missing?"
                )
    return None


def _factors_along_an_axis(wrong: Tensor, right: Tensor) -> str | None:
    for axis in range(wrong.ndim):
        others = [i for i in range(wrong.ndim) if i != axis]
        if wrong.shape[axis] > 1 and others:
            top = (wrong * right).sum(others, keepdim=True)
            factors = top / right.square().sum(others, keepdim=True).clamp(min=1e-300)
            if _alike(factors, torch.ones_like(factors)):
                continue  # wrong entries are off by little more than rounding
            if right.numel() > 2 * factors.numel() and _alike(wrong, factors * right):
                return f"factors along axis {axis} are wrong: {_numbers(factors.flatten())}"
    return None


def _of_wrong_entries(wrong: Tensor, right: Tensor, bad: Tensor) -> str | None:
    """Name what the wrong entries among right ones have in common."""
    if not wrong[bad].any():
        return "the wrong entries are all zero: a part is left out"
    limit = wrong[bad].abs().max()
    # A single number that is too small may be anything.
    if (
        right.numel() > 1
        and (right[bad].abs() > limit).all()
        and not (right[~bad].abs() > (1 + ALIKE) * limit).any()
        and _alike(wrong[bad], limit * right[bad].sign())
    ):
        return f"it is clipped to ±{float(limit):.6g}"
    off = (wrong - right)[bad]
    if _alike(wrong[bad], -right[bad]):
        return "the sign of the wrong entries is wrong"
    ratio = wrong[bad] / right[bad]
    if len(ratio) > 1 and _alike(ratio, ratio[0].expand_as(ratio)):
        return f"the wrong entries are off by a factor of {_number(float(ratio[0]))}"
    if len(off) > 1 and _alike(off, off[0].expand_as(off)):
        return f"{float(off[0]):.6g} is added to the wrong entries"
    return None


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not b.any() or not b.isfinite().all():
        return False
    return within(a, b, ALIKE * b.abs() + ALIKE_IN_LEAF * b.abs().max())


def _axes(axes: tuple[int, ...]) -> str:
    return f"axis {axes[0]}" if len(axes) == 1 else "axes " + ", ".join(map(str, axes))


def _number(factor: float) -> str:
    shown = f"{factor:.6g}"
    return shown if shown != "1" else f"1{factor - 1:+.1e}"


def _numbers(factors: Tensor) -> str:
    first = ", ".join(map(_number, factors[:6].tolist()))
    return first + (", …" if len(factors) > 6 else "")
