"""The same network, with the same weights, in other libraries."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

import funcnet as fn
from funcnet.layer import Tree


def to_torch(net: fn.Sequential, params: Tree, shape: tuple[int, ...]) -> nn.Sequential:
    """The torch.nn.Sequential that computes `net`, holding copies of params."""
    modules: list[nn.Module] = []
    for layer, layer_shape in zip(net, shapes(net, shape), strict=False):
        modules += _modules(layer, layer_shape[0])
    model = nn.Sequential(*modules)
    weights = [leaf for tree in params for leaf in leaves(tree)]
    with torch.no_grad():
        for slot, weight in zip(model.parameters(), weights, strict=True):
            slot.data = weight.clone()
    return model


def leaves(params: Tree) -> list[torch.Tensor]:
    """Weight, then bias, of one layer's parameters: the order of torch.nn."""
    return [params[name] for name in ("weight", "bias") if name in params]


def shapes(net: fn.Sequential, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The shape of one example before each layer, then after the last."""
    yield shape
    for layer in net:
        shape = layer.out_shape(shape)
        yield shape


def _modules(layer: fn.Layer, channels: int) -> list[nn.Module]:
    if isinstance(layer, fn.Conv2d):
        options = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.bias)
        return [nn.Conv2d(channels, layer.out_channels, layer.kernel_size, *options)]
    if isinstance(layer, fn.UpsampleConv2d):
        conv = fn.Conv2d(
            layer.out_channels, layer.kernel_size, padding=layer.padding, bias=layer.bias
        )
        return _modules(fn.Upsample2d(layer.scale), channels) + _modules(conv, channels)
    if isinstance(layer, fn.Upsample2d):
        return [nn.Upsample(scale_factor=layer.scale, mode="nearest")]
    if isinstance(layer, fn.Sigmoid):
        return [nn.Sigmoid()]
    if isinstance(layer, fn.ReLU):
        return [nn.ReLU()]
    raise ValueError(f"expected a layer that torch.nn has, got {layer}")
