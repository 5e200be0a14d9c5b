"""Elementwise operations on every tensor of a list, as optimisers need them."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from funcnet.compat import foreach, foreach_, in_turn
from funcnet.ops.inplace import is_eager

Tensors: TypeAlias = list[Tensor]
Scalar: TypeAlias = "float | Tensor"
"""A number, or a 0-dimensional tensor of any dtype and device."""

_HALF = frozenset((torch.float16, torch.bfloat16))


class Each:
    """Operations on every tensor of a list. Lists in one call are equally long.

    A method with an underscore uses its first list up: the result may be written into it. This
    happens if `write` was given, or if another operation has made that list and autograd does not
    need it. All other results are new tensors.
    """

    def __init__(self, write: bool) -> None:
        self.write = write
        # torch.func.vmap has no rule for lists of tensors.
        self.eager = is_eager()

    def neg(self, xs: Tensors) -> Tensors:
        """−x."""
        return self._map("neg", xs)

    def sqrt(self, xs: Tensors) -> Tensors:
        """√x."""
        return self._map("sqrt", xs)

    def add(self, xs: Tensors, ys: Tensors, alpha: float) -> Tensors:
        """x + alpha · y."""
        # torch.compile makes x + A·B of torch.add(x, A·B, alpha=alpha), in PyTorch 2.13.
        return self._map("sub", xs, ys, alpha=-alpha)

    def addcmul(self, xs: Tensors, ys: Tensors, zs: Tensors, c: float) -> Tensors:
        """x + c · y · z."""
        return self._map("addcmul", xs, ys, zs, value=c)

    def add_(self, xs: Tensors, ys: Tensors, alpha: Scalar) -> Tensors:
        """x + alpha · y."""
        if isinstance(alpha, Tensor):
            ys, alpha = [_like(y, alpha) * y for y in ys], 1.0
        return self._map_("sub", xs, ys, alpha=-alpha)  # as in `add`

    def shift_(self, xs: Tensors, c: float) -> Tensors:
        """x + c."""
        return self._map_("add", xs, c)

    def mul_(self, xs: Tensors, c: Scalar) -> Tensors:
        """x · c."""
        if not isinstance(c, Tensor) and not _HALF.isdisjoint([x.dtype for x in xs]):
            # On the CPU, torch._foreach_mul_ rounds c to 16 bits.
            return [x.mul_(c) for x in xs] if self.write else self._map("mul", xs, c)
        return self._map_("mul", xs, _likes(xs, c))

    def div_(self, xs: Tensors, c: Scalar) -> Tensors:
        """x / c."""
        return self._map_("div", xs, _likes(xs, c))

    def lerp_(self, xs: Tensors, ys: Tensors, weight: float) -> Tensors:
        """x + weight · (y − x)."""
        return self._map_("lerp", xs, ys, weight)

    def addcmul_(self, xs: Tensors, ys: Tensors, zs: Tensors, c: float) -> Tensors:
        """x + c · y · z."""
        return self._map_("addcmul", xs, ys, zs, value=c)

    def addcdiv_(self, xs: Tensors, ys: Tensors, zs: Tensors, c: Scalar) -> Tensors:
        """x + c · y / z."""
        if isinstance(c, Tensor):
            return self.add_(xs, self._map("div", ys, zs), c)
        return self._map_("addcdiv", xs, ys, zs, value=c)

    def maximum_(self, xs: Tensors, ys: Tensors) -> Tensors:
        """The larger of x and y; NaN if one is."""
        return self._map_("maximum", xs, ys)

    def _map(self, name: str, xs: Tensors, *others: Any, **numbers: float) -> Tensors:
        """`torch.Tensor`'s operation of that name. The other operands are lists or numbers."""
        if self.eager and xs:
            return _New(foreach[name](xs, *others, **numbers))
        return in_turn(name, xs, *others, **numbers)

    def _map_(self, name: str, xs: Tensors, *others: Any, **numbers: float) -> Tensors:
        """`_map`, written into xs if that is allowed."""
        if not (self.write or (type(xs) is _New and not _need_autograd(xs, *others))):
            return self._map(name, xs, *others, **numbers)
        if self.eager and xs:
            foreach_[name](xs, *others, **numbers)
            return xs
        # torch.func.vmap has no rule for addcmul_ and others.
        results = self._map(name, xs, *others, **numbers)
        return [x.copy_(result) for x, result in zip(xs, results, strict=True)]


class _New(list[Tensor]):
    """Tensors that `Each` has made eagerly and nobody else has seen."""


def _need_autograd(*operands: Any) -> bool:
    return any(True in [x.requires_grad for x in xs] for xs in operands if isinstance(xs, list))


def _like(x: Tensor, c: Tensor) -> Tensor:
    """A 0-dimensional tensor of x's dtype and device.

    Under torch.func.vmap it may have an axis that hides from `torch`'s rules of type promotion.
    """
    return c.to(x.device, x.dtype)


def _likes(xs: Tensors, c: Scalar) -> Any:
    return [_like(x, c) for x in xs] if isinstance(c, Tensor) else c
