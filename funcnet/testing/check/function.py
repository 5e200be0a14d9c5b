"""`check_function`: the gradient of anybody's function, with nothing of funcnet in it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from funcnet.checks import shown
from funcnet.testing.check.agreement import expect_close
from funcnet.testing.check.beside import moved
from funcnet.testing.check.case import (
    Case,
    Leaves,
    other_mask,
    other_numbers,
    tried,
    tried_y,
    unlike,
)
from funcnet.testing.check.casts import coarsest, computed_in
from funcnet.testing.check.compared import Compared
from funcnet.testing.check.comparison import Errors, excess, within, worst
from funcnet.testing.check.function_case import (
    FunctionCase,
    call_with,
    joined,
    make_case,
    name_of,
    within_module,
)
from funcnet.testing.check.laws import check_linear_in_grad
from funcnet.testing.check.own_dtype import check_own_dtype
from funcnet.testing.check.precision import check_factor, check_factors_of_value, check_precision
from funcnet.testing.check.purity import pure, put_back
from funcnet.testing.check.report import expect_right
from funcnet.testing.check.rounding import (
    TRIALS,
    gradient_moves,
    gradient_noise,
    noise_in,
    noise_on_the_way,
    value_noise,
)
from funcnet.testing.check.search import Limits, find_wrong
from funcnet.testing.check.state import check_written_over, unchanged
from funcnet.testing.check.tolerances import FROM_REFERENCE
from funcnet.testing.check.vjp import check_limits, expect_resolved, expect_something
from funcnet.testing.errors import GradientMismatch, noted
from funcnet.testing.layouts import other_layouts, row_major, same

_FEW_INPUTS, _SEVERAL_INPUTS = 4, 8


def check_function(
    function: Any,
    *inputs: Any,
    reference: Callable[..., Any] | None = None,
    grad: Any = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    budget: float | None = None,
) -> None:
    """Check the gradient that autograd gets from a function: an autograd.Function, a kernel.

    `function` is a `torch.autograd.Function` class, of the old style or with `setup_context`, an
    `nn.Module`, whose parameters are checked with its inputs, or any callable of tensors. Every
    floating-point tensor among `inputs`, which may be trees, is one to differentiate by; all else
    is handed on as it is. It returns a tensor or a tree of them; outputs of integers, and those
    that are marked as non-differentiable, have no gradient. `grad` is the gradient of the outputs,
    drawn if not given.

    - No call writes to its inputs or to the gradient; the same call twice gives the same bits,
      whatever is called in between: no state is kept outside ctx, or in a module. A second backward
      pass over one graph is as right as the first. A hook's change of a gradient counts.
    - A single input that requires a gradient gets the same one as among others
      (`needs_input_grad`). So do all combinations of up to four inputs; of up to eight, two, or
      all but one. A single output that is used gives its part (`materialize_grads`).
    - Inputs and gradients in any memory layout give the same numbers.
    - In float64, central differences; autograd of `reference`, a function of the same inputs, if
      there is one; linearity in grad. Results in the dtype of the inputs are compared with
      float64's; one that depends smoothly on the dtype is excused, unless `reference` says what it
      is.
    - A function that refuses float64, or computes it in another dtype, is compared with
      `reference` in float64. There a factor of 1.05 on all entries shows even in bfloat16, whose ε
      is 2⁻⁷. Without a reference it is compared with differences in its own dtype, which are
      coarse.

    `rtol`, `atol` and `budget` are as in `check_vjp`. Raises GradientMismatch; TypeError without a
    floating-point tensor among the inputs and parameters, and for complex and sparse ones;
    ValueError if no gradient could be refuted; and every exception of the function, unchanged but
    for a note that names the memory layout, or what alone is used, if others raised none.

    >>> class Square(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x):
    ...         ctx.save_for_backward(x)
    ...         return x * x
    ...
    ...     @staticmethod
    ...     def backward(ctx, grad):
    ...         (x,) = ctx.saved_tensors
    ...         return 2 * x * grad
    >>> check_function(Square, torch.tensor([1.0, -3.0]))
    >>> check_function(torch.nn.Linear(3, 2), torch.ones(4, 3))
    """
    check_limits("check_function", rtol, atol, budget)
    if not callable(function):
        is_layer = hasattr(function, "fwd") and hasattr(function, "bwd")
        other = "; check_vjp checks layers and losses" if is_layer else ""
        raise TypeError(f"check_function: expected a function, got {shown(function)}{other}")
    name = name_of(function)
    case = make_case(function, inputs, reference, grad)
    try:
        with put_back(case):
            _examine(case, Limits(rtol, atol, budget))
    except GradientMismatch as mismatch:
        sizes = ", ".join(f"{leaf} {tuple(x.shape)}" for leaf, x in case.inputs.items())
        mismatch.args = (f"{name}: {mismatch.args[0]}\n  of              {sizes}; {case.dtype}",)
        mismatch.layer, mismatch.params, mismatch.x = function, case.params, inputs
        mismatch.grad = case.grad
        raise


def _examine(case: FunctionCase, limits: Limits) -> None:
    y, gradients = _check_calls(case)
    with unchanged(case, [y, *gradients]):
        _examine_further(case, gradients, limits)


def _examine_further(case: FunctionCase, gradients: Leaves, limits: Limits) -> None:
    _check_no_state(case, gradients)
    _check_kept_by_module(case)
    _check_backward_again(case, gradients)
    check_written_over(case, "an input")
    _check_some_inputs(case, gradients)
    _check_each_output(case)
    _check_layouts_of_grads(case)
    _check_layouts_of_inputs(case, gradients)
    double = case.double()
    try:
        own = _computed_in(double)
    except Exception:  # a kernel may refuse a dtype by any exception
        own = coarsest(leaf.dtype for leaf in case.leaves if leaf.is_floating_point())
    if own != torch.float64:
        _check_in_own_dtype(case, own)
        return
    y = double.apply()
    expect_something("check_function", double, y)
    beside = moved(double)
    if case.by_reference is not None:
        with torch.no_grad():
            _expect_value(double, y)
            if tried(beside.reference) is not None:
                _expect_value(beside, beside.apply())
    expect_right(find_wrong(double, beside, limits, errors := Errors()))
    check_linear_in_grad(beside)
    if case.dtype != torch.float64:
        if case.by_reference is not None:
            check_factors_of_value(case, double, case.output_names, case.parts_of)
        check_precision(case, errors)
    without = "and there is no reference that autograd can follow"
    expect_resolved("check_function", errors, without)


def _computed_in(double: FunctionCase) -> torch.dtype:
    """The dtype that a function of float64 computes in: an output's, or what y's numbers show."""
    with torch.no_grad():
        dtypes = [y.dtype for y in double.outputs()]
    return coarsest([*dtypes, computed_in(double, double.apply())])


def _check_calls(case: FunctionCase) -> tuple[Tensor, Leaves]:
    y = pure(case, "the function", case.apply)
    if not same(pure(case, "the function", case.apply), y):
        raise GradientMismatch("called twice, the function gives two different answers")
    grads = case.grads
    named = {f"the gradient of output {i}": g for i, g in zip(case.chosen, grads, strict=True)}
    gradients = pure(case, "the backward pass", partial(case.gradients_by, grads), named)
    if not all(map(same, case.gradients_by(grads), gradients)):
        raise GradientMismatch("called twice, the backward pass gives two different answers")
    return y, gradients


def _check_no_state(case: FunctionCase, gradients: Leaves) -> None:
    """Run the forward pass at other inputs before the backward pass, as a network does.

    They come before the forward pass, too, so that neither the last nor the first state serves.
    """

    def run_beside() -> None:
        for there in (case, case.with_leaves(other_mask)):
            for change in (other_numbers, unlike):
                tried(there.with_leaves(change).run_forward)

    run_beside()
    backward = case.run_forward()
    run_beside()
    complaint = "the backward pass depends on forward passes other than its own: state is kept"
    try:
        found = backward(case.grads)
    except Exception as error:
        raise GradientMismatch(f"{complaint} outside ctx ({error!r})") from error
    if not all(map(same, found, gradients)):
        raise GradientMismatch(f"{complaint} outside ctx")


def _check_kept_by_module(case: FunctionCase) -> None:
    """Hold a module to a copy that nobody has called, and to itself when it keeps its buffers.

    It may remember what it was called with first, or count its calls.
    """
    if not isinstance(case.function, nn.Module):
        return

    def kept(params: Any, x: Any) -> Any:
        return case.function(*case.arguments(x))

    def expect(there: FunctionCase, got: Tensor | None, want: Tensor | None) -> None:
        if got is not None and want is not None:
            complaint = "y depends on earlier calls: the module keeps state"
            expect_close(there, complaint, [got], [want], of=Case.value)

    if case.pristine is not None:
        others = case.with_leaves(other_numbers)
        by_copy = replace(others, layer=partial(call_with, case.pristine, case.arguments))
        expect(others, tried_y(others), tried_y(by_copy))
    turns = (case, case.with_x(other_numbers), case, case)
    found = within_module(
        case.function, case.params, case.x,
        lambda: [tried_y(replace(there, layer=kept)) for there in turns],
    )  # fmt: skip
    for there, y in zip(turns, found, strict=True):
        expect(there, y, tried_y(there))


def _check_backward_again(case: FunctionCase, gradients: Leaves) -> None:
    """Run the backward pass over one graph again, after one with another grad, as a Jacobian does.

    What it kept of the forward pass must outlive it, and what it found must not.
    """
    backward = case.run_forward()
    try:
        backward([unlike(grad) for grad in case.grads], retain=True)
    except GradientMismatch:
        raise
    except Exception:  # code that is compiled may refuse to retain a graph, and says so
        return
    complaint = "a second backward pass over one graph (retain_graph=True)"
    try:
        again = backward(case.grads)
    except Exception as error:
        raise GradientMismatch(f"{complaint} raises {error!r}") from error
    if not all(map(same, again, gradients)):
        raise GradientMismatch(
            f"{complaint} gives another gradient: the first one writes to what the forward pass "
            "has kept for it, or leaves something behind"
        )


def _check_some_inputs(case: FunctionCase, gradients: Leaves) -> None:
    """Ask for the gradients of some inputs alone."""
    for some in _parts_of_inputs(case):
        names = " and ".join(case.names[i] for i in some)
        require = "requires a gradient" if len(some) == 1 else "require gradients"
        with noted(f"check_function: raised where {names} alone {require}"):
            alone = case.gradients_by(case.grads, some)
        one = f"{require}, it gets" if len(some) == 1 else f"{require}, they get"
        want = [g if i in some else torch.zeros_like(g) for i, g in enumerate(gradients)]
        expect_close(case, f"where {names} alone {one} another one", alone, want)


def _check_each_output(case: FunctionCase) -> None:
    """Use one output alone: grads of zeros for the others give the same gradient."""
    if len(case.chosen) < 2:
        return
    for i, name in enumerate(case.output_names):
        only = [grad if j == i else None for j, grad in enumerate(case.grads)]
        zeros = [grad if j == i else torch.zeros_like(grad) for j, grad in enumerate(case.grads)]
        there = replace(case, grad=joined(zeros))
        where = f"where {name} alone is used"
        with noted(f"check_function: raised {where}, and the grad of the others is None"):
            got = case.gradients_by(only)
        expect_close(there, f"{where}, the gradient is another one", got, case.gradients_by(zeros))


def _parts_of_inputs(case: FunctionCase) -> Iterator[tuple[int, ...]]:
    """Some inputs among those with a gradient: each, and some of them together if they are few."""
    floats = [i for i, leaf in enumerate(case.leaves) if leaf.is_floating_point()]
    counts = [*range(1, len(floats))]
    if len(floats) > _FEW_INPUTS:
        counts = [1, 2, len(floats) - 1] if len(floats) <= _SEVERAL_INPUTS else [1]
    for count in counts:
        yield from itertools.combinations(floats, count)


def _check_layouts_of_grads(case: FunctionCase) -> None:
    grads = case.grads
    for i, grad in enumerate(grads):
        for name, laid in other_layouts(grad):
            straight = [*grads[:i], row_major(laid), *grads[i + 1 :]]
            where = f"a gradient in the memory layout {name!r}"
            want = case.gradients_by(straight)
            with noted(f"check_function: raised by {where}"):
                got = case.gradients_by([*grads[:i], laid, *grads[i + 1 :]])
            there = replace(case, grad=joined(straight))
            expect_close(there, f"{where} changes the gradient", got, want)


def _check_layouts_of_inputs(case: FunctionCase, gradients: Leaves) -> None:
    leaves = case.leaves
    for i in range(case.first_of_x, len(leaves)):
        for name, x in other_layouts(leaves[i]):
            if not same(x, leaves[i]):
                continue  # an expanded tensor has other numbers
            there = case.with_leaf(i, x)
            where = f"{case.names[i]} in the memory layout {name!r}"
            with noted(f"check_function: raised by {where}"):
                y, got = there.apply(), there.gradients()
            expect_close(case, f"{where} changes the result", [y], case.value(), Case.value)
            expect_close(case, f"{where} changes the gradient", got, gradients)


def _check_in_own_dtype(case: FunctionCase, dtype: torch.dtype) -> None:
    """Check a function that computes in another dtype than float64."""
    expect_something("check_function", case, case.apply())
    if torch.finfo(dtype).eps < torch.finfo(case.dtype).eps:  # it computes in float32 inside
        _check_in_own_dtype(case.to(dtype), dtype)
        check_precision(case, Errors())
    elif case.by_reference is None:
        check_own_dtype(case, dtype)
    else:
        _check_against_reference(case, case.by_reference, dtype)


def _check_against_reference(
    case: FunctionCase, by_reference: Callable[[Any, Any], Any], dtype: torch.dtype
) -> None:
    """Hold what a function computes in a dtype to its reference in float64."""

    def exactly(there: Case) -> Case:
        return replace(there, layer=by_reference).double()

    exact = exactly(case)
    epsilon = torch.finfo(dtype).eps
    with torch.no_grad():
        want = exact.reference()
    result = Compared(case.apply(), want, value_noise(exact, epsilon, TRIALS), dtype)
    result.expect_exact("the result")
    check_factors_of_value(case, exact, case.output_names, case.parts_of)
    noise = gradient_noise(exact, epsilon)
    found = zip(case.gradients(), exact.gradients(), noise, strict=True)
    leaves = [Compared(*leaf, dtype) for leaf in found]
    for name, leaf in zip(case.names, leaves, strict=True):
        leaf.expect_exact(f"the gradient for {name}")
    if not any(leaf.is_suspicious for leaf in leaves):
        return
    moves = gradient_moves(exact, epsilon, TRIALS)  # tails would hide most of a factor
    own = noise_on_the_way(case, epsilon, Case.gradients)
    for i, (leaf, move, on_the_way) in enumerate(zip(leaves, moves, own, strict=True)):
        blurred = replace(leaf, move=torch.maximum(move, on_the_way.to(move)))
        check_factor(case, i, blurred, exactly)


def _expect_value(case: Case, y: Tensor) -> None:
    reference, epsilon = case.reference(), torch.finfo(y.dtype).eps
    if within(y, reference, FROM_REFERENCE * value_noise(case, epsilon)):
        return
    # Terms that cancel, in either of the two, leave more.
    (noise,) = noise_in(case, case, Case.value)
    (theirs,) = noise_on_the_way(case, epsilon, lambda there: [there.reference()])
    index = worst(excess(y, reference, FROM_REFERENCE * torch.maximum(noise, theirs)))
    if index is not None:
        raise GradientMismatch(
            f"the result is not that of the reference: entry {index[0]} of all outputs is "
            f"{float(y[index]):.9g}, and {float(reference[index]):.9g} there"
        )
