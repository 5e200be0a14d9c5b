"""What layers side by side see of x, where each sees another part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from funcnet.combinators.wrapper import Wrapper
from funcnet.keys import Key
from funcnet.layer import Part, Tree, run_apply


@dataclass(frozen=True)
class Cropped(Wrapper):
    """y = f(a part of x). It belongs to a tile, which only runs forward."""

    part: Part

    def _apply(self, params: Tree, x: Tensor, key: Key | None) -> Tensor:
        return run_apply(self.layer, params, cropped(x, self.part), key)

    def _fwd(self, params: Tree, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        return self._apply(params, x, key), None


def cropped(x: Tensor, part: Part, examples: slice = slice(None)) -> Tensor:
    """A view of a part of x."""
    index = examples, slice(None), *part
    return x[index]


def union(parts: Iterable[Part]) -> Part:
    """The least part that holds all of them."""
    axes = zip(*parts, strict=True)
    return tuple(slice(min(s.start for s in own), max(s.stop for s in own)) for own in axes)


def within(part: Part, whole: Part) -> Part:
    """The same part of x, counted from the start of a larger one."""
    axes = zip(part, whole, strict=True)
    return tuple(slice(own.start - all_.start, own.stop - all_.start) for own, all_ in axes)
