"""The promises of a layer that works in place.

One that declares `_fresh` hands out y and dx that whatever follows may write over. One that writes
`_fwd_` and `_bwd_` has them agree with `fwd` and `bwd`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from funcnet.layer import Layer
from funcnet.ops.need import Need
from funcnet.running import works_in_place
from funcnet.testing.check.agreement import expect_close
from funcnet.testing.check.case import Case, Leaves, named_leaves
from funcnet.testing.check.purity import expect_no_overlap, expect_unshared, pure
from funcnet.testing.errors import noted


def check_fresh(case: Case) -> None:
    """Hold a layer that declares `_fresh` to it: whatever follows may write over its y and dx."""
    if not getattr(case.layer, "_fresh", False):
        return
    why = f" ({type(case.layer).__name__} declares _fresh)"

    def expect_fresh(name: str, result: Tensor, again: Tensor, **others: Any) -> None:
        of_calls = {f"{name} of another call": again, **named_leaves(**others)}
        expect_unshared(name, result, of_calls, why)
        expect_no_overlap(name, result, why)

    y, residuals = case.fwd()
    dparams, dx = case.bwd(residuals)
    gradients = [leaf.clone() for leaf in case.flat((dparams, dx))]
    expect_fresh("y of fwd", y, case.fwd()[0], residuals=residuals)
    expect_fresh("y of apply", case.apply(), case.apply())
    if dx is not None:
        again = case.bwd(residuals)[1]
        expect_fresh("dx of bwd", dx, again, residuals=residuals, dparams=dparams)
    with torch.inference_mode():  # here, a tensor of any kind can be written to
        y.fill_(math.nan)
    complaint = f"y of fwd is kept{why}: writing over it changes the gradient"
    expect_close(case, complaint, case.flat(case.bwd(residuals)), gradients)


def check_in_place(case: Case, gradients: Leaves) -> None:
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
