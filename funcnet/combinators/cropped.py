"""Parts of x, for branches of a tile that need different ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from funcnet.combinators.wrapper import Wrapper
from funcnet.keys import Key
from funcnet.layer import Part, Shape, Tree
from funcnet.ops.need import Need
from funcnet.running import run_apply, run_bwd, run_fwd


@dataclass(frozen=True)
class Cropped(Wrapper):
    """y = f(x[part]): in a tile, a branch that needs only a part of what the tile is handed."""

    part: Part

    def _apply(self, params: Tree, x: Tensor, key: Key | None) -> Tensor:
        return run_apply(self.layer, params, cropped(x, self.part), key)

    def _fwd(self, params: Tree, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        y, kept = run_fwd(self.layer, params, cropped(x, self.part), key)
        return y, (kept, x.shape[2:])

    def _bwd(self, params: Tree, residuals: Any, dy: Tensor, need: Need) -> tuple[Tree, Any]:
        kept, size = residuals
        dparams, dx = run_bwd(self.layer, params, kept, dy, need)
        return dparams, None if dx is None else placed(dx, self.part, size)


def cropped(x: Tensor, part: Part, examples: slice = slice(None)) -> Tensor:
    """A view of a part of x."""
    index = examples, slice(None), *part
    return x[index]


def placed(dx: Tensor, part: Part, size: Shape) -> Tensor:
    """The adjoint of `cropped`: zeros around the part."""
    axes = zip(part, size, strict=True)
    sides = [side for own, n in reversed([*axes]) for side in (own.start, n - own.stop)]
    return F.pad(dx, sides)


def union(parts: Iterable[Part]) -> Part:
    """The smallest part that contains all of them."""
    axes = zip(*parts, strict=True)
    return tuple(slice(min(s.start for s in own), max(s.stop for s in own)) for own in axes)


def within(part: Part, whole: Part) -> Part:
    """The same part of x, with positions counted from the start of a larger part, `whole`."""
    axes = zip(part, whole, strict=True)
    return tuple(slice(own.start - all_.start, own.stop - all_.start) for own, all_ in axes)
