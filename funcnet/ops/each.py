"""Elementwise operations on every tensor of a list, as optimisers need them."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from funcnet.ops.inplace import is_plain

Tensors: TypeAlias = list[Tensor]
Scalar: TypeAlias = "float | Tensor"
"""A number, or a 0-dimensional tensor of any dtype and device."""

_HALF = frozenset((torch.float16, torch.bfloat16))


class Each:
    """Operations on every tensor of a list. Lists in one call are equally long.

    A method with an underscore writes the result into its first list and returns it, but only if
    `write` was given. All other results are new tensors.
    """

    def __init__(self, write: bool) -> None:
        self.write = write
        self._underscore = "_" if write else ""
        # torch.func.vmap has no rule for lists of tensors.
        self.plain = is_plain()

    def neg(self, xs: Tensors) -> Tensors:
        """−x."""
        return self._map("neg", xs)

    def add(self, xs: Tensors, ys: Tensors, alpha: Scalar) -> Tensors:
        """x + alpha · y."""
        if isinstance(alpha, Tensor):
            ys, alpha = [_like(y, alpha) * y for y in ys], 1.0
        return self._map("add", xs, ys, alpha=alpha)

    def add_(self, xs: Tensors, ys: Tensors, alpha: Scalar) -> Tensors:
        """x + alpha · y."""
        if isinstance(alpha, Tensor):
            ys, alpha = [_like(y, alpha) * y for y in ys], 1.0
        return self._map("add" + self._underscore, xs, ys, alpha=alpha)

    def shift_(self, xs: Tensors, c: float) -> Tensors:
        """x + c."""
        return self._map("add" + self._underscore, xs, c)

    def mul_(self, xs: Tensors, c: Scalar) -> Tensors:
        """x · c."""
        if self.write and not _HALF.isdisjoint([x.dtype for x in xs]) and not isinstance(c, Tensor):
            return [x.mul_(c) for x in xs]  # on the CPU, torch._foreach_mul_ rounds c to 16 bits
        return self._map("mul" + self._underscore, xs, _likes(xs, c))

    def div_(self, xs: Tensors, c: Scalar) -> Tensors:
        """x / c."""
        return self._map("div" + self._underscore, xs, _likes(xs, c))

    def lerp_(self, xs: Tensors, ys: Tensors, weight: float) -> Tensors:
        """x + weight · (y − x)."""
        return self._map("lerp" + self._underscore, xs, ys, weight)

    def addcmul(self, xs: Tensors, ys: Tensors, zs: Tensors, c: float) -> Tensors:
        """x + c · y · z."""
        return self._map("addcmul", xs, ys, zs, value=c)

    def addcmul_(self, xs: Tensors, ys: Tensors, zs: Tensors, c: float) -> Tensors:
        """x + c · y · z."""
        return self._map("addcmul" + self._underscore, xs, ys, zs, value=c)

    def addcdiv_(self, xs: Tensors, ys: Tensors, zs: Tensors, c: Scalar) -> Tensors:
        """x + c · y / z."""
        if isinstance(c, Tensor):
            return self.add_(xs, self._map("div", ys, zs), c)
        return self._map("addcdiv" + self._underscore, xs, ys, zs, value=c)

    def sqrt(self, xs: Tensors) -> Tensors:
        """√x."""
        return self._map("sqrt", xs)

    def maximum_(self, xs: Tensors, ys: Tensors) -> Tensors:
        """The larger of x and y; NaN if one is."""
        if not self.write:
            return self._map("maximum", xs, ys)
        if self.plain and xs:
            torch._foreach_maximum_(xs, ys)
            return xs
        # torch.Tensor has no maximum_.
        return [x.copy_(torch.maximum(x, y)) for x, y in zip(xs, ys, strict=True)]

    def _map(self, name: str, xs: Tensors, *others: Any, **numbers: float) -> Tensors:
        """`torch.Tensor`'s operation of that name. The other operands are lists or numbers."""
        if self.plain and xs:
            results = getattr(torch, "_foreach_" + name)(xs, *others, **numbers)
            return xs if results is None else list(results)
        operation: Any = getattr(Tensor, name)
        columns = [other if isinstance(other, list) else [other] * len(xs) for other in others]
        return [operation(*row, **numbers) for row in zip(xs, *columns, strict=True)]


def _like(x: Tensor, c: Tensor) -> Tensor:
    """A 0-dimensional tensor of x's dtype and device.

    Under torch.func.vmap it may have an axis that hides from `torch`'s rules of type promotion.
    """
    return c.to(x.device, x.dtype)


def _likes(xs: Tensors, c: Scalar) -> Any:
    return [_like(x, c) for x in xs] if isinstance(c, Tensor) else c
