"""The calls of a layer: `fwd`, `bwd`, `apply` and `vjp` are pure, agree and fit their inputs.

Each check is a function of a case that raises `GradientMismatch`, in the dtype of the case. Results
of one computation made twice must have equal bits. Results of two computations that should agree
may differ by what rounding in that dtype can do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.layer import takes_param_grad
from funcnet.testing.check.agreement import expect_close
from funcnet.testing.check.case import Case, Leaves, named_leaves, tried
from funcnet.testing.check.fitting import checked_gradients, expect_like, expect_pair
from funcnet.testing.check.in_place import check_fresh
from funcnet.testing.check.purity import expect_own, expect_unshared, pure
from funcnet.testing.check.state import check_no_state, check_written_over
from funcnet.testing.errors import GradientMismatch
from funcnet.testing.layouts import same


def check_calls(case: Case) -> Leaves:
    """Raise GradientMismatch unless fwd, bwd, apply and vjp are pure, agree and fit the inputs.

    Returns y and the gradients, by apply and vjp.
    """
    pristine = tried(partial(copy.deepcopy, case.layer))  # a layer need not support copies
    y, residuals = _check_fwd(case)
    gradients = _check_bwd(case, y, residuals)
    check_fresh(case)
    found = _check_vjp_and_apply(case, y, gradients)
    _check_recording(case)
    if not case.is_loss:
        _check_need(case, residuals, gradients)
    check_no_state(case, pristine, gradients)
    check_written_over(case, "params or x")
    return found


def _check_fwd(case: Case) -> tuple[Tensor, Any]:
    y, residuals = expect_pair("fwd", "(y, residuals)", pure(case, "fwd", case.fwd))
    expect_like("fwd", "y", y, _expected_shape(case), case.grad)
    expect_unshared("y", y, case.inputs)
    _expect_repeated(case, "fwd", lambda: [case.fwd()[0]], [y])
    if case.grad.shape != y.shape:
        expect_like("apply", "y", case.apply(), y.shape, case.grad)  # a drawn grad has its shape
        raise ValueError(
            f"check_vjp: expected grad of y's shape, {tuple(y.shape)}, got {tuple(case.grad.shape)}"
        )
    return y, residuals


def _check_bwd(case: Case, y: Tensor, residuals: Any) -> Leaves:
    kept = {"y": y, "grad": case.grad, **named_leaves(residuals=residuals)}
    result = pure(case, "bwd", lambda: case.bwd(residuals), kept)
    gradients = checked_gradients(case, "bwd", result)
    expect_own(case, gradients)
    _expect_repeated(case, "bwd", lambda: case.flat(case.bwd(residuals)), gradients)
    return gradients


def _expected_shape(case: Case) -> tuple[int, ...] | None:
    """The shape of y by `out_shape`; None where the batch is not known."""
    if case.is_loss:
        return ()
    if case.batch is None:
        return None
    of_one = optree.tree_map(lambda leaf: tuple(leaf.shape[1:]), case.x)
    call = partial(case.layer.out_shape, of_one)
    # A layer of several tensors may take their shapes in its own way.
    shape = call() if isinstance(case.x, Tensor) else tried(call)
    if shape is None and not isinstance(case.x, Tensor):
        return None
    if not isinstance(shape, tuple) or not all(type(size) is int for size in shape):
        raise GradientMismatch(f"out_shape: expected a tuple of ints, got {shape!r}")
    return (case.batch, *shape)


def _check_vjp_and_apply(case: Case, y: Tensor, gradients: Leaves) -> Leaves:
    value = pure(case, "apply", case.apply)
    expect_like("apply", "y", value, y.shape, case.grad)
    expect_unshared("y of apply", value, case.inputs)
    expect_close(case, "apply and fwd differ in y", [value], [y], of=Case.value)
    _expect_repeated(case, "apply", lambda: [case.apply()], [value])
    result = checked_gradients(case, "vjp", pure(case, "vjp", case.vjp))
    expect_close(case, "vjp and fwd + bwd differ", result, gradients)
    return [value, *result]


def _check_recording(case: Case) -> None:
    """Hold y to itself where autograd may not record it, and where it does: a global state."""
    recorded = case.with_leaves(_tracked)
    y = case.apply()
    for who, call in (
        ("torch.no_grad()", torch.no_grad()(case.apply)),
        ("x.requires_grad", lambda: recorded.apply().detach()),
    ):
        found = tried(call)
        if found is not None and found.shape == y.shape:
            complaint = f"apply depends on whether autograd records it: {who} changes y"
            expect_close(case, complaint, [found], [y], of=Case.value)


def _tracked(leaf: Tensor) -> Tensor:
    """A copy of a leaf that requires a gradient, if it can have one; inference tensors cannot."""
    return leaf.detach().clone().requires_grad_() if leaf.is_floating_point() else leaf


def _check_need(case: Case, residuals: Any, gradients: Leaves) -> None:
    """Ask bwd and vjp for one of the two gradients."""
    of_params, of_x = gradients[: case.first_of_x], gradients[case.first_of_x :]
    for who, method, call in (
        ("bwd", case.layer.bwd, partial(case.bwd, residuals)),
        ("vjp", case.layer.vjp, case.vjp),
    ):
        for need in ("input_grad", "param_grad") if takes_param_grad(method) else ("input_grad",):
            result = pure(case, who, partial(call, **{need: False}))
            got = checked_gradients(case, who, result, without=need)
            whole = [*got, *of_x] if need == "input_grad" else [*of_params, *got]
            expect_close(case, f"{who}: {need}=False changes the gradient", whole, gradients)


def _expect_repeated(case: Case, who: str, call: Callable[[], Leaves], first: Leaves) -> None:
    """Raise GradientMismatch unless `call` returns `first` again, bit for bit."""
    names = [f"gradient for {name}" for name in case.names] if who == "bwd" else ["y"]
    for name, a, b in zip(names, pure(case, who, call), first, strict=True):
        # Devices other than the CPU may add in another order each time.
        if b.device.type == "cpu" and not same(a, b):
            raise GradientMismatch(f"{who}: called twice, gives two different answers for {name}")
