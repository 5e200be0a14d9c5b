"""Mixed precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import optree
import torch
from torch import Tensor

from funcnet.checks import name_of, shown
from funcnet.combinators.wrapper import Wrapper
from funcnet.keys import Key
from funcnet.layer import Tree
from funcnet.ops.need import Need
from funcnet.running import run_apply, run_bwd, run_fwd


class FloatingPoint:
    """A floating-point dtype, or the name of one, which is what files hold."""

    def convert(self, owner: type, name: str, value: Any) -> torch.dtype:
        dtype = getattr(torch, value, None) if isinstance(value, str) else value
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return dtype
        raise TypeError(
            f"{owner.__name__}: expected {name} to be a floating-point dtype, got {shown(value)}"
        )


@dataclass(frozen=True)
class Cast(Wrapper):
    """y = f(x) computed in another dtype: params and x are cast on entry, y and all gradients back.

    Parameters, gradients and the optimiser's state keep their dtype, float32 for instance, and so
    do x and y. An x of integers is not cast. The residuals hold the cast parameters.

    Shapes, parameters and key: f's.

    Raises TypeError unless f is a layer and `dtype` a floating-point dtype.
    Micikevicius et al., "Mixed precision training", ICLR 2018.

    >>> import funcnet as fn
    >>> import torch
    >>> net = fn.Cast(fn.Conv2d(8, 3), torch.bfloat16)
    >>> params = net.init(fn.key(0), (3, 8, 8))
    >>> y = net.apply(params, torch.ones(1, 3, 8, 8))
    >>> params["weight"].dtype, y.dtype
    (torch.float32, torch.float32)
    """

    dtype: Annotated[torch.dtype, FloatingPoint()]

    _joins = "apart"

    def _apply(self, params: Tree, x: Tensor, key: Key | None) -> Tensor:
        y = run_apply(self.layer, self._cast(params), self._cast(x), key)
        return y.to(_dtype_of(params, x))

    def _fwd(self, params: Tree, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        inner = self._cast(params)
        y, residuals = run_fwd(self.layer, inner, self._cast(x), key)
        return y.to(_dtype_of(params, x)), (inner, residuals)

    def _bwd(self, params: Tree, residuals: Any, dy: Tensor, need: Need) -> tuple[Tree, Any]:
        inner, residuals = residuals
        dparams, dx = run_bwd(self.layer, inner, residuals, self._cast(dy), need)
        if need.params:
            dparams = optree.tree_map(lambda leaf, d: d.to(dtype=leaf.dtype), params, dparams)
        return dparams, None if dx is None else dx.to(dtype=dy.dtype)

    def _cast(self, tree: Tree) -> Tree:
        # With a keyword, torch parses the arguments in two thirds of the time.
        return optree.tree_map(
            lambda x: x.to(dtype=self.dtype) if x.is_floating_point() else x, tree
        )

    def _describe(self) -> str:
        return f"Cast({name_of(self.layer)}, {self.dtype})"

    def _stored(self, name: str) -> Any:
        """A field as files hold it."""
        value = getattr(self, name)
        return str(value).removeprefix("torch.") if name == "dtype" else value


def _dtype_of(params: Tree, x: Tensor) -> torch.dtype:
    """The dtype to cast y back to: x's, or for x of integers the parameters', or else float32."""
    if x.is_floating_point():
        return x.dtype
    leaves = optree.tree_leaves(params)
    return next((leaf.dtype for leaf in leaves if leaf.is_floating_point()), torch.float32)
