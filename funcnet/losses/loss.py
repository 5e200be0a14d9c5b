"""The loss: a function of x and a target to a scalar, with its gradient with respect to x."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any, Literal, TypeAlias

import optree
from torch import Tensor

from funcnet.checks import (
    broken_promise,
    check_like,
    check_tensor,
    is_pair,
    name_of,
    shown,
    unwrapped,
)
from funcnet.fields import Hyperparameters, OneOf
from funcnet.ops.autocast import without_autocast

Reduction: TypeAlias = Annotated[Literal["mean", "sum"], OneOf(("mean", "sum"))]


@dataclass(frozen=True)
class Loss(Hyperparameters):
    """A function of x and a target to a scalar, with its gradient with respect to x.

    `apply`, `vjp`, `fwd` and `bwd` check their arguments; an author writes `_fwd` and `_bwd`,
    `_check` where the target is not like x, and `_count` where the mean is not over the examples.
    An author may also write `fwd` and `bwd` alone; then the loss checks for itself.

    A batch may come in parts (`micro_batch`, `fn.distributed.value_and_grad`). Then the field
    `reduction: Literal["mean", "sum"] = "mean"`, which `_fwd` has to follow, says how the parts'
    values are put together. A loss that couples examples, such as a contrastive loss, declares no
    such field, and is refused there. `fn.per_example` and the functions beside it hand any loss one
    example at a time.

    Raises TypeError or ValueError for x and target that do not fit each other.

    >>> from dataclasses import dataclass
    >>> import funcnet as fn
    >>> from funcnet.testing import check_vjp
    >>> @dataclass(frozen=True)
    ... class LogCosh(fn.Loss):
    ...     "The mean of log cosh(d) with d = x − target; dx = tanh(d) / n · grad."
    ...
    ...     def _fwd(self, x, target):
    ...         d = x - target
    ...         return d.cosh().log().mean(), d
    ...
    ...     def _bwd(self, d, grad):
    ...         return d.tanh() * (grad / d.numel())
    >>> check_vjp(LogCosh(), fn.normal(fn.key(0), (2, 3)), fn.normal(fn.key(1), (2, 3)))
    """

    def _check(self, x: Tensor, target: Any, /) -> None:
        """Raise unless x and target fit each other."""
        check_like(self, "target", target, x)
        if x.shape != target.shape:
            raise ValueError(
                f"{name_of(self)}: expected target of shape {tuple(x.shape)}, x's shape, "
                f"got {tuple(target.shape)}"
            )

    def _fwd(self, x: Tensor, target: Any, /) -> tuple[Tensor, Any]:
        """(value, residuals)."""
        raise NotImplementedError(f"{type(self).__name__} writes neither _fwd nor fwd")

    def _bwd(self, residuals: Any, grad: Tensor | float, /) -> Tensor:
        """dx."""
        raise NotImplementedError(f"{type(self).__name__} writes neither _bwd nor bwd")

    def _count(self, target: Any, /) -> int | Tensor:
        """The weight of a batch in a mean: its number of examples, or of terms that count."""
        return len(optree.tree_leaves(target)[0])

    def _reduced(self, values: Tensor) -> Tensor:
        """The mean or the sum of values, as the loss's reduction says."""
        return values.mean() if getattr(self, "reduction", "mean") == "mean" else values.sum()

    def fwd(self, x: Tensor, target: Any) -> tuple[Tensor, Any]:
        """(value, residuals); the value is a scalar."""
        check_tensor(self, "x", x)
        self._check(x, target)
        with without_autocast(x):
            made = self._fwd(x, target)
        if not is_pair(made):
            what = f"expected _fwd to return (value, residuals), got {shown(made)}"
            raise broken_promise(self, what)
        value, residuals = made
        if not isinstance(value, Tensor) or value.ndim:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
            raise broken_promise(
                self, f"expected the value to be a scalar tensor, got {got}", value
            )
        return value, (x.new_empty(0), residuals)  # no entries: it tells x's dtype to bwd

    def bwd(self, residuals: Any, grad: Tensor | float = 1.0) -> Tensor:
        """dx, where grad is a scalar."""
        like, kept = unwrapped(self, residuals)
        if isinstance(grad, Real):
            grad = float(grad)  # NumPy's numbers would turn tensors into arrays
        else:
            check_like(self, "grad", grad, like)
            assert isinstance(grad, Tensor)
            if grad.ndim != 0:
                raise ValueError(
                    f"{name_of(self)}: expected grad to be a scalar, got shape {tuple(grad.shape)}"
                )
        with without_autocast(like):
            dx = self._bwd(kept, grad)
        if not isinstance(dx, Tensor):
            raise broken_promise(self, f"expected _bwd to return dx, a tensor, got {shown(dx)}")
        return dx

    def apply(self, x: Tensor, target: Any) -> Tensor:
        """The value of the loss, a scalar."""
        return self.fwd(x, target)[0]

    def vjp(self, x: Tensor, target: Any, grad: Tensor | float = 1.0) -> Tensor:
        """dx, the gradient of grad · loss(x, target) with respect to x."""
        return self.bwd(self.fwd(x, target)[1], grad)


def as_scalar(grad: Tensor | float, like: Tensor) -> Tensor:
    """grad as a tensor of `like`'s dtype, for kernels that want one."""
    return grad.to(like.dtype) if isinstance(grad, Tensor) else like.new_full((), grad)


def share(reduction: str, count: int) -> float:
    """The factor of each of `count` entries in the mean, or in the sum."""
    return 1 / max(count, 1) if reduction == "mean" else 1.0
