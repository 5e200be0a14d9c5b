"""Hidden state: nothing is kept from one call to the next but residuals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import optree
from torch import Tensor

from funcnet.testing.check.agreement import expect_close
from funcnet.testing.check.case import (
    Case,
    Leaves,
    LossCase,
    of_other_examples,
    other_numbers,
    tried,
    tried_y,
    unlike,
)
from funcnet.testing.errors import GradientMismatch
from funcnet.testing.layouts import row_major, same


def check_no_state(case: Case, pristine: Any, gradients: Leaves) -> None:
    """Call fwd in between, and bwd on other copies of its arguments: neither must matter.

    In between come other tensors, with the same signs and with others, then the same params with
    another x, then the same x, then what is not moved, integers and a target, of other examples.
    """
    complaint = "bwd depends on what was called before it: state is kept between fwd and bwd"
    _, residuals = case.fwd()
    others, after = case.with_leaves(other_numbers), []
    for there in (
        others,
        case.with_leaves(unlike),
        case.with_x(other_numbers),
        replace(others, x=case.x),
        *_with_other_integers(case),
    ):
        tried(partial(_call_beside, there))
        after.append(case.flat(case.bwd(residuals)))
    fresh = replace(case, layer=case.layer if pristine is None else pristine)
    copies = fresh.with_leaves(Tensor.clone)
    try:
        after.append(fresh.flat(fresh.bwd(residuals)))
        copied = copies.flat(copies.bwd(_cloned(residuals)))
    except Exception as error:
        raise GradientMismatch(
            f"{complaint} (on a copy that has run no fwd, it raises {error!r})"
        ) from error
    if not all(all(map(same, found, gradients)) for found in after):
        raise GradientMismatch(complaint)
    expect_close(case, complaint, copied, gradients)  # copies may have other strides


def _with_other_integers(case: Case) -> list[Case]:
    """The case with the integers and bools of other examples, or with another target."""
    if isinstance(case, LossCase):
        return [case.with_target(other_numbers), case.with_target(of_other_examples)]
    return [] if case.batch is None else [case.with_x(of_other_examples)]


def _call_beside(case: Case) -> None:
    case.bwd(case.fwd()[1])
    case.fwd()


def _cloned(residuals: Any) -> Any:
    """A copy of residuals in the same memory layout, except those that autograd has recorded.

    A layer may keep the graph of its forward pass, and a copy is not part of that graph.
    """
    return optree.tree_map(
        lambda x: x.clone() if isinstance(x, Tensor) and not x.requires_grad else x, residuals
    )


@contextmanager
def unchanged(case: Case, before: Leaves) -> Iterator[None]:
    """Raise GradientMismatch if, after many calls, y and the gradients are not `before`."""
    yield
    after = [case.apply(), *case.gradients()]
    for name, a, b in zip(("y", *case.names), after, before, strict=True):
        if b.device.type == "cpu" and not same(a, b):
            what = name if name == "y" else f"the gradient for {name}"
            raise GradientMismatch(
                f"called again after all other calls, {what} is another one: state is kept from "
                "call to call"
            )


def check_written_over(case: Case, whose: str) -> None:
    """Write other numbers into the leaves after a call: what it kept of the old must not matter.

    An optimiser writes into params, and a training loop may write into x.
    """
    others = case.with_leaves(other_numbers)
    other_y, other_gradients = tried_y(others), tried(others.gradients)
    if other_y is None or other_gradients is None:
        return
    there = case.with_leaves(row_major)
    there.apply()
    there.vjp()
    for leaf, other in zip(there.leaves, others.leaves, strict=True):
        leaf.copy_(other)
    stale = f"numbers that are written into {whose} do not count, as state is kept of the old ones"
    y, gradients = there.apply(), there.gradients()
    expect_close(others, f"{stale}: y is another one", [y], [other_y], of=Case.value)
    expect_close(others, f"{stale}: the gradient is another one", gradients, other_gradients)
