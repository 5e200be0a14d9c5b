"""Ensembles by torch.func.vmap over parameters: funcnet beside torch.nn and torch.func.grad.

A row is the gradients of all networks of an ensemble on one batch, or their outputs alone. What
both compute is compared first. Contenders run in turns; ratios are of medians.

    python examples/benchmark/ensembles.py           half a minute
"""

from __future__ import annotations

from collections.abc import Iterator

import optree
import torch
from more_layers import Row, print_table
from networks import denoiser, transformer
from torch import Tensor, nn
from translate import leaves, to_torch

import funcnet as fn

MEMBERS = 8
NETWORKS: dict[str, tuple[fn.Sequential, tuple[int, ...]]] = {
    "mlp": (
        fn.Sequential(fn.Linear(128), fn.ReLU(), fn.Linear(128), fn.ReLU(), fn.Linear(10)),
        (64,),
    ),
    "convolutions": (
        fn.Sequential(
            fn.Conv2d(16, 3, padding=1), fn.ReLU(),
            fn.Conv2d(32, 3, stride=2, padding=1), fn.ReLU(),
            fn.Flatten(), fn.Linear(10),
        ),
        (3, 16, 16),
    ),
    "denoiser": (denoiser(), (3, 16, 16)),
    "transformer": (transformer(32, 2), (16, 32)),
}  # fmt: skip


def rows(batch: int = 16) -> Iterator[Row]:
    for name, (net, shape) in NETWORKS.items():
        yield from _rows(name, net, fn.normal(fn.key(1), (batch, *shape)))


def _rows(name: str, net: fn.Sequential, x: Tensor) -> Iterator[Row]:
    shape = tuple(x.shape[1:])
    members = [net.init(key, shape) for key in fn.split(fn.key(0), MEMBERS)]
    ensemble = optree.tree_map(lambda *leaves: torch.stack(leaves), *members)
    modules = [to_torch(net, params, shape) for params in members]
    stacked, _ = torch.func.stack_module_state(modules)
    # Autograd would record all that is done with the leaves that these are.
    theirs = {name: weight.detach() for name, weight in stacked.items()}
    target = fn.normal(fn.key(2), (len(x), *net.out_shape(shape)))
    value_and_grad = fn.value_and_grad(net, fn.MSE())
    steps = torch.func.vmap(lambda params: value_and_grad(params, x, target)[1])
    outputs = torch.func.vmap(lambda params: net.apply(params, x))

    def module(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(modules[0], weights, (x,))

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(module(weights), target)

    their_steps, their_outputs = torch.func.vmap(torch.func.grad(loss)), torch.func.vmap(module)
    yield Row(name, lambda: leaves(steps(ensemble)), lambda: [*their_steps(theirs).values()])
    yield Row(f"{name}, forward", lambda: [outputs(ensemble)], lambda: [their_outputs(theirs)])


if __name__ == "__main__":
    print_table(__doc__, f"| {MEMBERS} networks | funcnet | torch.func | ratio |", rows())
