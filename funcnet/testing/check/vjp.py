"""`check_vjp`, from first to last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from funcnet.checks import PromiseError
from funcnet.keys import Key
from funcnet.layer import Layer
from funcnet.losses import Loss
from funcnet.testing.check.beside import moved, one_example
from funcnet.testing.check.case import Case, expect_real_and_dense, make_case
from funcnet.testing.check.casts import computed_in
from funcnet.testing.check.comparison import Errors
from funcnet.testing.check.contract import check_calls
from funcnet.testing.check.keyed import beside_key, other_keys
from funcnet.testing.check.laws import (
    check_each_example,
    check_frozen,
    check_linear_in_grad,
    check_odd_in_grad,
    check_sum_of_examples,
)
from funcnet.testing.check.own_dtype import check_own_dtype
from funcnet.testing.check.precision import check_precision
from funcnet.testing.check.purity import put_back
from funcnet.testing.check.report import complete, expect_right, name_the_guilty
from funcnet.testing.check.search import Limits, find_wrong, find_wrong_at
from funcnet.testing.check.state import unchanged
from funcnet.testing.check.surroundings import check_surroundings
from funcnet.testing.errors import GradientMismatch, noted

_Examine: TypeAlias = Callable[[Case, Limits, Errors], None]

_IN_FLOAT64 = (
    "check_vjp: raised in float64, in which gradients are checked; check_function takes functions "
    "that have no float64"
)


def check_vjp(
    layer: Layer | Loss,
    params: Any,
    x: Any,
    grad: Tensor | float | None = None,
    key: Key | None = None,
    budget: float | None = None,
    *,
    rtol: float = 1e-6,
    atol: float = 0.0,
) -> None:
    """Check the gradient of a layer, network or loss, and the contract of both.

    `check_vjp(layer, params, x)` for layers, `check_vjp(loss, x, target)` for losses. `grad` is the
    gradient of the result, drawn if not given. `key` goes to layers that draw numbers.

    - The contract: the tree of dparams, shapes, dtypes, devices; `apply` agrees with `fwd`, `vjp`
      with `bwd`; `input_grad=False`, and `param_grad=False` where the layer takes it; `out_shape`;
      `init` ignores global randomness; no call writes to its inputs or returns their memory; no
      global random state is used; the same call twice gives the same bits; no state between `fwd`
      and `bwd`; any memory layout; a batch of 0; numbers drawn follow the key; `apply` works under
      `torch.func.vmap`, where autograd can follow it. y and dx of a layer that declares
      `_fresh = True` share no storage with residuals, dparams or results of another call, nor do
      their entries. `_fwd_` and `_bwd_`, where a layer writes them to work in place, do what `fwd`
      and `bwd` do.
    - The mathematics, in float64: autograd of `apply` where it can follow; central differences,
      entry by entry where that is little work and along random directions; the power that Taylor's
      remainder falls by; linearity in grad; a batch is the sum of its examples, whose gradients
      `_bwd_each` finds where a layer writes it. Only a numeric derivative refutes a gradient. At a
      kink, any slope between those of its two sides is right. A second point, away from ties, is
      checked beside the given one, and a loss on its first example alone.
    - The dtype of x against float64, up to what rounding in it can do. A layer that computes in a
      narrower dtype than x's, as `Cast` does, or has a part that does, is compared with
      differences in that dtype, which are coarse.

    Leaves of integers and bools, in x, params and target, are never moved; their gradient is None.
    A layer of several tensors may take a tree of them as x. A layer is checked without a key and,
    if a key changes y, with keys, too. Where it refuses an x beside the given one, that x is left
    out.

    `budget` is a time in seconds. Random directions over all leaves come first; what is left of the
    time goes to single entries. Without a budget, these are a few hundred evaluations.

    An entry is wrong if it is off by more than `rtol` of itself, `atol` and the rounding of its own
    sum: gradients of 1e-12 are checked as closely as those of 1e12.

    Raises GradientMismatch; TypeError for what is not a tensor; ValueError if no gradient could be
    refuted (grad is 0, x or y is not finite, y is noise, which autograd cannot follow); and every
    exception of the layer, unchanged.

    >>> import funcnet as fn
    >>> layer = fn.Conv2d(2, 3, padding=1)
    >>> params = layer.init(fn.key(0), (3, 5, 5))
    >>> check_vjp(layer, params, fn.normal(fn.key(1), (2, 3, 5, 5)))
    >>> check_vjp(fn.MSE(), fn.normal(fn.key(2), (4,)), fn.normal(fn.key(3), (4,)))
    """
    inspect_vjp(layer, params, x, grad, key, rtol, atol, budget)


def inspect_vjp(
    layer: Any, params: Any, x: Any, grad: Any = None, key: Key | None = None,
    rtol: float = 1e-6, atol: float = 0.0, budget: float | None = None,
) -> Errors:  # fmt: skip
    """`check_vjp` that returns the worst errors it has seen."""
    _refuse(layer, params, x, grad)
    check_limits("check_vjp", rtol, atol, budget)
    case = make_case(layer, params, x, grad, key)
    limits, errors = Limits(rtol, atol, budget), Errors()
    with put_back(case):
        _attempt(_examine, case, limits, errors)
        for there in beside_key(case):
            _attempt(_examine, there, limits, errors)
        for there in other_keys(case):
            _attempt(_examine_gradient, there, limits, errors)
        for there in one_example(case):
            _attempt(_examine_one_example, there, limits, errors)
    expect_resolved("check_vjp", errors, "and autograd cannot follow apply")
    return errors


def _attempt(examine: _Examine, case: Case, limits: Limits, errors: Errors) -> None:
    """Examine a case, and complete the exception that says what is wrong."""

    def again(other: Case, by: _Examine = examine) -> None:
        with _as_mismatch():
            by(other, limits, Errors())

    try:
        with _as_mismatch():
            examine(case, limits, errors)
    except GradientMismatch as mismatch:
        if mismatch.snippet is None:  # it has one if the layer calls check_vjp itself
            name_the_guilty(mismatch, case, again)
            usual = (("rtol", limits.rtol, 1e-6), ("atol", limits.atol, 0.0))
            unusual = "".join(f", {name}={v!r}" for name, v, default in usual if v != default)
            complete(mismatch, case, again, partial(again, by=_examine_gradient), unusual)
        raise


@contextmanager
def _as_mismatch() -> Iterator[None]:
    """Raise GradientMismatch where a layer refuses what it has made itself."""
    try:
        yield
    except PromiseError as error:
        raise GradientMismatch(error.what) from error


def _examine(case: Case, limits: Limits, errors: Errors) -> None:
    with unchanged(case, check_calls(case)):
        _examine_numbers(case, limits, errors)


def _examine_numbers(case: Case, limits: Limits, errors: Errors) -> None:
    double = case.double()
    with noted(_IN_FLOAT64):
        y = double.apply()
    expect_something("check_vjp", double, y)
    if y.dtype != torch.float64:
        raise GradientMismatch(f"apply: expected y to be torch.float64 as x is, got {y.dtype}")
    own = computed_in(double, y)
    if own != torch.float64:
        errors.resolved = True
        if torch.finfo(own).eps < torch.finfo(case.dtype).eps:  # it computes in float32 inside
            check_own_dtype(case.to(own), own)
            check_precision(case, errors)
        else:
            check_own_dtype(case, own)
        check_odd_in_grad(case, own)
        check_surroundings(case)
        return
    if case.dtype != torch.float64:
        with noted(_IN_FLOAT64):
            check_calls(double)  # rounding in the dtype of x may hide differences
    check_frozen(double)
    beside = moved(double)
    expect_right(find_wrong(double, beside, limits, errors))
    check_linear_in_grad(beside)
    check_sum_of_examples(beside)
    check_each_example(beside)
    check_surroundings(case)
    if case.dtype != torch.float64:
        check_precision(case, errors)


def _examine_gradient(case: Case, limits: Limits, errors: Errors) -> None:
    """Examine the gradient at the case alone, in float64."""
    double = case.double()
    if computed_in(double, double.apply()) == torch.float64:
        expect_right(find_wrong_at(double, limits, errors, thorough=False))


def _examine_one_example(case: Case, limits: Limits, errors: Errors) -> None:
    check_calls(case)
    _examine_gradient(case, limits, errors)


def expect_something(who: str, case: Case, y: Tensor) -> None:
    """Raise ValueError where any gradient would pass."""
    movable = [leaf for leaf in case.leaves if leaf.is_floating_point()]
    entries = y.numel() and sum(leaf.numel() for leaf in movable)
    for nothing, why in (
        (not movable, "neither x nor params have a floating-point tensor"),
        (entries and not y.isfinite().any(), "no entry of y is finite"),
        (entries and not case.grad.any(), "grad is 0"),
        (entries and not any(x.isfinite().any() for x in movable), "no entry of x is finite"),
    ):
        if nothing:
            raise ValueError(f"{who}: expected a gradient that can be checked, but {why}")


def expect_resolved(who: str, errors: Errors, without: str) -> None:
    """Raise ValueError where no oracle could have told a wrong gradient.

    `without` says why there is no other oracle than numeric derivatives.
    """
    if not errors.resolved:
        raise ValueError(
            f"{who}: expected a gradient that can be checked, but no two steps of a numeric "
            f"derivative agree, as where y is noise or a fine staircase, {without}"
        )


def check_limits(who: str, rtol: float, atol: float, budget: float | None) -> None:
    """Raise ValueError unless tolerances are at least 0, and a budget is above."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not value >= 0:
            raise ValueError(f"{who}: expected {name} >= 0, got {value}")
    if budget is not None and not budget > 0:
        raise ValueError(f"{who}: expected a budget of more than 0 seconds, got {budget}")


def _refuse(layer: Any, params: Any, x: Any, grad: Any) -> None:
    if isinstance(layer, type):
        raise TypeError(f"check_vjp: expected a layer or a loss, got the class {layer.__name__}")
    if not (hasattr(layer, "fwd") and hasattr(layer, "bwd")):
        other = "; check_function checks functions and modules" if callable(layer) else ""
        kind = type(layer).__name__
        raise TypeError(f"check_vjp: expected a layer or a loss, got {kind}{other}")
    if isinstance(grad, Tensor):
        expect_real_and_dense("check_vjp: expected gradients", grad)
    is_loss = isinstance(layer, Loss)
    if is_loss and not (isinstance(params, Tensor) and params.is_floating_point()):
        got = params.dtype if isinstance(params, Tensor) else type(params).__name__
        raise TypeError(f"check_vjp: expected x to be a floating-point tensor, got {got}")
    names = ("inputs", "targets") if is_loss else ("params", "x")
    for name, tree in zip(names, (params, x), strict=True):
        for leaf in optree.tree_leaves(tree):
            if isinstance(leaf, Tensor):
                expect_real_and_dense(f"check_vjp: expected {name}", leaf)
            elif not is_loss:
                raise TypeError(f"check_vjp: expected {name} of tensors, got {type(leaf).__name__}")
    if not (is_loss or optree.tree_leaves(x)):
        raise TypeError(f"check_vjp: expected x to be a tensor, got {type(x).__name__}")
