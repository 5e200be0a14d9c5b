"""A skip connection around a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from funcnet.combinators.cropped import Cropped, cropped, placed, union, within
from funcnet.combinators.wrapper import SameShape
from funcnet.keys import Key
from funcnet.layer import Layer, Part, Shape, Tree
from funcnet.ops.need import Need
from funcnet.running import added, run_apply, run_bwd, run_fwd, tile_of


@dataclass(frozen=True)
class Residual(SameShape):
    """y = x + f(x); dx = dy + Jᵀ dy, with J the Jacobian of f at x.

    Shapes: any that f keeps. Parameters: f's. f gets the key itself.

    Raises ValueError for a shape that f does not keep, TypeError unless f is a layer.
    He et al., "Deep residual learning for image recognition", CVPR 2016.

    >>> import funcnet as fn
    >>> block = fn.Residual(fn.Sequential(fn.ReLU(), fn.Conv2d(8, 3, padding=1)))
    >>> params = block.init(fn.key(0), (8, 4, 4))
    >>> params[1]["weight"].shape
    torch.Size([8, 8, 3, 3])
    """

    _fresh = True
    _joins = "apart"

    def _tile(self, shape: Shape, part: Part) -> tuple[Part, Layer] | None:
        found = tile_of(self.layer, shape, part)
        if found is None:
            return None
        source = union([found[0], part])
        layer = Cropped(found[1], within(found[0], source))
        return source, _ResidualTile(layer, within(part, source))

    def _apply(self, params: Tree, x: Tensor, key: Key | None) -> Tensor:
        return added(self.layer, run_apply(self.layer, params, x, key), x)

    def _fwd(self, params: Tree, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        y, residuals = run_fwd(self.layer, params, x, key)
        return added(self.layer, y, x), residuals

    def _bwd(self, params: Tree, residuals: Any, dy: Tensor, need: Need) -> tuple[Tree, Any]:
        dparams, dx = run_bwd(self.layer, params, residuals, dy, need)
        return dparams, None if dx is None else added(self.layer, dx, dy)


@dataclass(frozen=True)
class _ResidualTile(Residual):
    """y = x[part] + f(x): in a tile, f may see more of x than the part of y has."""

    part: Part

    def _apply(self, params: Tree, x: Tensor, key: Key | None) -> Tensor:
        return added(self.layer, run_apply(self.layer, params, x, key), cropped(x, self.part))

    def _fwd(self, params: Tree, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        y, kept = run_fwd(self.layer, params, x, key)
        return added(self.layer, y, cropped(x, self.part)), (kept, x.shape[2:])

    def _bwd(self, params: Tree, residuals: Any, dy: Tensor, need: Need) -> tuple[Tree, Any]:
        kept, size = residuals
        dparams, dx = run_bwd(self.layer, params, kept, dy, need)
        return dparams, None if dx is None else added(self.layer, dx, placed(dy, self.part, size))
