"""The gradient of a network's loss: forward and backward once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import isroutine
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.checks import as_int, name_of, shown
from funcnet.keys import Key, fold_in
from funcnet.layer import Layer, Tree, check_net, last_bwd, spec_of_y
from funcnet.losses.loss import Loss
from funcnet.ops.accumulation import accumulator_dtype
from funcnet.ops.need import Need
from funcnet.ops.summation import summed


@dataclass(frozen=True)
class ValueAndGrad:
    """The function (params, x, target, key=None) ↦ (value, grads) of `value_and_grad`."""

    net: Layer
    loss: Any

    def __repr__(self) -> str:
        return f"value_and_grad({self.net!r}, {self.loss!r})"

    def __call__(
        self, params: Tree, x: Tensor, target: Any, key: Key | None = None
    ) -> tuple[Tensor, Tree]:
        """(the loss, its gradient with respect to params).

        `key` is for layers that draw numbers; without one they evaluate.
        """
        return self._of(params, x, target, key)

    def _of(
        self, params: Tree, x: Tensor, target: Any, key: Key | None, whole: Any = None
    ) -> tuple[Tensor, Tree]:
        """(the loss, its gradient), or their contributions to the mean over `whole` terms."""
        y, residuals = self.net.fwd(params, x, key=key)
        value, loss_residuals = self.loss.fwd(y, target)
        share = 1.0
        if whole is not None:
            value, share = contribution(value, terms(self.loss, y, target), whole)
        grad = self.loss.bwd(loss_residuals, share)
        spec, need = spec_of_y(y), Need(params=True, input=False)
        del y, loss_residuals  # the network's backward pass needs the memory
        return value, last_bwd(self.net, params, residuals, grad, need, spec)[0]


def terms(loss: Loss, x: Tensor, target: Any) -> int | Tensor:
    """The weight of a batch in a mean; its number of examples where there is no target."""
    return loss._count(target) if optree.tree_leaves(target) else len(x)


def contribution(value: Tensor, count: Any, whole: Any) -> tuple[Tensor, Any]:
    """(share · value, share): a mean over `count` terms as its part of that over `whole`."""
    if isinstance(count, Tensor):
        value = torch.where(count == 0, torch.zeros_like(value), value)  # no term: NaN
        share = (count.to(accumulator_dtype(value.dtype)) / whole).to(value.dtype)
    else:
        value = value if count else torch.zeros_like(value)
        share = count / whole
    return value * share, share


@dataclass(frozen=True, repr=False)
class MicroBatched(ValueAndGrad):
    """`ValueAndGrad` of `micro_batch` examples at a time: residuals take less memory.

    A value that `value_and_grad` makes.
    """

    micro_batch: int

    def __repr__(self) -> str:
        return f"value_and_grad({self.net!r}, {self.loss!r}, micro_batch={self.micro_batch})"

    def __call__(
        self, params: Tree, x: Tensor, target: Any, key: Key | None = None
    ) -> tuple[Tensor, Tree]:
        """(the loss, its gradient with respect to params). Micro-batch j draws from
        `fold_in(key, j)`."""
        check_batch("value_and_grad", x, target)
        found: tuple[Tensor, Tree] = summed(self._parts(params, x, target, key))
        return found

    def _parts(
        self, params: Tree, x: Tensor, target: Any, key: Key | None
    ) -> Iterator[tuple[Tensor, Tree]]:
        """Each micro-batch's contribution to the value and its gradient."""
        is_mean = self.loss.reduction == "mean"
        whole = terms(self.loss, x, target) if is_mean and len(x) else None
        for j, start in enumerate(range(0, max(len(x), 1), self.micro_batch)):
            own = None if key is None else fold_in(key, j)
            of_part = optree.tree_map(lambda t, i=start: t[i : i + self.micro_batch], target)
            yield self._of(params, x[start : start + self.micro_batch], of_part, own, whole)


def value_and_grad(net: Layer, loss: Loss, micro_batch: int | None = None) -> ValueAndGrad:
    """The function (params, x, target, key=None) ↦ (value, grads): a loss and its gradient.

    value is loss(net(x), target), and grads its gradient with respect to params, in the tree of
    params. Each residual is freed as soon as it has been used, and the gradient with respect to x
    is never formed. `key` is for layers that draw numbers.

    Where params or x require a gradient, autograd records the pass as it does any other, which is
    what second derivatives need. Where you do not want that, as for `nn.Parameter`s, call it under
    `torch.no_grad()`.

    `micro_batch=n` computes the same numbers n examples at a time, in less memory: x and all of
    target are cut along axis 0, and gradients are added up. A mean is that of the whole batch, also
    where `CrossEntropy` ignores different numbers of places in the parts. Micro-batch j, from 0,
    draws from `fold_in(key, j)`.

    Raises TypeError if net is not a Layer, or if loss is a Layer or a class, or lacks `fwd` or
    `bwd`. For micro_batch, raises ValueError if it is below 1, if a layer couples examples
    (BatchNorm), or if the loss is not a `Loss` with a reduction "mean" or "sum". Errors of net and
    loss pass through.

    >>> import funcnet as fn
    >>> net = fn.Sequential(fn.Conv2d(3, 3, padding="same"), fn.Sigmoid())
    >>> params = net.init(fn.key(0), (3, 8, 8))
    >>> x = fn.uniform(fn.key(1), (4, 3, 8, 8))
    >>> value, grads = fn.value_and_grad(net, fn.MSE())(params, x, x)
    >>> grads[0]["weight"].shape
    torch.Size([3, 3, 3, 3])
    >>> in_parts, _ = fn.value_and_grad(net, fn.MSE(), micro_batch=2)(params, x, x)
    >>> torch.allclose(in_parts, value)
    True
    >>> fn.value_and_grad(fn.Sigmoid(), fn.MSE(), micro_batch=2)
    value_and_grad(Sigmoid(), MSE(), micro_batch=2)
    """
    check_net_and_loss("value_and_grad", net, loss)
    if micro_batch is None:
        return ValueAndGrad(net, loss)
    check_uncoupled("value_and_grad", net, ", for micro_batch")
    check_reduction("value_and_grad", loss, ", for micro_batch")
    return MicroBatched(net, loss, as_int("value_and_grad", "micro_batch", micro_batch, 1))


def check_net_and_loss(who: str, net: Any, loss: Any) -> None:
    """Raise TypeError unless these are a layer and a loss."""
    check_net(who, net)
    if isinstance(loss, type | Layer) or not (hasattr(loss, "fwd") and hasattr(loss, "bwd")):
        advice = ": a loss of one's own derives from funcnet.Loss" if isroutine(loss) else ""
        raise TypeError(f"{who}: expected a loss, such as MSE(), got {shown(loss)}{advice}")


def check_reduction(who: str, loss: Any, purpose: str = "") -> None:
    """Raise ValueError unless the values of a loss for parts of a batch can be put together."""
    if isinstance(loss, Loss) and getattr(loss, "reduction", None) in ("mean", "sum"):
        return
    is_own = isinstance(loss, Loss) and not hasattr(loss, "reduction")
    remedy = ": a loss of one's own has a field named reduction" if is_own else ""
    raise ValueError(
        f'{who}: expected a loss with reduction "mean" or "sum"{purpose}, got {loss!r}{remedy}'
    )


def check_uncoupled(who: str, net: Layer, purpose: str = "") -> None:
    """Raise ValueError if a layer couples examples, with the path to it."""
    if net.couples_examples:
        raise ValueError(
            f"{who}: expected layers that treat every example alone{purpose}, got {_coupled(net)}"
        )


def check_batch(who: str, x: Any, target: Any) -> None:
    """Raise unless x and target are batches of the same number of examples."""
    for name, leaf in (("x", x), *(("target", leaf) for leaf in optree.tree_leaves(target))):
        if not isinstance(leaf, Tensor) or not leaf.ndim:
            got = type(leaf).__name__ if not isinstance(leaf, Tensor) else "shape ()"
            raise TypeError(f"{who}: expected {name} to be a batch, got {got}")
        if len(leaf) != len(x):
            raise ValueError(f"{who}: expected target of {len(x)} examples, as x, got {len(leaf)}")


def _coupled(layer: Layer) -> str:
    """The path to the first layer that couples examples, and its name: `layer 1: BatchNorm()`."""
    for name, child in layer._children():
        if child.couples_examples:
            return layer._path_step(name) + _coupled(child)
    return name_of(layer)
