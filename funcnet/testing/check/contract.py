"""The contract of a layer besides its numbers: purity, shapes, dtypes, layouts, no hidden state.

Each check is a function of a case that raises `GradientMismatch`, in the dtype of the case. Results
of one computation made twice must have equal bits. Results of two computations that should agree
may differ by what rounding in that dtype can do.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.keys import fold_in
from funcnet.keys import key as make_key
from funcnet.layer import Layer
from funcnet.ops.need import Need
from funcnet.running import works_in_place
from funcnet.testing.check.case import (
    Case,
    Leaves,
    LossCase,
    kind_of,
    leaves_like,
    named_leaves,
    of_other_examples,
    other_numbers,
    tried,
    tried_y,
    unlike,
)
from funcnet.testing.check.comparison import excess, worst
from funcnet.testing.check.oracles import autograd_gradients
from funcnet.testing.check.precision import coarsest, computed_in
from funcnet.testing.check.purity import (
    expect_not_expanded,
    expect_own,
    expect_unshared,
    pure,
    under_two_seeds,
)
from funcnet.testing.check.rounding import Results, allowance, is_extreme, moves, noise_in
from funcnet.testing.check.tolerances import OVERFLOW, SAME_DTYPE, UNDECIDED
from funcnet.testing.errors import GradientMismatch, noted
from funcnet.testing.layouts import LAYOUTS, fits, laid_out, other_layouts, row_major, same

_REFUSED = "check_vjp: {} the result to this exception"


def check_calls(case: Case) -> Leaves:
    """Raise GradientMismatch unless fwd, bwd, apply and vjp are pure, agree and fit the inputs.

    Returns y and the gradients, by apply and vjp.
    """
    pristine = tried(partial(copy.deepcopy, case.layer))  # a layer need not support copies
    y, residuals = _check_fwd(case)
    gradients = _check_bwd(case, y, residuals)
    _check_fresh(case)
    found = _check_vjp_and_apply(case, y, gradients)
    _check_recording(case)
    if not case.is_loss:
        _check_need(case, residuals, gradients)
    _check_no_state(case, pristine, gradients)
    check_written_over(case, "params or x")
    return found


def check_surroundings(case: Case) -> None:
    """Raise GradientMismatch if memory layouts, global randomness or an empty batch matter."""
    _, residuals = case.fwd()
    gradients = case.flat(case.bwd(residuals))
    _check_layouts_of_grad(case, residuals, gradients)
    _check_layouts_of_inputs(case)
    _check_in_place(case, gradients)
    if isinstance(case, LossCase):
        _check_integers(case)
        got = case.layer.bwd(residuals, float(case.grad))
        expect_close(case, "a grad that is a float changes the gradient", [got], gradients)
    elif case.batch is not None:
        _check_init(case)
        if not getattr(case.layer, "couples_examples", False):
            _check_empty_batch(case)
        _check_vmap(case)


def _check_fwd(case: Case) -> tuple[Tensor, Any]:
    y, residuals = _pair("fwd", "(y, residuals)", pure(case, "fwd", case.fwd))
    _expect_like("fwd", "y", y, _expected_shape(case), case.grad)
    expect_unshared("y", y, case.inputs)
    _expect_repeated(case, "fwd", lambda: [case.fwd()[0]], [y])
    if case.grad.shape != y.shape:
        raise ValueError(
            f"check_vjp: expected grad of y's shape, {tuple(y.shape)}, got {tuple(case.grad.shape)}"
        )
    return y, residuals


def _check_bwd(case: Case, y: Tensor, residuals: Any) -> Leaves:
    kept = {"y": y, "grad": case.grad, **named_leaves(residuals=residuals)}
    result = pure(case, "bwd", lambda: case.bwd(residuals), kept)
    gradients = _check_gradients(case, "bwd", result)
    expect_own(case, gradients)
    _expect_repeated(case, "bwd", lambda: case.flat(case.bwd(residuals)), gradients)
    return gradients


def _check_gradients(case: Case, who: str, result: Any, without: str = "") -> Leaves:
    """The gradients that were asked for. `without` names the argument of bwd that was False."""
    dparams, dx = _pair(who, "(dparams, dx)", result)
    gradients: Leaves = []
    for what, of, tree, found, need in (
        ("dparams", "params", case.params, dparams, "param_grad"),
        ("dx", "x", case.x, dx, "input_grad"),
    ):
        if need != without:
            gradients += _checked_tree(who, what, of, tree, found)
        elif found is not None:
            raise GradientMismatch(
                f"{who}: expected {what} to be None with {need}=False, got {kind_of(found)}"
            )
    return gradients


def _checked_tree(who: str, what: str, of: str, tree: Any, found: Any) -> Leaves:
    """The leaves of dparams or dx, which fit those of params or x."""
    gradients = tried(partial(leaves_like, tree, found))
    if gradients is None:
        expected = optree.tree_structure(tree)
        got = kind_of(found) if found is None else optree.tree_structure(found)
        raise GradientMismatch(
            f"{who}: expected {what} with the tree of {of}, {expected}, got {got}"
        )
    for (name, leaf), gradient in zip(named_leaves(**{of: tree}).items(), gradients, strict=True):
        label = "dx" if name == "x" else f"the gradient for {name}"
        if leaf.is_floating_point():
            _expect_like(who, label, gradient, leaf.shape, leaf)
        elif not isinstance(gradient, Tensor) or gradient.shape != leaf.shape or gradient.any():
            raise GradientMismatch(
                f"{who}: expected {label} to be None, as {leaf.dtype} has no gradient"
            )
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
    _expect_like("apply", "y", value, y.shape, case.grad)
    expect_unshared("y of apply", value, case.inputs)
    expect_close(case, "apply and fwd differ in y", [value], [y], of=Case.value)
    _expect_repeated(case, "apply", lambda: [case.apply()], [value])
    result = _check_gradients(case, "vjp", pure(case, "vjp", case.vjp))
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
    """A leaf that requires a gradient, if it can have one."""
    return leaf.detach().requires_grad_() if leaf.is_floating_point() else leaf


def _check_need(case: Case, residuals: Any, gradients: Leaves) -> None:
    """Ask bwd and vjp for one of the two gradients."""
    of_params, of_x = gradients[: case.first_of_x], gradients[case.first_of_x :]
    for who, method, call in (
        ("bwd", case.layer.bwd, partial(case.bwd, residuals)),
        ("vjp", case.layer.vjp, case.vjp),
    ):
        for need in ("input_grad", "param_grad") if _takes_param_grad(method) else ("input_grad",):
            result = pure(case, who, partial(call, **{need: False}))
            got = _check_gradients(case, who, result, without=need)
            whole = [*got, *of_x] if need == "input_grad" else [*of_params, *got]
            expect_close(case, f"{who}: {need}=False changes the gradient", whole, gradients)


def _takes_param_grad(method: Callable[..., Any]) -> bool:
    parameters = inspect.signature(method).parameters.values()
    return any(p.name == "param_grad" or p.kind is p.VAR_KEYWORD for p in parameters)


def _check_no_state(case: Case, pristine: Any, gradients: Leaves) -> None:
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


def _check_fresh(case: Case) -> None:
    """Hold a layer that declares `_fresh` to it: whatever follows may write over its y and dx."""
    if not getattr(case.layer, "_fresh", False):
        return
    y, residuals = case.fwd()
    dparams, dx = case.bwd(residuals)
    kept, why = named_leaves(residuals=residuals), f" ({type(case.layer).__name__} declares _fresh)"
    expect_unshared("y of fwd", y, kept, why)
    expect_not_expanded("y of fwd", y, why)
    if dx is not None:
        expect_not_expanded("dx of bwd", dx, why)
        expect_unshared("dx of bwd", dx, {**kept, **named_leaves(dparams=dparams)}, why)


def _check_in_place(case: Case, gradients: Leaves) -> None:
    """Hold `_fwd_` and `_bwd_`, where a layer writes them, to `fwd` and `bwd`.

    A `Sequential` calls the first behind a layer that declares `_fresh`, the second before one: so
    either gets what only the layer beside has made, and the residuals of the other or of its twin.
    """
    if not (isinstance(case.layer, Layer) and works_in_place(case.layer)):
        return
    if not (isinstance(case.x, Tensor) and case.x.is_floating_point()):
        return
    layer: Any = case.layer
    params, key, need = case.params, case.key, Need()

    def run() -> tuple[list[Tensor], list[tuple[str, Any]]]:
        y, kept = layer._fwd(params, case.x, key)
        y_, kept_ = layer._fwd_(params, case.x.clone(), key)
        values = [y.clone(), y_.clone()]  # which the residuals may hold
        return values, [
            ("_bwd_ and bwd", layer._bwd_(params, kept, case.grad.clone(), need)),
            ("_fwd_ with bwd and fwd with bwd", layer._bwd(params, kept_, case.grad, need)),
            ("_fwd_ with _bwd_ and fwd with bwd",
             layer._bwd_(params, kept_, case.grad.clone(), need)),
            ("called twice, _bwd_ and bwd", layer._bwd_(params, kept_, case.grad.clone(), need)),
        ]  # fmt: skip

    with noted("check_vjp: raised by _fwd_ or _bwd_, which a Sequential calls to work in place"):
        (y, y_), found = pure(case, "_fwd_ or _bwd_", run)
    expect_close(case, "_fwd_ and fwd differ in y", [y_], [y], of=Case.value)
    for who, result in found:
        expect_close(case, f"{who} differ", case.flat(result), gradients)


def _check_layouts_of_grad(case: Case, residuals: Any, gradients: Leaves) -> None:
    for name, grad in other_layouts(case.grad):
        there = replace(case, grad=grad)
        straight = replace(case, grad=row_major(grad))
        complaint = f"grad in the memory layout {name!r} changes"
        with noted(_REFUSED.format(complaint)):
            got = there.flat(pure(there, "bwd", partial(there.bwd, residuals)))
        expect_own(there, got)
        _check_fresh(there)
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
    there = case.with_leaves(partial(laid_out, layout="strided"))
    _expect_the_same(there, case, "params that are not contiguous change")
    if isinstance(case, LossCase):
        for layout in LAYOUTS[1:-1]:  # the same numbers, if the tensor has enough axes
            there = case.with_target(partial(_laid_out, layout=layout))
            _expect_the_same(there, case, "a target that is not contiguous changes")


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
    _check_fresh(there)
    want = straight.gradients()
    expect_close(straight, f"{complaint} the gradient", got, want, elsewhere=elsewhere)


def _check_init(case: Case) -> None:
    if not isinstance(case.x, Tensor):
        return  # a layer of several tensors may take their shapes in its own way
    key = make_key(0) if case.key is None else fold_in(case.key, 0)
    shape = tuple(case.x.shape[1:])
    drawn = under_two_seeds(case, "init", lambda: case.layer.init(key, shape))
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
        y = empty.apply()
        result = empty.vjp()
    except Exception as error:
        if not case.batch:
            raise
        raise GradientMismatch(f"a batch of 0 should work, and raises {error!r}") from error
    _expect_like("apply", "y of a batch of 0", y, (0, *case.grad.shape[1:]), case.grad)
    gradients = _check_gradients(empty, "vjp of a batch of 0", result)
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
    _expect_like("apply under torch.func.vmap", "y", y, (2, *one.shape), one)
    if not is_extreme(case):
        expect_close(case, "torch.func.vmap changes y", [y[1]], [one], of=Case.value)


def _refuses_some(case: Case) -> bool:
    """Whether there are numbers at which the layer raises."""

    def times(leaf: Tensor, factor: float) -> Tensor:
        return factor * leaf if leaf.is_floating_point() else leaf

    beside = (case.with_leaves(partial(times, factor=f)) for f in (-1.0, 1e3, math.nan))
    return any(tried(there.apply) is None for there in beside)


# --- Comparing


def _pair(who: str, names: str, result: Any) -> tuple[Any, Any]:
    if not (isinstance(result, tuple) and len(result) == 2):
        raise GradientMismatch(f"{who}: expected a pair {names}, got {kind_of(result)}")
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
        raise GradientMismatch(f"{who}: expected {name} to be a tensor, got {kind_of(result)}")
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


def expect_close(
    case: Case,
    complaint: str,
    got: Leaves,
    want: Leaves,
    of: Results = Case.gradients,
    elsewhere: bool = False,
) -> None:
    """Raise GradientMismatch where a difference is more than rounding explains.

    Entries that are not finite on both sides are left out. So are those that are not on one, if
    `elsewhere` says that nobody gave these numbers, and if the result is undefined there.
    """
    if all(map(same, got, want)):
        return
    names = [""] if of is Case.value else [f" for {name}" for name in case.names]
    double, extreme = case.double(), is_extreme(case)
    exact = tried_y(double)
    if exact is None:
        double = case  # a kernel may refuse float64
    if elsewhere and not all(leaf.isfinite().all() for leaf in (*got, *want)):
        undefined = _undefined(double, of)
        got, want = _masked(got, undefined), _masked(want, undefined)

    def first_apart(noise: Leaves, dtype: torch.dtype) -> str | None:
        for name, a, b, move in zip(names, got, want, noise, strict=False):
            index = _furthest_apart(a.double(), b.double(), move, dtype, extreme)
            if index is not None:
                return f"{name}, at {list(index)}: {float(a[index]):.9g} and {float(b[index]):.9g}"
        return None

    def is_rounding_in(dtype: torch.dtype) -> bool:
        eps = torch.finfo(dtype).eps
        return first_apart(moves(double, eps, 1, of), dtype) is None

    if is_rounding_in(case.dtype):
        return
    dtype = case.dtype if exact is None else coarsest((case.dtype, computed_in(double, exact)))
    if dtype != case.dtype and is_rounding_in(dtype):
        return
    # Rounding may carry an entry across a kink, or be all of it in a tail: more trials show that.
    place = first_apart(noise_in(case, double, of), dtype)
    if place is not None:
        raise GradientMismatch(complaint + place)


def _furthest_apart(
    a: Tensor, b: Tensor, move: Tensor, dtype: torch.dtype, extreme: bool
) -> tuple[int, ...] | None:
    """The index where results in a dtype differ most; None if rounding explains every difference.

    `extreme` says that one computation may overflow on its way where another does not.
    """
    info = torch.finfo(dtype)
    allowed = allowance(move, dtype).to(b) + SAME_DTYPE[dtype] * info.eps * b.abs()
    off = excess(a, b, allowed).masked_fill(a.isnan() != b.isnan(), math.inf)
    off.masked_fill_(~(a.isfinite() | b.isfinite()), 0.0)
    if extreme:
        limit = OVERFLOW * info.max
        off.masked_fill_(~((a.abs() < limit) & (b.abs() < limit)), 0.0)
    return worst(off)


def _masked(leaves: Leaves, undefined: Leaves) -> Leaves:
    return [leaf.masked_fill(u, math.nan) for leaf, u in zip(leaves, undefined, strict=True)]


def _undefined(case: Case, of: Results) -> Leaves:
    """A mask for y, or for each gradient: True where rounding decides what it is.

    A smaller nudge moves what is smooth less. It moves (x − m)/s of equal numbers, whose mean may
    be rounded, by as much: from 0/0 to 1 or −1.
    """
    epsilon = torch.finfo(case.dtype).eps
    fine, coarse = (moves(case, step, 3, of) for step in (epsilon, math.sqrt(epsilon)))
    return [
        ~result.isfinite() | (small > UNDECIDED * large)
        for result, small, large in zip(of(case), fine, coarse, strict=True)
    ]
