"""The conditions that must not matter: memory layouts, global randomness, an empty batch, vmap."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.keys import fold_in
from funcnet.keys import key as make_key
from funcnet.testing.check.agreement import expect_close
from funcnet.testing.check.case import Case, Leaves, LossCase, tried
from funcnet.testing.check.fitting import checked_gradients, expect_like
from funcnet.testing.check.in_place import check_fresh, check_in_place
from funcnet.testing.check.oracles import autograd_gradients
from funcnet.testing.check.purity import expect_own, expect_unshared, init_under_two_seeds, pure
from funcnet.testing.check.rounding import is_extreme
from funcnet.testing.errors import GradientMismatch, noted
from funcnet.testing.layouts import LAYOUTS, fits, laid_out, other_layouts, row_major, same

_REFUSED = "check_vjp: {} the result to this exception"


def check_surroundings(case: Case) -> None:
    """Raise GradientMismatch if memory layouts, global randomness or an empty batch matter."""
    _, residuals = case.fwd()
    gradients = case.flat(case.bwd(residuals))
    _check_layouts_of_grad(case, residuals, gradients)
    _check_layouts_of_inputs(case)
    check_in_place(case, gradients)
    if isinstance(case, LossCase):
        _check_integers(case)
        got = case.layer.bwd(residuals, float(case.grad))
        expect_close(case, "a grad that is a float changes the gradient", [got], gradients)
    elif case.batch is not None:
        _check_init(case)
        if not getattr(case.layer, "couples_examples", False):
            _check_empty_batch(case)
        _check_vmap(case)


def _check_layouts_of_grad(case: Case, residuals: Any, gradients: Leaves) -> None:
    for name, grad in other_layouts(case.grad):
        there = replace(case, grad=grad)
        straight = replace(case, grad=row_major(grad))
        complaint = f"grad in the memory layout {name!r} changes"
        with noted(_REFUSED.format(complaint)):
            got = there.flat(pure(there, "bwd", partial(there.bwd, residuals)))
        expect_own(there, got)
        check_fresh(there)
        want = gradients if same(grad, case.grad) else straight.flat(straight.bwd(residuals))
        expect_close(straight, f"{complaint} the gradient", got, want)


def _check_layouts_of_inputs(case: Case) -> None:
    leaves = case.leaves
    for i in range(case.first_of_x, len(leaves)):
        for name, x in other_layouts(leaves[i]):
            there = case.with_leaf(i, x)
            straight = case if same(x, leaves[i]) else case.with_leaf(i, row_major(x))
            if straight is case or tried(straight.vjp) is not None:
                complaint = f"{case.names[i]} in the memory layout {name!r} changes"
                _expect_the_same(there, straight, complaint, elsewhere=straight is not case)
    if len(leaves) > 1:  # an only one has been tried
        there = case.with_leaves(partial(laid_out, layout="strided"))
        which = "params" if case.first_of_x else "leaves of x"
        _expect_the_same(there, case, f"{which} that are not contiguous change")
    if isinstance(case, LossCase):
        for layout in LAYOUTS[1:-1]:  # the same numbers, if the tensor has enough axes
            there = case.with_target(partial(_laid_out, layout=layout))
            _expect_the_same(there, case, "a target that is not contiguous changes")


def _expect_the_same(there: Case, straight: Case, complaint: str, elsewhere: bool = False) -> None:
    """Compare the results of two cases that differ in memory layout only.

    `elsewhere` says that their numbers are not those that were given.
    """
    with noted(_REFUSED.format(complaint)):
        y = pure(there, "apply", there.apply)
        expect_unshared("y", y, there.inputs)
        want = [straight.apply()]
        expect_close(straight, f"{complaint} y", [y], want, of=Case.value, elsewhere=elsewhere)
        got = there.flat(pure(there, "vjp", there.vjp))
    expect_own(there, got)
    check_fresh(there)
    want = straight.gradients()
    expect_close(straight, f"{complaint} the gradient", got, want, elsewhere=elsewhere)


def _check_integers(case: LossCase) -> None:
    """Try the integers of a target in int32 and int64, where the loss takes both."""
    given = optree.tree_leaves(case.target)
    for dtype in (torch.int32, torch.int64):
        there = case.with_target(partial(_in_integers, dtype=dtype))
        leaves = optree.tree_leaves(there.target)
        is_another = any(a is not b for a, b in zip(leaves, given, strict=True))
        if is_another and tried(there.vjp) is not None:
            _expect_the_same(there, case, f"a target in {dtype} changes")


def _in_integers(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another dtype of integers, if its numbers fit in it."""
    if x.dtype not in (torch.int32, torch.int64):
        return x
    converted = x.to(dtype)
    return converted if same(converted.to(x.dtype), x) else x


def _laid_out(x: Tensor, layout: str) -> Tensor:
    return laid_out(x, layout) if fits(layout, x.ndim) else x


def _check_init(case: Case) -> None:
    if not isinstance(case.x, Tensor):
        return  # a layer of several tensors may take their shapes in its own way
    key = make_key(0) if case.key is None else fold_in(case.key, 0)
    shape = tuple(case.x.shape[1:])
    drawn = init_under_two_seeds(case, lambda: case.layer.init(key, shape))
    first, second = map(optree.tree_leaves, drawn)
    if len(first) != len(second) or not all(map(same, first, second)):
        raise GradientMismatch(
            "init: the same key gives different parameters, as if drawn from global randomness"
        )
    for options in ({"dtype": case.dtype}, {"dtype": torch.float64}, {"device": "meta"}):
        try:
            params = case.layer.init(key, shape, **options)
        except Exception:  # not every way to draw numbers knows of devices without memory
            if "device" in options:
                continue
            raise
        _check_new_params(case, params, **options)


def _check_new_params(
    case: Case, params: Any, dtype: torch.dtype | None = None, device: str | None = None
) -> None:
    """Raise GradientMismatch unless new params are like those that the layer works with."""
    if optree.tree_structure(params) != optree.tree_structure(case.params):
        return  # params of another origin: a layer may take several kinds
    for name, leaf, like in zip(
        case.names, optree.tree_leaves(params), case.leaves[: case.first_of_x], strict=False
    ):
        wrong = ""
        if leaf.shape != like.shape:
            wrong = f"of shape {tuple(like.shape)}, got {tuple(leaf.shape)}"
        elif dtype is not None and leaf.is_floating_point() and leaf.dtype != dtype:
            wrong = f"in the dtype asked for, {dtype}, got {leaf.dtype}"
        elif device is not None and leaf.device.type != device:
            wrong = f"on the device asked for, {device}, got {leaf.device}"
        if wrong:
            raise GradientMismatch(f"init: expected {name} {wrong}")


def _check_empty_batch(case: Case) -> None:
    empty = case.with_x(lambda leaf: leaf[:0], case.grad[:0])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of variances of no rows
            y = empty.apply()
            result = empty.vjp()
    except Exception as error:
        if not case.batch:
            raise
        raise GradientMismatch(f"a batch of 0 should work, and raises {error!r}") from error
    expect_like("apply", "y of a batch of 0", y, (0, *case.grad.shape[1:]), case.grad)
    gradients = checked_gradients(empty, "vjp of a batch of 0", result)
    for name, gradient in zip(empty.names[: case.first_of_x], gradients, strict=False):
        wrong = gradient[gradient != 0]
        if len(wrong):
            raise GradientMismatch(
                f"the gradient for {name} of a batch of 0 should be 0, got {wrong[0]}"
            )


def _check_vmap(case: Case) -> None:
    """Hold `apply` to `torch.func.vmap` over copies of params and x, where autograd follows it.

    What autograd cannot follow was not written in torch, so that vmap cannot follow it either.
    """
    if not case.batch or autograd_gradients(case) is None:
        return
    leaves = [leaf.expand(2, *leaf.shape) for leaf in case.leaves]

    def apply(*leaves: Tensor) -> Tensor:
        return case.at(leaves).apply()

    try:
        y = torch.func.vmap(apply)(*leaves)
    except Exception as error:
        if "data-dependent" in str(error) and _refuses_some(case):
            return  # it looks at x to refuse it
        raise GradientMismatch(f"apply does not work under torch.func.vmap: {error}") from error
    one = case.apply()
    expect_like("apply under torch.func.vmap", "y", y, (2, *one.shape), one)
    if not is_extreme(case):
        expect_close(case, "torch.func.vmap changes y", [y[1]], [one], of=Case.value)


def _refuses_some(case: Case) -> bool:
    """Whether there are numbers at which the layer raises."""

    def times(leaf: Tensor, factor: float) -> Tensor:
        return factor * leaf if leaf.is_floating_point() else leaf

    beside = (case.with_leaves(partial(times, factor=f)) for f in (-1.0, 1e3, math.nan))
    return any(tried(there.apply) is None for there in beside)
