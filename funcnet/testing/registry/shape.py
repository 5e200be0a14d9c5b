"""Layers that move entries and change none."""

from __future__ import annotations

from itertools import product

from funcnet.interop import blocks
from funcnet.layer import Layer
from funcnet.layers import Flatten, Identity, Permute, Reshape, Select
from funcnet.testing.registry.row import Choose, Row, same_name


def _flatten(choose: Choose) -> Layer:
    ends = [1, 2, -2, -1]
    never = [(2, 1), (-1, -2)]
    return Flatten(*choose([pair for pair in product(ends, ends) if pair not in never]))


def _reshape(choose: Choose) -> Layer:
    return Reshape(*choose([(-1,), (2, -1), (-1, 1, 3), (4,), (2, 1, 6)]))


def _permute(choose: Choose) -> Layer:
    return Permute(*choose([(0, 1), (0, 2, 1), (0,), (0, 2, 3, 1), (0, 3, 1, 2), (0, 3, 2, 1)]))


ROWS = (
    Row(Identity, ((Identity(), (3, 4)), (Identity(), ())), twin=same_name),
    Row(
        Flatten,
        ((Flatten(), (3, 4, 5)), (Flatten(2, -2), (2, 3, 2, 4)), (Flatten(-1), (3,))),
        build=_flatten,
        twin=same_name,
    ),
    Row(
        Reshape,
        ((Reshape(3, -1), (6, 4)), (Reshape(4), (2, 2)), (Reshape(), (1,)), (Reshape(-1, 1), (2,))),
        build=_reshape,
        twin=lambda layer, _: blocks.Reshape(layer.shape),
    ),
    Row(
        Permute,
        ((Permute(0, 2, 3, 1), (3, 4, 5)), (Permute(0, 2, 1), (2, 3)), (Permute(0), ())),
        build=_permute,
        twin=lambda layer, _: blocks.Permute(layer.dims),
    ),
    Row(
        Select,
        ((Select(1, -1), (3, 4)), (Select(-1, 0), (2, 3, 4)), (Select(1, 2), (3,))),
        settings={"dim": [1, -1, 2], "index": [0, -1, 1]},
        twin=lambda layer, _: blocks.Select(layer.dim, layer.index),
    ),
)
