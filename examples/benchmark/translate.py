"""The same network, with the same weights, in torch.nn: by the twins of funcnet's registry."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import funcnet as fn
from funcnet.layer import Tree
from funcnet.testing.registry import REGISTRY


def to_torch(net: fn.Sequential, params: Tree, shape: tuple[int, ...]) -> nn.Sequential:
    """The torch.nn.Sequential that computes `net`, holding copies of params."""
    modules = map(_module, net, params, shapes(net, shape))
    return nn.Sequential(*modules)


def leaves(params: Tree) -> list[torch.Tensor]:
    """The tensors of one layer's parameters, in the order of torch.nn."""
    if isinstance(params, torch.Tensor):
        return [params]
    values = params.values() if isinstance(params, dict) else params
    return [leaf for value in values for leaf in leaves(value)]


def shapes(net: fn.Sequential, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shape of one example before each layer, then after the last."""
    found = [shape]
    for layer in net:
        found.append(layer.out_shape(found[-1]))
    return found


def _module(layer: fn.Layer, params: Tree, shape: tuple[int, ...]) -> nn.Module:
    if isinstance(layer, fn.Sequential):
        return to_torch(layer, params, shape)
    if isinstance(layer, fn.Residual):
        return _Residual(_module(layer.layer, params, shape))
    if isinstance(layer, fn.Concat):
        branches = [_module(*pair, shape) for pair in zip(layer, params, strict=True)]
        return _Concat(branches, layer.dim)
    twin: Any = REGISTRY[type(layer)].twin
    if twin is None:
        raise ValueError(f"expected a layer that torch.nn has, got {layer}")
    module: nn.Module = twin(layer, shape)
    with torch.no_grad():
        for slot, weight in zip(module.parameters(), leaves(params), strict=True):
            slot.data = weight.clone()
    return module


class _Residual(nn.Module):
    """`fn.Residual` as users of torch.nn write it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.inner(x)
        return y


class _Concat(nn.Module):
    """`fn.Concat` as users of torch.nn write it."""

    def __init__(self, branches: list[nn.Module], dim: int) -> None:
        super().__init__()
        self.branches, self.dim = nn.ModuleList(branches), dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], self.dim)
