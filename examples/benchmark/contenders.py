"""The contenders: the same training step and the same inference, each as its users write it.

Each makes weights, optimizer state and data of its own, so that none disturbs another, and gets its
data in the memory layout it is best with; only funcnet is handed whole networks' data in PyTorch's
default layout, and converts it within the time that is measured.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from problem import Problem
from torch import Tensor, nn
from translate import leaves, to_torch

import funcnet as fn
from funcnet.testing.registry import LOSSES


@dataclass(frozen=True)
class Contender:
    """A training step and an inference to be timed.

    `train` does one training step and returns the loss, `infer` returns the output. `state` is what
    the steps have made of it, in PyTorch's order and layouts: the parameters and Adam's first
    moments, since Adam's steps do not tell a gradient from its double; or for a layer on its own
    the last gradients with respect to x and parameters (`train` then returns the output).
    """

    train: Callable[[], Any]
    infer: Callable[[], Any]
    state: Callable[[], list[Tensor]]
    as_tensor: Callable[[Any], Tensor] = torch.as_tensor
    """Makes a tensor of what `train` and `infer` return."""


def funcnet_in_place(problem: Problem) -> Contender:
    """`value_and_grad` and the optimiser's `step_`."""
    return _funcnet(problem, "step_")


def funcnet_pure(problem: Problem) -> Contender:
    """`value_and_grad` and the pure `step`, which makes new trees."""
    return _funcnet(problem, "step")


def funcnet_compiled(problem: Problem, compiler: Callable[[Any], Any]) -> Contender:
    """The whole pure step, and the forward pass, each compiled."""
    return _funcnet(problem, "step", compiler)


def _as_it_is(function: Any) -> Any:
    return function


def _funcnet(
    problem: Problem, step_name: str, compiler: Callable[[Any], Any] = _as_it_is
) -> Contender:
    if problem.network.is_layer:
        return _funcnet_layer(problem, compiler)
    net, params, x, target = problem.net, problem.params(), problem.x(), problem.target()
    optimizer: Any = problem.network.optimizer
    update, loss_and_grads = (
        getattr(optimizer, step_name),
        fn.value_and_grad(net, problem.network.loss),
    )
    state = optimizer.init(params)

    def step(params: Any, state: Any, x: Tensor, target: Tensor) -> Any:
        loss, grads = loss_and_grads(params, x, target)
        return loss, *update(params, grads, state)

    step, apply = compiler(step), compiler(net.apply)

    def train() -> Tensor:
        nonlocal params, state
        loss, params, state = step(params, state, x, target)
        return loss

    return Contender(
        train,
        lambda: apply(params, x),
        lambda: [leaf for tree in (*params, *getattr(state, "first", ())) for leaf in leaves(tree)],
    )


def _funcnet_layer(problem: Problem, compiler: Callable[[Any], Any]) -> Contender:
    layer, (params,) = problem.net, problem.params()
    x, grad = (laid_out(t, torch.channels_last) for t in (problem.x(), problem.target()))
    last: tuple[Any, Any] = ((), None)

    def step(params: Any, x: Tensor, grad: Tensor) -> Any:
        y, residuals = layer.fwd(params, x)
        return y, layer.bwd(params, residuals, grad)

    step, apply = compiler(step), compiler(layer.apply)

    def train() -> Tensor:
        nonlocal last
        y, last = step(params, x, grad)
        return y

    def state() -> list[Tensor]:
        dparams, dx = last
        return [dx, *leaves(dparams)]

    return Contender(train, lambda: apply(params, x), state)


def laid_out(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """Images and volumes in a memory format; other tensors have none."""
    return tensor.to(memory_format=_format_of(tensor, layout))


def _format_of(x: Tensor, layout: torch.memory_format) -> torch.memory_format:
    """The memory format for x's rank that a format of images, (N, C, H, W), stands for."""
    if layout == torch.contiguous_format:
        return layout
    return {4: layout, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)


def torch_nn(
    problem: Problem,
    layout: torch.memory_format,
    compiler: Callable[[Any], Any] = _as_it_is,
) -> Contender:
    """torch.nn, autograd and torch.optim, perhaps compiled, perhaps under autocast."""
    model = to_torch(problem.network.net, problem.params(), problem.network.shape)
    model = model.to(memory_format=_format_of(problem.x(), layout))
    x, target = laid_out(problem.x(), layout), laid_out(problem.target(), layout)
    forward = _autocast(model, problem.device) if problem.mixed else model
    predict = torch.inference_mode()(compiler(forward))
    if problem.network.is_layer:
        step, state = _torch_layer(compiler(forward), list(model.parameters()), x, target)
        return Contender(step, lambda: predict(x), state)
    criterion = LOSSES[type(problem.network.loss)].twin(problem.network.loss)
    loss_of = compiler(lambda x, target: criterion(forward(x), target))
    optimizer = fastest(problem.network.optimizer, list(model.parameters()))

    def train() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = loss_of(x, target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def state() -> list[Tensor]:
        params = list(model.parameters())
        learned = [p.detach() for p in params]
        if not isinstance(problem.network.optimizer, fn.Adam):
            return learned
        # There are none before the first step.
        return learned + [optimizer.state[p].get("exp_avg", torch.zeros_like(p)) for p in params]

    return Contender(train, lambda: predict(x), state)


def _autocast(model: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The model under autocast, its output in float32, as a loss wants it."""

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            y: Tensor = model(x)
        return y.float()

    return forward


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


def fastest(ours: Any, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """torch.optim's twin of an optimiser, in the implementation that is fastest, here and now."""
    variants: list[dict[str, bool]] = [{"fused": True}, {"foreach": True}, {"foreach": False}]
    best = min(variants, key=lambda variant: _update_seconds(ours, params, variant))
    return _twin(ours, params, best)


def _twin(ours: Any, params: list[nn.Parameter], variant: dict[str, bool]) -> torch.optim.Optimizer:
    settings = {f.name: getattr(ours, f.name) for f in fields(ours) if f.init}
    twin: type[torch.optim.Optimizer] = getattr(torch.optim, type(ours).__name__)
    return twin(params, **settings, **variant)


def _update_seconds(ours: Any, params: list[nn.Parameter], variant: dict[str, bool]) -> float:
    """The least time of a few steps on copies of params."""
    copies = [torch.zeros_like(p).requires_grad_() for p in params]
    for p in copies:
        p.grad = torch.zeros_like(p)
    optimizer = _twin(ours, copies, variant)  # type: ignore[arg-type]
    optimizer.step()
    return min(timeit.repeat(optimizer.step, number=1, repeat=10))
