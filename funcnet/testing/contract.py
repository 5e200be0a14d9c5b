"""What a layer promises besides its numbers: purity, shapes, dtypes, layouts, no hidden state.

Each check is a function of a case that raises `GradientMismatch`, in the dtype that came. Results
of what should be the same computation are compared bit for bit where they must be, and otherwise to
what rounding in that dtype can do.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor

from funcnet.keys import fold_in
from funcnet.keys import key as make_key
from funcnet.testing.case import Case, Leaves, flat, signed
from funcnet.testing.errors import GradientMismatch
from funcnet.testing.layouts import layouts, row_major, same, strided
from funcnet.testing.purity import (
    expect_own,
    expect_states,
    expect_unshared,
    pure,
    random_states,
    restore_random_states,
    seed_torch,
)
from funcnet.testing.rounding import TRIALS, allowance, gradient_moves, value_moves


def check_calls(case: Case) -> None:
    """That fwd, bwd, apply and vjp are pure, agree, and return what they should."""
    pristine = _copied(case.layer)
    y, residuals = _check_fwd(case)
    gradients = _check_bwd(case, y, residuals)
    _check_vjp_and_apply(case, y, gradients)
    _check_no_input_grad(case, residuals, gradients)
    _check_no_state(case, pristine, gradients)


def check_surroundings(case: Case) -> None:
    """That memory layouts do not matter, nor an empty batch, nor global randomness to `init`."""
    y, residuals = case.fwd()
    gradients = flat(case.bwd(residuals))
    _check_layouts(case, residuals, y, gradients)
    if case.is_loss:
        _check_float_grad(case, residuals, gradients)
    else:
        _check_init(case)
        _check_empty_batch(case)


def _check_fwd(case: Case) -> tuple[Tensor, Any]:
    result = pure(case, "fwd", case.fwd)
    if not (isinstance(result, tuple) and len(result) == 2):
        raise GradientMismatch(f"fwd: expected a pair (y, residuals), got {_kind(result)}")
    y, residuals = result
    _expect_like(case, "y", y, case.out_shape() if case.is_loss or case.x.ndim else None)
    expect_unshared(case, "y", y)
    again, _ = pure(case, "fwd", case.fwd)
    _expect_repeated("fwd", [("y", again, y)])
    if case.grad.shape != y.shape:
        raise ValueError(
            f"check_vjp: expected grad of shape {tuple(y.shape)}, that of y, "
            f"got {tuple(case.grad.shape)}"
        )
    return y, residuals


def _check_bwd(case: Case, y: Tensor, residuals: Any) -> Leaves:
    kept = {"y": y, "grad": case.grad}
    kept |= {f"residuals {i}": x for i, x in enumerate(_tensors(residuals))}
    result = pure(case, "bwd", lambda: case.bwd(residuals), kept)
    gradients = _check_gradients(case, "bwd", result)
    expect_own(case, gradients)
    again = flat(pure(case, "bwd", lambda: case.bwd(residuals)))
    _expect_repeated("bwd", zip(case.names, again, gradients, strict=True))
    return gradients


def _check_gradients(case: Case, who: str, result: Any, input_grad: bool = True) -> Leaves:
    if not (isinstance(result, tuple) and len(result) == 2):
        raise GradientMismatch(f"{who}: expected a pair (dparams, dx), got {_kind(result)}")
    dparams, dx = result
    expected, got = optree.tree_structure(case.params), optree.tree_structure(dparams)
    if expected != got:
        raise GradientMismatch(
            f"{who}: expected dparams with the tree of params, {expected}, got {got}"
        )
    gradients = [*optree.tree_leaves(dparams), *([dx] if input_grad else [])]
    for name, leaf, gradient in zip(case.names, case.leaves, gradients, strict=False):
        label = "dx" if name == "x" else f"the gradient for {name}"
        _expect_like(case, label, gradient, tuple(leaf.shape), leaf, who)
    if not input_grad and dx is not None:
        raise GradientMismatch(
            f"{who}: expected dx to be None with input_grad=False, got {_kind(dx)}"
        )
    return gradients


def _check_vjp_and_apply(case: Case, y: Tensor, gradients: Leaves) -> None:
    value = pure(case, "apply", case.apply)
    _expect_like(case, "y", value, tuple(y.shape), who="apply")
    expect_unshared(case, "y of apply", value)
    _expect_close(case, "apply and fwd differ in y", [value], [y], of_value=True)
    again = pure(case, "apply", case.apply)
    _expect_repeated("apply", [("y", again, value)])
    result = _check_gradients(case, "vjp", pure(case, "vjp", case.vjp))
    _expect_close(case, "vjp and fwd + bwd differ", result, gradients)


def _check_no_input_grad(case: Case, residuals: Any, gradients: Leaves) -> None:
    if case.is_loss:
        return
    for who, call in (
        ("bwd", lambda: case.bwd(residuals, input_grad=False)),
        ("vjp", lambda: case.vjp(input_grad=False)),
    ):
        result = _check_gradients(case, who, pure(case, who, call), input_grad=False)
        _expect_close(case, f"{who}: input_grad=False changes dparams", result, gradients[:-1])


def _check_no_state(case: Case, pristine: Any, gradients: Leaves) -> None:
    """Another fwd in between must not matter, nor which copy of the layer does bwd."""
    complaint = "bwd depends on what was called before it: state is kept between fwd and bwd"
    _, residuals = case.fwd()
    leaves = [_other(leaf) for leaf in case.leaves]
    other = case.at(leaves)
    other.bwd(other.fwd()[1])
    other.fwd()
    after = flat(case.bwd(residuals))
    if not all(map(same, after, gradients)):
        raise GradientMismatch(complaint)
    if pristine is None:
        return
    fresh = case.of(pristine)
    try:
        after = flat(fresh.bwd(residuals))
    except Exception as error:
        raise GradientMismatch(
            f"{complaint} (on a copy of the layer that has run no fwd, it raises {error!r})"
        ) from error
    if not all(map(same, after, gradients)):
        raise GradientMismatch(complaint)


def _check_layouts(case: Case, residuals: Any, y: Tensor, gradients: Leaves) -> None:
    for name, grad in layouts(case.grad):
        there = case.at(case.leaves, grad)
        straight = case.at(case.leaves, row_major(grad))
        got = flat(pure(there, "bwd", lambda there=there: there.bwd(residuals)))  # type: ignore[misc]
        expect_own(there, got)
        want = gradients if same(grad, case.grad) else flat(straight.bwd(residuals))
        _expect_close(straight, f"a grad that is {name} changes the gradient", got, want)
    for name, x in layouts(case.x):
        there = case.at([*case.leaves[:-1], x])
        straight = case if same(x, case.x) else case.at([*case.leaves[:-1], row_major(x)])
        if straight is case or _takes(straight):
            _expect_the_same(there, straight, f"an x that is {name} changes")
    there = case.at([strided(leaf) if leaf.ndim else leaf for leaf in case.leaves])
    _expect_the_same(there, case, "parameters that are not contiguous change")


def _expect_the_same(there: Case, straight: Case, complaint: str) -> None:
    """Of two cases that differ in layout only."""
    y = pure(there, "apply", there.apply)
    expect_unshared(there, "y", y)
    _expect_close(straight, f"{complaint} y", [y], [straight.apply()], of_value=True)
    got = flat(pure(there, "vjp", there.vjp))
    expect_own(there, got)
    _expect_close(straight, f"{complaint} the gradient", got, straight.gradients())


def _takes(case: Case) -> bool:
    """Whether the layer is defined at this x, which is none of the user's."""
    try:
        case.vjp()
    except Exception:  # whatever the layer refuses it with
        return False
    return True


def _check_init(case: Case) -> None:
    shape = tuple(case.x.shape[1:])
    if not case.x.ndim:
        return
    key = make_key(0) if case.key is None else fold_in(case.key, 0)
    states = random_states(case)
    try:
        found = []
        for seed in (1, 2):
            seed_torch(case, seed)
            np.random.seed(seed)
            random.seed(seed)
            before = random_states(case)
            found.append(optree.tree_leaves(case.layer.init(key, shape)))
            expect_states(case, "init", before)
    finally:
        restore_random_states(case, states)
    if len(found[0]) != len(found[1]) or not all(map(same, *found)):
        raise GradientMismatch(
            "init: the same key gives different parameters, as if drawn from global randomness"
        )


def _check_empty_batch(case: Case) -> None:
    if not case.x.ndim or case.key is not None:
        return
    empty = case.at([*case.leaves[:-1], case.x[:0]], case.grad[:0])
    try:
        y = empty.apply()
        result = empty.vjp()
    except Exception as error:
        if not len(case.x):
            raise
        raise GradientMismatch(f"a batch of 0 should work, and raises {error!r}") from error
    _expect_like(empty, "y of a batch of 0", y, (0, *case.grad.shape[1:]), who="apply")
    for name, gradient in zip(
        empty.names[:-1], _check_gradients(empty, "vjp of a batch of 0", result), strict=False
    ):
        if gradient.numel() and not bool((gradient == 0).all()):
            raise GradientMismatch(
                f"the gradient for {name} of a batch of 0 should be 0, got {gradient.flatten()[0]}"
            )


def _check_float_grad(case: Case, residuals: Any, gradients: Leaves) -> None:
    """The grad of a loss may be a plain number."""
    got = case.layer.bwd(residuals, float(case.grad))
    _expect_close(case, "a grad that is a float changes the gradient", [got], gradients)


# --- Comparing


def _expect_repeated(who: str, triples: Any) -> None:
    for name, again, first in triples:
        # Other devices may add in another order each time.
        if first.device.type == "cpu" and not same(again, first):
            what = name if name == "y" else f"gradient for {name}"
            raise GradientMismatch(f"{who}: called twice, gives two different answers for {what}")


def _expect_like(
    case: Case,
    name: str,
    result: Any,
    shape: tuple[int, ...] | None,
    like: Tensor | None = None,
    who: str = "fwd",
) -> None:
    like = case.x if like is None else like
    if not isinstance(result, Tensor):
        raise GradientMismatch(f"{who}: expected {name} to be a tensor, got {_kind(result)}")
    if shape is not None and tuple(result.shape) != tuple(shape):
        by = ", as out_shape says" if name == "y" and who == "fwd" else ""
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
    """Equal bits, or a difference that rounding explains."""
    if all(map(same, got, want)):
        return
    double, epsilon = case.double(), torch.finfo(case.x.dtype).eps
    place = None
    # Rounding may carry what lies at a kink across it: more trials see that.
    for trials in (1, TRIALS):
        moves = (
            [value_moves(double, epsilon, trials)]
            if of_value
            else gradient_moves(double, epsilon, trials)
        )
        place = _first_off(got, want, moves, case.x.dtype)
        if place is None:
            return
    assert place is not None
    leaf, index = place
    where = "" if of_value else f" for {case.names[leaf]}"
    pair = f"{float(got[leaf][index]):.9g} and {float(want[leaf][index]):.9g}"
    raise GradientMismatch(f"{complaint}{where}, at {list(index)}: {pair}")


def _first_off(
    got: Leaves, want: Leaves, moves: Leaves, dtype: torch.dtype
) -> tuple[int, tuple[int, ...]] | None:
    for i, (a, b, move) in enumerate(zip(got, want, moves, strict=False)):
        a, b = a.double(), b.double()
        allowed = allowance(move, dtype).to(b) + 64 * torch.finfo(dtype).eps * b.abs()
        alike = ((a - b).abs() <= allowed) | (a == b) | (a.isnan() & b.isnan())
        if not alike.all():
            return i, tuple((~alike).nonzero()[0].tolist())
    return None


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _other(leaf: Tensor) -> Tensor:
    """Other numbers of the same signs: where the layer is defined, it should be there, too."""
    if not leaf.is_floating_point():
        return leaf
    return leaf * (1 + signed(leaf.shape, 5).clamp(-3, 3).to(leaf) / 16)


def _copied(layer: Any) -> Any:
    try:
        return copy.deepcopy(layer)
    except Exception:  # not every object can be copied, and none has to be
        return None


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return "None" if value is None else type(value).__name__
