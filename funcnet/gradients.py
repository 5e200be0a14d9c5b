"""The gradient of a loss of a network: forward and backward once."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from funcnet.keys import Key
from funcnet.layer import Layer, Tree, is_private
from funcnet.losses import Loss
from funcnet.ops.need import Need


class ValueAndGrad(Protocol):
    """What `value_and_grad` returns."""

    def __call__(
        self, params: Tree, x: Tensor, target: Tensor, key: Key | None = None
    ) -> tuple[Tensor, Tree]:
        """(the loss, its gradient with respect to params)."""


def value_and_grad(net: Layer, loss: Loss) -> ValueAndGrad:
    """The function (params, x, target, key=None) ↦ (loss(net(x), target), its gradient by params).

    The gradient has the tree of params. Each residual is freed as soon as it has been used, and
    the gradient with respect to x is never formed. `key` is for layers that draw numbers.

    Raises TypeError if net is no Layer, or if loss is a Layer or a class, or lacks `fwd` or `bwd`;
    what the two raise passes through.

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

    def value_and_grad_of(
        params: Tree, x: Tensor, target: Tensor, key: Key | None = None
    ) -> tuple[Tensor, Tree]:
        y, residuals = net.fwd(params, x, key=key)
        value, loss_residuals = loss.fwd(y, target)
        grad = loss.bwd(loss_residuals)
        del y, loss_residuals  # the network's backward pass needs the memory
        if is_private(net):
            need = Need(params=True, input=False, consume=True)
            return value, net._checked_bwd(params, residuals, grad, need)[0]
        return value, net.bwd(params, residuals, grad, input_grad=False)[0]

    return value_and_grad_of
