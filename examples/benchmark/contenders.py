"""The contenders: the same training step and the same inference, each as its users write it.

Each makes weights, optimizer state and data of its own, so that none disturbs another, and gets its
data in the memory layout it is best with; only funcnet is handed whole networks' data in PyTorch's
default layout, and converts it within the time that is measured.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from problem import LEARNING_RATE, MOMENTUM, Problem
from torch import Tensor, nn
from translate import leaves, to_torch

import funcnet as fn


@dataclass(frozen=True)
class Contender:
    """What can be timed.

    `train` does one training step and returns the loss, `infer` returns the output. `state` is what
    the steps have made of it, in PyTorch's order and layouts: the parameters, or for a layer on its
    own the last gradients with respect to x and parameters (`train` then returns the output).
    """

    train: Callable[[], Any]
    infer: Callable[[], Any]
    state: Callable[[], list[Tensor]]
    as_tensor: Callable[[Any], Tensor] = torch.as_tensor
    """Of what `train` and `infer` return."""


def funcnet_in_place(problem: Problem) -> Contender:
    """`value_and_grad` and `SGD.step_`."""
    return _funcnet(problem, "step_")


def funcnet_pure(problem: Problem) -> Contender:
    """`value_and_grad` and the pure `SGD.step`, which makes new trees."""
    return _funcnet(problem, "step")


def _funcnet(problem: Problem, step_name: str) -> Contender:
    net, params = problem.network.net, problem.params()
    x, target = problem.x(), problem.target()
    if problem.network.is_layer:
        return _funcnet_layer(net, params, x, target)
    sgd = fn.SGD(LEARNING_RATE, MOMENTUM)
    step, loss_and_grads = getattr(sgd, step_name), fn.value_and_grad(net, fn.MSE())
    state = sgd.init(params)

    def train() -> Tensor:
        nonlocal params, state
        loss, grads = loss_and_grads(params, x, target)
        params, state = step(params, grads, state)
        return loss

    return Contender(
        train,
        lambda: net.apply(params, x),
        lambda: [leaf for tree in params for leaf in leaves(tree)],
    )


def _funcnet_layer(net: fn.Sequential, params: Any, x: Tensor, grad: Tensor) -> Contender:
    layer, (layer_params,) = net[0], params
    x, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad))
    last: tuple[Any, Any] = ((), None)

    def train() -> Tensor:
        nonlocal last
        y, residuals = layer.fwd(layer_params, x)
        last = layer.bwd(layer_params, residuals, grad)
        return y

    def state() -> list[Tensor]:
        dparams, dx = last
        return [dx, *leaves(dparams)]

    return Contender(train, lambda: layer.apply(layer_params, x), state)


def _as_it_is(function: Any) -> Any:
    return function


def torch_nn(
    problem: Problem,
    layout: torch.memory_format,
    compiler: Callable[[Any], Any] = _as_it_is,
) -> Contender:
    """torch.nn, autograd and torch.optim.SGD, perhaps compiled."""
    model = to_torch(problem.network.net, problem.params(), problem.network.shape)
    model = model.to(memory_format=layout)
    x = problem.x().contiguous(memory_format=layout)
    target = problem.target().contiguous(memory_format=layout)
    predict = torch.inference_mode()(compiler(model))
    if problem.network.is_layer:
        step, state = _torch_layer(compiler(model), list(model.parameters()), x, target)
        return Contender(step, lambda: predict(x), state)
    loss_of = compiler(lambda x, target: nn.functional.mse_loss(model(x), target))
    optimizer = fastest_sgd(list(model.parameters()))

    def train() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(x, target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Contender(train, lambda: predict(x), lambda: [p.detach() for p in model.parameters()])


def _torch_layer(
    model: Callable[[Tensor], Tensor], params: list[nn.Parameter], x: Tensor, grad: Tensor
) -> tuple[Callable[[], Tensor], Callable[[], list[Tensor]]]:
    leaf = x.detach().requires_grad_()
    last: list[Tensor] = []

    def train() -> Tensor:
        y = model(leaf)
        last[:] = torch.autograd.grad(y, [leaf, *params], grad)
        return y.detach()

    return train, lambda: last


def fastest_sgd(params: list[nn.Parameter]) -> torch.optim.SGD:
    """torch.optim.SGD in the implementation that is fastest for these parameters, here and now."""
    variants: list[dict[str, bool]] = [{"fused": True}, {"foreach": True}, {"foreach": False}]
    best = min(variants, key=lambda variant: _sgd_seconds(params, variant))
    return torch.optim.SGD(params, LEARNING_RATE, MOMENTUM, **best)


def _sgd_seconds(params: list[nn.Parameter], variant: dict[str, bool]) -> float:
    """The least time of a few steps on copies of params."""
    copies = [torch.zeros_like(p).requires_grad_() for p in params]
    for p in copies:
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.SGD(copies, LEARNING_RATE, MOMENTUM, **variant)
    optimizer.step()
    return min(timeit.repeat(optimizer.step, number=1, repeat=10))
