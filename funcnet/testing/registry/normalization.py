"""The normalisations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcnet.interop import blocks
from funcnet.layer import Layer, Shape
from funcnet.layers import BatchNorm, ChannelAffine, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from funcnet.testing.registry.row import Row, same_name

_EPS = [1e-5, 0.1, 2.0]  # not 0, with which a constant set gives NaN


def _over_last_axes(layer: Any, shape: Shape) -> nn.Module:
    return same_name(layer, shape, shape[-layer.num_dims :])


class _GroupNorm(nn.GroupNorm):
    """nn.GroupNorm without its refusal of an only example with a single value per group."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class _InstanceNorm(nn.InstanceNorm2d):
    """nn.InstanceNorm1d, 2d and 3d in one: they differ in the rank that they take."""

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)


def _twin(layer: Any, shape: Shape) -> nn.Module:
    cls = blocks.BatchNorm if isinstance(layer, BatchNorm) else _InstanceNorm
    return cls(shape[0], eps=layer.eps, affine=layer.affine, track_running_stats=False)


_LAYER_NORMS: tuple[tuple[Layer, Shape], ...] = (
    (LayerNorm(), (5,)),
    (LayerNorm(2, eps=0.1), (3, 2, 4)),
    (LayerNorm(bias=False), (3, 6)),
    (LayerNorm(elementwise_affine=False), (2, 3)),
    (LayerNorm(), (4, 1)),  # nothing but the bias is left
)

ROWS = (
    Row(LayerNorm, _LAYER_NORMS, {"num_dims": [1, 2], "eps": _EPS}, twin=_over_last_axes),
    Row(
        RMSNorm,
        (
            (RMSNorm(), (5,)),
            (RMSNorm(), (4, 3)),
            (RMSNorm(2, eps=0.1), (3, 2, 4)),
            (RMSNorm(elementwise_affine=False), (2, 3)),
        ),
        {"num_dims": [1, 2], "eps": _EPS},
        twin=_over_last_axes,
    ),
    Row(
        GroupNorm,
        (
            (GroupNorm(2), (4, 3, 2)),
            (GroupNorm(3, affine=False), (6, 2)),
            (GroupNorm(1), (4,)),
            (GroupNorm(2, eps=0.1), (2, 1, 3, 2)),
        ),
        {"num_groups": [1, 2, 3], "eps": _EPS},
        twin=lambda layer, shape: _GroupNorm(layer.num_groups, shape[0], layer.eps, layer.affine),
    ),
    Row(
        InstanceNorm,
        (
            (InstanceNorm(), (3, 4, 2)),
            (InstanceNorm(affine=True), (2, 3)),
            (InstanceNorm(eps=0.1, affine=True), (1, 2, 1, 3)),
        ),
        {"eps": _EPS},
        twin=_twin,
    ),
    Row(
        BatchNorm,
        (
            (BatchNorm(), (3, 4, 2)),
            (BatchNorm(affine=False), (3, 2)),
            (BatchNorm(eps=0.1), (4,)),
            (BatchNorm(), (2, 1, 3, 2)),
        ),
        {"eps": _EPS},
        twin=_twin,
        needs_key=True,
    ),
    Row(
        ChannelAffine,
        ((ChannelAffine(), (3, 4, 2)), (ChannelAffine(), (3,)), (ChannelAffine(), (2, 5))),
        twin=lambda _, shape: blocks.ChannelAffine(shape[0]),
    ),
)
