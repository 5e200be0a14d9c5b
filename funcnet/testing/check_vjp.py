"""The check of a hand-written gradient, from first to last."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.keys import Key
from funcnet.layer import Layer
from funcnet.losses import Loss
from funcnet.testing import diagnose
from funcnet.testing.case import Case, LossCase, make_case
from funcnet.testing.contract import check_calls, check_surroundings
from funcnet.testing.errors import GradientMismatch
from funcnet.testing.laws import not_linear_in_grad, not_sum_of_examples
from funcnet.testing.mathematics import Errors, Finding, find_wrong, moved
from funcnet.testing.replay import snippet
from funcnet.testing.working import find_inexact


def check_vjp(
    layer: Layer | Loss,
    params: Any,
    x: Any,
    *,
    grad: Tensor | float | None = None,
    key: Key | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
) -> None:
    """Hold the gradient of a layer, network or loss to its value, and both to the contract.

    `check_vjp(layer, params, x)` for layers, `check_vjp(loss, x, target)` for losses. `grad` is
    that of the result, drawn if not given; `key` goes to layers that draw numbers.

    - The contract: the tree of dparams, shapes, dtypes, devices; `apply` agrees with `fwd`, `vjp`
      with `bwd`; `input_grad=False`; `out_shape`; `init` blind to global randomness; nothing handed
      in is written to or shared with a result; no global random state is used; the same answer
      twice, bit for bit; no state between `fwd` and `bwd`; any memory layout; a batch of 0.
    - The mathematics, in float64: autograd of `apply`, where it can be followed; central
      differences, entry by entry where that is little work and along random directions; how fast
      Taylor's remainder falls; linearity in grad; a batch is the sum of its examples. A gradient is
      refuted only by a numeric derivative. At a kink, any slope between those on its two sides is
      right; a second point is taken beside the given one, away from ties.
    - The dtype that came, against float64, to what rounding in it can do.

    An entry is wrong if it is off by more than `rtol` of itself, `atol` and the rounding of its own
    sum: gradients of 1e-12 are checked as closely as those of 1e12.

    Raises GradientMismatch, and what the layer itself raises, unchanged; TypeError for an x that is
    not a floating-point tensor.

    >>> import funcnet as fn
    >>> layer = fn.Conv2d(2, 3, padding=1)
    >>> params = layer.init(fn.key(0), (3, 5, 5))
    >>> check_vjp(layer, params, fn.normal(fn.key(1), (2, 3, 5, 5)))
    >>> check_vjp(fn.MSE(), fn.normal(fn.key(2), (4,)), fn.normal(fn.key(3), (4,)))
    """
    inspect_vjp(layer, params, x, grad=grad, key=key, rtol=rtol, atol=atol)


def inspect_vjp(
    layer: Layer | Loss,
    params: Any,
    x: Any,
    *,
    grad: Tensor | float | None = None,
    key: Key | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
) -> Errors:
    """`check_vjp` that also returns the worst errors it has seen, for those who keep the score."""
    _refuse(layer, params, x)
    case = make_case(layer, params, x, grad, key)
    errors = Errors()
    try:
        _examine(case, rtol, atol, errors)
    except GradientMismatch as mismatch:
        raise _told_in_full(mismatch, case, rtol, atol) from mismatch.__cause__
    return errors


def _examine(case: Case, rtol: float, atol: float, errors: Errors) -> None:
    check_calls(case)
    double = case.double()
    if double.apply().dtype != double.x.dtype:
        raise GradientMismatch(
            f"apply of float64 gives {double.apply().dtype}: is there a cast inside?"
        )
    if case.x.dtype != torch.float64:
        check_calls(double)  # what rounding hides in the dtype that came
    found = find_wrong(double, rtol, atol, errors)
    if found is not None:
        raise _mismatch(found)
    for law in (not_linear_in_grad, not_sum_of_examples):
        broken = law(moved(double))
        if broken is not None:
            raise GradientMismatch(broken)
    check_surroundings(case)
    if case.x.dtype != torch.float64:
        broken = find_inexact(case, double, errors)
        if broken is not None:
            raise GradientMismatch(broken)


def _mismatch(found: Finding) -> GradientMismatch:
    name = found.case.names[found.leaf]
    index = f"[{', '.join(map(str, found.index))}]" if found.index else ""
    size = max(abs(found.numeric), abs(found.analytic))
    relative = abs(found.analytic - found.numeric) / size if size else 0.0
    lines = [
        f"the gradient for {name}{index} is wrong",
        f"  analytic        {found.analytic:.12g}",
        f"  numeric         {found.numeric:.12g}",
        f"  relative error  {relative:.3g}",
    ]
    bad = diagnose.wrong_entries(found)
    fraction = None
    if bad is not None:
        fraction = float(bad.double().mean())
        place = diagnose.where(found)
        lines.append(
            f"  wrong entries   {int(bad.sum())} of {bad.numel()}"
            + (f", all in {name}{place}" if place else "")
        )
    if found.taylor is not None:
        lines.append(f"  Taylor          the remainder falls as h^{found.taylor:.2f}, not as h^2")
    guess = diagnose.guess(found)
    if guess is not None:
        lines.append(f"  a guess         {guess}")
    return GradientMismatch(
        "\n".join(lines),
        leaf=f"{name}{index}",
        analytic=found.analytic,
        numeric=found.numeric,
        relative_error=relative,
        wrong_fraction=fraction,
        guess=guess,
    )


def _told_in_full(
    mismatch: GradientMismatch, case: Case, rtol: float, atol: float
) -> GradientMismatch:
    """The verdict with the layer, the sizes and the code that replays it."""
    if mismatch.snippet is not None:
        return mismatch

    def fails(drawn: Case) -> bool:
        again = make_case(drawn.layer, drawn.params, drawn.x, None, None)
        try:
            _examine(again, rtol, atol, Errors())
        except GradientMismatch as other:
            return _fault(other) == _fault(mismatch)
        return False

    mismatch.snippet = snippet(case, fails)
    mismatch.layer, mismatch.params, mismatch.x = case.layer, case.params, case.x
    mismatch.grad, mismatch.key = case.grad, case.key
    mismatch.target = case.target if isinstance(case, LossCase) else None
    sizes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in case.inputs.items())
    code = mismatch.snippet.replace("\n", "\n    ")
    mismatch.args = (
        f"{case.layer}: {mismatch.args[0]}\n  of              {sizes}; {case.x.dtype}\n"
        f"To replay it:\n    {code}",
    )
    return mismatch


def _fault(mismatch: GradientMismatch) -> str:
    """What is wrong, without where."""
    return (mismatch.leaf or str(mismatch.args[0])).split(" at [")[0].rsplit("[", 1)[0]


def _refuse(layer: Any, params: Any, x: Any) -> None:
    if isinstance(layer, type) or not (hasattr(layer, "fwd") and hasattr(layer, "bwd")):
        kind = "the class " if isinstance(layer, type) else ""
        name = (layer if isinstance(layer, type) else type(layer)).__name__
        raise TypeError(f"check_vjp: expected a layer or a loss, got {kind}{name}")
    x = params if isinstance(layer, Loss) else x
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"check_vjp: expected x to be a floating-point tensor, got {got}")
    for leaf in [] if isinstance(layer, Loss) else optree.tree_leaves(params):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"check_vjp: expected params of tensors, got {type(leaf).__name__}")
