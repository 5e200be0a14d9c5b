"""The contract of a layer besides its numbers: purity, shapes, dtypes, layouts, no hidden state.

Each check is a function of a case that raises `GradientMismatch`, in the dtype of the case. Results
of one computation made twice must have equal bits. Results of two computations that should agree
may differ by what rounding in that dtype can do.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.keys import fold_in
from funcnet.keys import key as make_key
from funcnet.testing.check.case import Case, Leaves, LossCase, flat, signed
from funcnet.testing.check.comparison import excess, worst
from funcnet.testing.check.purity import expect_own, expect_unshared, pure, under_two_seeds
from funcnet.testing.check.rounding import TRIALS, allowance, gradient_moves, value_moves
from funcnet.testing.check.tolerances import SAME_DTYPE
from funcnet.testing.errors import GradientMismatch
from funcnet.testing.layouts import laid_out, other_layouts, row_major, same


def check_calls(case: Case) -> None:
    """Raise GradientMismatch unless fwd, bwd, apply and vjp are pure, agree and fit the inputs."""
    pristine = _copied(case.layer)
    y, residuals = _check_fwd(case)
    gradients = _check_bwd(case, y, residuals)
    _check_fresh(case)
    _check_vjp_and_apply(case, y, gradients)
    if not case.is_loss:
        _check_need(case, residuals, gradients)
    _check_no_state(case, pristine, gradients)


def check_surroundings(case: Case) -> None:
    """Raise GradientMismatch if memory layouts, global randomness or an empty batch matter."""
    _, residuals = case.fwd()
    gradients = flat(case.bwd(residuals))
    _check_layouts(case, residuals, gradients)
    if case.is_loss:
        got = case.layer.bwd(residuals, float(case.grad))
        _expect_close(case, "a grad that is a float changes the gradient", [got], gradients)
    elif case.x.ndim:
        _check_init(case)
        if case.key is None:
            _check_empty_batch(case)


def _check_fwd(case: Case) -> tuple[Tensor, Any]:
    y, residuals = _pair("fwd", "(y, residuals)", pure(case, "fwd", case.fwd))
    _expect_like("fwd", "y", y, case.out_shape() if case.is_loss or case.x.ndim else None, case.x)
    expect_unshared("y", y, case.inputs)
    _expect_repeated(case, "fwd", lambda: [case.fwd()[0]], [y])
    if case.grad.shape != y.shape:
        raise ValueError(
            f"check_vjp: expected grad of y's shape, {tuple(y.shape)}, got {tuple(case.grad.shape)}"
        )
    return y, residuals


def _check_bwd(case: Case, y: Tensor, residuals: Any) -> Leaves:
    kept = {"y": y, "grad": case.grad, **_named("residuals", residuals)}
    result = pure(case, "bwd", lambda: case.bwd(residuals), kept)
    gradients = _check_gradients(case, "bwd", result)
    expect_own(case, gradients)
    _expect_repeated(case, "bwd", lambda: flat(case.bwd(residuals)), gradients)
    return gradients


def _check_gradients(case: Case, who: str, result: Any, without: str = "") -> Leaves:
    """The gradients that were asked for. `without` names the argument of bwd that was False."""
    dparams, dx = _pair(who, "(dparams, dx)", result)
    for name, gradient, need in (("dparams", dparams, "param_grad"), ("dx", dx, "input_grad")):
        if without == need and gradient is not None:
            raise GradientMismatch(
                f"{who}: expected {name} to be None with {need}=False, got {_kind(gradient)}"
            )
    asked = {"input_grad": slice(-1), "param_grad": slice(-1, None)}.get(without, slice(None))
    expected, got = optree.tree_structure(case.params), optree.tree_structure(dparams)
    if expected != got and without != "param_grad":
        raise GradientMismatch(
            f"{who}: expected dparams with the tree of params, {expected}, got {got}"
        )
    gradients = [*optree.tree_leaves(dparams), *([] if without == "input_grad" else [dx])]
    for name, leaf, gradient in zip(case.names[asked], case.leaves[asked], gradients, strict=True):
        label = "dx" if name == "x" else f"the gradient for {name}"
        _expect_like(who, label, gradient, leaf.shape, leaf)
    return gradients


def _check_vjp_and_apply(case: Case, y: Tensor, gradients: Leaves) -> None:
    value = pure(case, "apply", case.apply)
    _expect_like("apply", "y", value, y.shape, case.x)
    expect_unshared("y of apply", value, case.inputs)
    _expect_close(case, "apply and fwd differ in y", [value], [y], of_value=True)
    _expect_repeated(case, "apply", lambda: [case.apply()], [value])
    result = _check_gradients(case, "vjp", pure(case, "vjp", case.vjp))
    _expect_close(case, "vjp and fwd + bwd differ", result, gradients)


def _check_need(case: Case, residuals: Any, gradients: Leaves) -> None:
    """Ask bwd and vjp for one of the two gradients."""
    for who, method, call in (
        ("bwd", case.layer.bwd, partial(case.bwd, residuals)),
        ("vjp", case.layer.vjp, case.vjp),
    ):
        for need in ("input_grad", "param_grad") if _takes_param_grad(method) else ("input_grad",):
            result = pure(case, who, partial(call, **{need: False}))
            got = _check_gradients(case, who, result, without=need)
            got = [*got, gradients[-1]] if need == "input_grad" else [*gradients[:-1], *got]
            _expect_close(case, f"{who}: {need}=False changes the gradient", got, gradients)


def _takes_param_grad(method: Callable[..., Any]) -> bool:
    parameters = inspect.signature(method).parameters.values()
    return any(p.name == "param_grad" or p.kind is p.VAR_KEYWORD for p in parameters)


def _check_no_state(case: Case, pristine: Any, gradients: Leaves) -> None:
    """Call fwd in between, and bwd on another copy of the layer: neither must matter."""
    complaint = "bwd depends on what was called before it: state is kept between fwd and bwd"
    _, residuals = case.fwd()
    other = case.at([_other(leaf) for leaf in case.leaves])
    other.bwd(other.fwd()[1])
    other.fwd()
    after = [flat(case.bwd(residuals))]
    if pristine is not None:
        try:
            after.append(flat(replace(case, layer=pristine).bwd(residuals)))
        except Exception as error:
            raise GradientMismatch(
                f"{complaint} (on a copy of the layer that has run no fwd, it raises {error!r})"
            ) from error
    if not all(all(map(same, found, gradients)) for found in after):
        raise GradientMismatch(complaint)


def _check_fresh(case: Case) -> None:
    """Hold a layer that declares `_fresh` to it: whatever follows may write over its y and dx."""
    if not getattr(case.layer, "_fresh", False):
        return
    y, residuals = case.fwd()
    dparams, dx = case.bwd(residuals)
    kept, why = _named("residuals", residuals), f" ({type(case.layer).__name__} declares _fresh)"
    expect_unshared("y of fwd", y, kept, why)
    expect_unshared("dx of bwd", dx, {**kept, **_named("dparams", dparams)}, why)


def _check_layouts(case: Case, residuals: Any, gradients: Leaves) -> None:
    for name, grad in other_layouts(case.grad):
        there = case.at(case.leaves, grad)
        straight = case.at(case.leaves, row_major(grad))
        got = flat(pure(there, "bwd", partial(there.bwd, residuals)))
        expect_own(there, got)
        _check_fresh(there)
        want = gradients if same(grad, case.grad) else flat(straight.bwd(residuals))
        _expect_close(
            straight, f"grad in the memory layout {name!r} changes the gradient", got, want
        )
    for name, x in other_layouts(case.x):
        there = case.at([*case.leaves[:-1], x])
        straight = case if same(x, case.x) else case.at([*case.leaves[:-1], row_major(x)])
        if straight is case or _takes(straight):
            _expect_the_same(there, straight, f"x in the memory layout {name!r} changes")
    there = case.at([laid_out(leaf, "strided") for leaf in case.leaves])
    _expect_the_same(there, case, "params that are not contiguous change")
    if isinstance(case, LossCase):
        there = case.with_target(lambda target: laid_out(target, "strided"))
        _expect_the_same(there, case, "a target that is not contiguous changes")


def _expect_the_same(there: Case, straight: Case, complaint: str) -> None:
    """Compare the results of two cases that differ in memory layout only."""
    y = pure(there, "apply", there.apply)
    expect_unshared("y", y, there.inputs)
    _expect_close(straight, f"{complaint} y", [y], [straight.apply()], of_value=True)
    got = flat(pure(there, "vjp", there.vjp))
    expect_own(there, got)
    _check_fresh(there)
    _expect_close(straight, f"{complaint} the gradient", got, straight.gradients())


def _takes(case: Case) -> bool:
    """Whether the layer is defined at this x, which the user has not chosen."""
    try:
        case.vjp()
    except Exception:  # a layer may refuse its input by any exception
        return False
    return True


def _check_init(case: Case) -> None:
    key = make_key(0) if case.key is None else fold_in(case.key, 0)
    shape = tuple(case.x.shape[1:])
    first, second = under_two_seeds(
        case, "init", lambda: optree.tree_leaves(case.layer.init(key, shape))
    )
    if len(first) != len(second) or not all(map(same, first, second)):
        raise GradientMismatch(
            "init: the same key gives different parameters, as if drawn from global randomness"
        )


def _check_empty_batch(case: Case) -> None:
    empty = case.at([*case.leaves[:-1], case.x[:0]], case.grad[:0])
    try:
        y = empty.apply()
        result = empty.vjp()
    except Exception as error:
        if not len(case.x):
            raise
        raise GradientMismatch(f"a batch of 0 should work, and raises {error!r}") from error
    _expect_like("apply", "y of a batch of 0", y, (0, *case.grad.shape[1:]), case.x)
    gradients = _check_gradients(empty, "vjp of a batch of 0", result)
    for name, gradient in zip(empty.names[:-1], gradients, strict=False):
        if gradient.numel() and not bool((gradient == 0).all()):
            raise GradientMismatch(
                f"the gradient for {name} of a batch of 0 should be 0, got {gradient.flatten()[0]}"
            )


# --- Comparing


def _pair(who: str, names: str, result: Any) -> tuple[Any, Any]:
    if not (isinstance(result, tuple) and len(result) == 2):
        raise GradientMismatch(f"{who}: expected a pair {names}, got {_kind(result)}")
    return result


def _expect_repeated(case: Case, who: str, call: Callable[[], Leaves], first: Leaves) -> None:
    """Raise GradientMismatch unless `call` returns `first` again, bit for bit."""
    names = [f"gradient for {name}" for name in case.names] if who == "bwd" else ["y"]
    for name, a, b in zip(names, pure(case, who, call), first, strict=True):
        # Devices other than the CPU may add in another order each time.
        if b.device.type == "cpu" and not same(a, b):
            raise GradientMismatch(f"{who}: called twice, gives two different answers for {name}")


def _expect_like(
    who: str, name: str, result: Any, shape: Sequence[int] | None, like: Tensor
) -> None:
    """Raise GradientMismatch unless a result has this shape and `like`'s dtype and device."""
    if not isinstance(result, Tensor):
        raise GradientMismatch(f"{who}: expected {name} to be a tensor, got {_kind(result)}")
    if shape is not None and tuple(result.shape) != tuple(shape):
        by = ", as out_shape says" if (who, name) == ("fwd", "y") else ""
        raise GradientMismatch(
            f"{who}: expected {name} of shape {tuple(shape)}{by}, got {tuple(result.shape)}"
        )
    if (result.dtype, result.device) != (like.dtype, like.device):
        raise GradientMismatch(
            f"{who}: expected {name} to be {like.dtype} on {like.device}, "
            f"got {result.dtype} on {result.device}"
        )


def _expect_close(
    case: Case, complaint: str, got: Leaves, want: Leaves, of_value: bool = False
) -> None:
    """Raise GradientMismatch where a difference is more than rounding explains."""
    if all(map(same, got, want)):
        return
    double, dtype = case.double(), case.x.dtype
    epsilon = torch.finfo(dtype).eps
    names = [""] if of_value else [f" for {name}" for name in case.names]
    for trials in (1, TRIALS):  # rounding may carry an entry across a kink: more trials show that
        if of_value:
            moves = [value_moves(double, epsilon, trials)]
        else:
            moves = gradient_moves(double, epsilon, trials)
        for name, a, b, move in zip(names, got, want, moves, strict=False):
            a, b = a.double(), b.double()
            allowed = allowance(move, dtype).to(b) + SAME_DTYPE * epsilon * b.abs()
            index = worst(excess(a, b, allowed).masked_fill(a.isnan() != b.isnan(), math.inf))
            if index is not None:
                place = f"{name}, at {list(index)}: {float(a[index]):.9g} and {float(b[index]):.9g}"
                break
        else:
            return
    raise GradientMismatch(complaint + place)


def _named(name: str, tree: Any) -> dict[str, Any]:
    names = (accessor.codify(name) for accessor in optree.tree_accessors(tree))
    return dict(zip(names, optree.tree_leaves(tree), strict=True))


def _other(leaf: Tensor) -> Tensor:
    """Change the numbers but not their signs, so that the layer is likely defined there too."""
    if not leaf.is_floating_point():
        return leaf
    return leaf * (1 + signed(leaf.shape, 5).clamp(-3, 3).to(leaf) / 16)


def _copied(layer: Any) -> Any:
    try:
        return copy.deepcopy(layer)
    except Exception:  # a layer need not support copies
        return None


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return "None" if value is None else type(value).__name__
