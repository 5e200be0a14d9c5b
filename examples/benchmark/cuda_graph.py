"""funcnet's whole pure training step as one CUDA graph.

A step is a function of (params, state, batch) without side effects or decisions that depend on the
data, so it can be recorded once and replayed: a single launch a step. The graph reads and writes
fixed memory, so its last act is to copy the new trees over the old ones; a new batch would be
copied into `x` and `target`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from contenders import Contender
from problem import Problem
from torch import Tensor
from translate import leaves

import funcnet as fn
from funcnet.layer import Tree


def funcnet_graph(problem: Problem) -> Contender:
    """Forward, loss, backward and update, and the forward pass alone, each a graph."""
    net, params = problem.net, problem.params()
    x, target = problem.x(), problem.target()
    sgd: Any = problem.network.optimizer  # Adam's step count would be recorded as a constant
    loss_and_grads = fn.value_and_grad(net, problem.network.loss)
    state = sgd.init(params)
    memory = _leaves(params, state)
    start = [leaf.clone() for leaf in memory]

    def step() -> Tensor:
        loss, grads = loss_and_grads(params, x, target)
        new_params, new_state = sgd.step(params, grads, state)
        torch._foreach_copy_(memory, _leaves(new_params, new_state))
        return loss

    train, infer = record(step), record(lambda: net.apply(params, x))
    torch._foreach_copy_(memory, start)  # recording took a few steps
    return Contender(train, infer, lambda: [leaf for tree in params for leaf in leaves(tree)])


def record(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function that replays what `function` does; its result is overwritten by the next call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _leaves(params: Tree, state: fn.SGDState) -> list[Tensor]:
    """The tensors in the fixed memory, in one order."""
    return [*optree.tree_leaves(params), *optree.tree_leaves(state.momentum)]
