"""Results fit what a layer was handed: trees, shapes, dtypes, devices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import optree
from torch import Tensor

from funcnet.testing.check.case import Case, Leaves, kind_of, leaves_like, named_leaves, tried
from funcnet.testing.errors import GradientMismatch


def expect_pair(who: str, names: str, result: Any) -> tuple[Any, Any]:
    if not (isinstance(result, tuple) and len(result) == 2):
        raise GradientMismatch(f"{who}: expected a pair {names}, got {kind_of(result)}")
    return result


def expect_like(
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


def checked_gradients(case: Case, who: str, result: Any, without: str = "") -> Leaves:
    """The gradients that were asked for. `without` names the argument of bwd that was False."""
    dparams, dx = expect_pair(who, "(dparams, dx)", result)
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
        if isinstance(found, Tensor):
            got = "a tensor: the order is (dparams, dx)"
        raise GradientMismatch(
            f"{who}: expected {what} with the tree of {of}, {expected}, got {got}"
        )
    for (name, leaf), gradient in zip(named_leaves(**{of: tree}).items(), gradients, strict=True):
        label = "dx" if name == "x" else f"the gradient for {name}"
        if leaf.is_floating_point():
            expect_like(who, label, gradient, leaf.shape, leaf)
        elif not isinstance(gradient, Tensor) or gradient.shape != leaf.shape or gradient.any():
            raise GradientMismatch(
                f"{who}: expected {label} to be None, as {leaf.dtype} has no gradient"
            )
    return gradients
