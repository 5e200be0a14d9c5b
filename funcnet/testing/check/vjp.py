"""`check_vjp`, from first to last."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.keys import Key
from funcnet.layer import Layer
from funcnet.losses import Loss
from funcnet.testing.check.case import Case, make_case
from funcnet.testing.check.comparison import Errors
from funcnet.testing.check.contract import check_calls, check_surroundings
from funcnet.testing.check.laws import check_frozen, check_linear_in_grad, check_sum_of_examples
from funcnet.testing.check.precision import check_precision
from funcnet.testing.check.report import complete, wrong_gradient
from funcnet.testing.check.search import find_wrong, moved
from funcnet.testing.errors import GradientMismatch


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
    """Check the gradient of a layer, network or loss, and the contract of both.

    `check_vjp(layer, params, x)` for layers, `check_vjp(loss, x, target)` for losses. `grad` is the
    gradient of the result, drawn if not given. `key` goes to layers that draw numbers.

    - The contract: the tree of dparams, shapes, dtypes, devices; `apply` agrees with `fwd`, `vjp`
      with `bwd`; `input_grad=False`, and `param_grad=False` where the layer takes it; `out_shape`;
      `init` ignores global randomness; no call writes to its inputs or returns their memory; no
      global random state is used; the same call twice gives the same bits; no state between `fwd`
      and `bwd`; any memory layout; a batch of 0. y and dx of a layer that declares
      `_fresh = True` share no storage with residuals or dparams.
    - The mathematics, in float64: autograd of `apply` where it can follow; central differences,
      entry by entry where that is little work and along random directions; the power that Taylor's
      remainder falls by; linearity in grad; a batch is the sum of its examples. Only a numeric
      derivative refutes a gradient. At a kink, any slope between those of its two sides is right.
      A second point, away from ties, is checked beside the given one.
    - The dtype of x against float64, up to what rounding in it can do.

    An entry is wrong if it is off by more than `rtol` of itself, `atol` and the rounding of its own
    sum: gradients of 1e-12 are checked as closely as those of 1e12.

    Raises GradientMismatch; TypeError for an x that is not a floating-point tensor; and every
    exception of the layer, unchanged.

    >>> import funcnet as fn
    >>> layer = fn.Conv2d(2, 3, padding=1)
    >>> params = layer.init(fn.key(0), (3, 5, 5))
    >>> check_vjp(layer, params, fn.normal(fn.key(1), (2, 3, 5, 5)))
    >>> check_vjp(fn.MSE(), fn.normal(fn.key(2), (4,)), fn.normal(fn.key(3), (4,)))
    """
    inspect_vjp(layer, params, x, grad, key, rtol, atol)


def inspect_vjp(
    layer: Any, params: Any, x: Any, grad: Any = None, key: Key | None = None,
    rtol: float = 1e-6, atol: float = 0.0,
) -> Errors:  # fmt: skip
    """`check_vjp` that returns the worst errors it has seen."""
    _refuse(layer, params, x)
    case = make_case(layer, params, x, grad, key)
    errors = Errors()
    try:
        _examine(case, rtol, atol, errors)
    except GradientMismatch as mismatch:
        if mismatch.snippet is None:  # it has one if the layer calls check_vjp itself
            complete(mismatch, case, lambda drawn: _examine(drawn, rtol, atol, Errors()))
        raise
    return errors


def _examine(case: Case, rtol: float, atol: float, errors: Errors) -> None:
    check_calls(case)
    double = case.double()
    dtype = double.apply().dtype
    if dtype != torch.float64:
        raise GradientMismatch(f"apply: expected y to be torch.float64 as x is, got {dtype}")
    if case.x.dtype != torch.float64:
        check_calls(double)  # rounding in the dtype of x may hide differences
    check_frozen(double)
    found = find_wrong(double, rtol, atol, errors)
    if found is not None:
        raise wrong_gradient(found)
    beside = moved(double)
    check_linear_in_grad(beside)
    check_sum_of_examples(beside)
    check_surroundings(case)
    if case.x.dtype != torch.float64:
        check_precision(case, double, errors)


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
