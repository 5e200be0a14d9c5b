"""The gradient of a loss of a network: forward and backward once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import optree
from torch import Tensor

from funcnet.checks import as_int, name_of
from funcnet.keys import Key, fold_in
from funcnet.layer import Layer, Tree, is_private
from funcnet.losses import Loss
from funcnet.ops import inplace
from funcnet.ops.need import Need


@dataclass(frozen=True)
class ValueAndGrad:
    """The function (params, x, target, key=None) ↦ (loss(net(x), target), its gradient by params).

    Made by `value_and_grad`.
    """

    net: Layer
    loss: Loss

    def __call__(
        self, params: Tree, x: Tensor, target: Any, key: Key | None = None
    ) -> tuple[Tensor, Tree]:
        """(the loss, its gradient with respect to params)."""
        return self._of(self.loss, params, x, target, key)

    def _of(
        self, loss: Loss, params: Tree, x: Tensor, target: Any, key: Key | None, scale: Any = 1.0
    ) -> tuple[Tensor, Tree]:
        """(the loss, `scale` times its gradient)."""
        y, residuals = self.net.fwd(params, x, key=key)
        value, loss_residuals = loss.fwd(y, target)
        scale = scale.to(y.dtype) if isinstance(scale, Tensor) else scale
        grad = loss.bwd(loss_residuals, scale)
        del y, loss_residuals  # the network's backward pass needs the memory
        if is_private(self.net):
            need = Need(params=True, input=False, consume=True)
            return value, self.net._checked_bwd(params, residuals, grad, need)[0]
        return value, self.net.bwd(params, residuals, grad, input_grad=False)[0]


@dataclass(frozen=True)
class MicroBatched(ValueAndGrad):
    """`ValueAndGrad` that takes `micro_batch` examples at a time: the same numbers, less memory."""

    micro_batch: int

    def __call__(
        self, params: Tree, x: Tensor, target: Any, key: Key | None = None
    ) -> tuple[Tensor, Tree]:
        """(the loss, its gradient with respect to params)."""
        if not len(x):
            return super().__call__(params, x, target, key)
        summed: Any = replace(self.loss, reduction="sum")  # type: ignore[call-arg]
        is_mean = self.loss.reduction == "mean"  # type: ignore[attr-defined]
        # A part alone may have nothing to average, where all of its places are ignored.
        scale = 1 / self.loss._entries(target) if is_mean else 1.0
        total, grads = None, None
        for j, (part, target_of_part) in enumerate(self._parts(x, target)):
            own = None if key is None else fold_in(key, j)
            value, found = self._of(summed, params, part, target_of_part, own, scale)
            total = value if total is None else total + value
            grads = found if grads is None else optree.tree_map(inplace.add, grads, found)
        assert total is not None
        return (total * scale).to(total.dtype), grads

    def _parts(self, x: Tensor, target: Any) -> Iterator[tuple[Tensor, Any]]:
        for start in range(0, len(x), self.micro_batch):
            part = slice(start, start + self.micro_batch)
            yield x[part], target[part]


def value_and_grad(net: Layer, loss: Loss, micro_batch: int | None = None) -> ValueAndGrad:
    """The function (params, x, target, key=None) ↦ (loss(net(x), target), its gradient by params).

    The gradient has the tree of params. Each residual is freed as soon as it has been used, and
    the gradient with respect to x is never formed. `key` is for layers that draw numbers. With
    `micro_batch=n` the same numbers are computed n examples at a time, micro-batch j with the key
    `fold_in(key, j)`.

    Raises TypeError if net is not a Layer, or if loss is a Layer or a class, or lacks `fwd` or
    `bwd`; ValueError if micro_batch is given and the net has a layer that couples examples, or the
    loss has no reduction "mean" or "sum". Errors of the two pass through.

    >>> import funcnet as fn
    >>> net = fn.Sequential(fn.Conv2d(3, 3, padding="same"), fn.Sigmoid())
    >>> params = net.init(fn.key(0), (3, 8, 8))
    >>> x = fn.uniform(fn.key(1), (4, 3, 8, 8))
    >>> value, grads = fn.value_and_grad(net, fn.MSE())(params, x, x)
    >>> grads[0]["weight"].shape
    torch.Size([3, 3, 3, 3])
    """
    if not isinstance(net, Layer):
        raise TypeError(f"value_and_grad: expected net to be a Layer, got {type(net).__name__}")
    if isinstance(loss, type | Layer) or not (hasattr(loss, "fwd") and hasattr(loss, "bwd")):
        raise TypeError(f"value_and_grad: expected a loss, such as MSE(), got {loss!r}")
    if micro_batch is None:
        return ValueAndGrad(net, loss)
    if net.couples_examples:
        raise ValueError(
            f"value_and_grad: expected a net that treats every example alone with micro_batch, "
            f"got {name_of(net)} with a layer that couples examples"
        )
    if getattr(loss, "reduction", None) not in ("mean", "sum") or not isinstance(loss, Loss):
        raise ValueError(
            f'value_and_grad: expected a loss with reduction "mean" or "sum" with micro_batch, '
            f"got {loss!r}"
        )
    return MicroBatched(net, loss, as_int("value_and_grad", "micro_batch", micro_batch, 1))
