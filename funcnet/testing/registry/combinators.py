"""The layers made of layers."""

from __future__ import annotations

from typing import Any

import torch

from funcnet.combinators import (
    Cast,
    Concat,
    Frozen,
    Loop,
    Product,
    Recompute,
    Repeat,
    Residual,
    Reversible,
    Sequential,
    Sum,
)
from funcnet.layer import Layer
from funcnet.layers import Conv2d, ReLU, Sigmoid, Upsample2d, UpsampleConv2d
from funcnet.testing.registry.row import Choose, Row

_CONV = Conv2d(2, 3, padding=1)
_HALF = Conv2d(1, (1, 3), padding="same")


def _sequential(choose: Choose) -> Layer:
    part = [ReLU(), Sigmoid(), Upsample2d(2), Conv2d(2, 1), UpsampleConv2d(2), Sequential(ReLU())]
    return Sequential(*(choose(part) for _ in range(choose([0, 1, 2, 3]))))


def _same_shape(choose: Choose, channels: int = 2) -> Layer:
    """A layer that keeps the shape of images with so many channels, or of any x."""
    conv = Conv2d(channels, choose([1, 3]), padding="same")
    return choose(
        [
            Sigmoid(),
            conv,
            ReLU(),
            Sequential(a=conv, b=Sigmoid()),
            Sequential(ReLU(), conv),
            Residual(conv),
            Sum(conv, Sigmoid()),
            Product(conv, Sigmoid()),
            Recompute(Sequential(conv, Sigmoid())),
            Repeat(Residual(conv), 2),
            Loop(Sequential(conv, Sigmoid()), 2),
            Frozen(conv),
        ]
    )


def _wrapped(cls: Any) -> Any:
    return lambda choose: cls(_same_shape(choose))


def _turns(cls: Any) -> Any:
    return lambda choose: cls(_same_shape(choose), choose([1, 2, 3]))


def _joined(cls: Any) -> Any:
    def build(choose: Choose) -> Any:
        layers = [_same_shape(choose) for _ in range(choose([2, 1, 3]))]
        by_name = choose([False, True])
        return cls(**dict(zip("abc", layers, strict=False))) if by_name else cls(*layers)

    return build


def _concat(choose: Choose) -> Layer:
    layers = [_same_shape(choose) for _ in range(choose([2, 1, 3]))]
    return Concat(*layers, dim=choose([1, -1, 2]))


def _reversible(choose: Choose) -> Layer:
    channels = choose([1, 2])
    return Reversible(*(_same_shape(choose, channels) for _ in range(choose([2, 4]))))


ROWS = (
    Row(
        Sequential,
        (
            (Sequential(), (3, 4)),
            (Sequential(ReLU(), Sequential(Sigmoid(), Sequential())), (3, 2)),
            (
                Sequential(
                    Conv2d(4, 2, stride=2),
                    ReLU(),
                    Sequential(Conv2d(6, 2, stride=2), ReLU()),
                    UpsampleConv2d(4),
                    ReLU(),
                    UpsampleConv2d(3),
                    Sigmoid(),
                ),
                (3, 8, 8),
            ),
            (Sequential(Upsample2d(2), ReLU(), Conv2d(2, 3), ReLU()), (1, 2, 2)),
            (Sequential(UpsampleConv2d(16, bias=False), Sigmoid()), (2, 2, 3)),
            (Sequential(stem=_CONV, b=ReLU(), a=Sequential(layers=_CONV, names=ReLU())), (3, 4, 4)),
            # In place behind layers whose y or dx is new
            (Sequential(Residual(Sigmoid()), ReLU(), Sum(_CONV, _CONV), ReLU()), (2, 3, 4)),
            (Sequential(Recompute(_CONV), ReLU(), Concat(_CONV, Sigmoid()), ReLU()), (2, 3, 4)),
        ),
        build=_sequential,
    ),
    Row(
        Residual,
        (
            (Residual(_CONV), (2, 4, 3)),
            (Residual(Sequential(_CONV, ReLU(), _CONV)), (2, 4, 3)),
            (Residual(Sigmoid()), (4,)),
            (Residual(Residual(Sequential())), (4,)),
        ),
        build=_wrapped(Residual),
    ),
    Row(
        Sum,
        (
            (Sum(_CONV, Conv2d(2, 1)), (3, 4, 3)),
            (Sum(left=_CONV, right=Sigmoid(), middle=_CONV), (2, 4, 3)),
            (Sum(Sigmoid()), (4,)),
            (Sum(Sigmoid(), ReLU(), ReLU()), (4,)),
        ),
        build=_joined(Sum),
    ),
    Row(
        Product,
        (
            (Product(_CONV, Sequential(_CONV, Sigmoid())), (3, 4, 3)),
            (Product(ReLU(), Sequential(Conv2d(2, (4, 3)), Sigmoid())), (2, 4, 3)),  # (2, 1, 1)
            (Product(Conv2d(2, (4, 1)), Conv2d(2, (1, 3)), Sigmoid()), (2, 4, 3)),
            (Product(x=Sigmoid(), gate=ReLU()), (4,)),
            (Product(Sigmoid()), (4,)),
        ),
        build=_joined(Product),
    ),
    Row(
        Concat,
        (
            (Concat(Sigmoid(), Sequential(_CONV, ReLU())), (3, 4, 3)),
            (Concat(skip=Sigmoid(), conv=_CONV, dim=-1), (2, 4, 3)),
            (Concat(Conv2d(2, (1, 2)), _CONV, _CONV, dim=3), (2, 4, 3)),
            (Concat(ReLU()), (4,)),
        ),
        build=_concat,
    ),
    Row(
        Recompute,
        (
            (Recompute(Sequential(_CONV, ReLU(), _CONV, Sigmoid())), (2, 4, 3)),
            (Recompute(Sequential(Recompute(_CONV), Recompute(ReLU()))), (2, 4, 3)),
            (Recompute(_CONV), (2, 4, 3)),
        ),
        build=_wrapped(Recompute),
    ),
    Row(
        Reversible,
        (
            (Reversible(_HALF, Sequential(_HALF, Sigmoid())), (2, 3, 4)),
            (Reversible(_HALF, Sigmoid(), Sequential(), _HALF), (2, 3, 4)),
            (Reversible(Sigmoid(), Sigmoid()), (4,)),
            (Reversible(Frozen(_HALF), Sigmoid(), _HALF, Residual(_HALF)), (2, 3, 4)),
        ),
        build=_reversible,
    ),
    Row(
        Repeat,
        (
            (Repeat(Sequential(_CONV, Sigmoid()), 3), (2, 3, 4)),
            (Repeat(Repeat(Sequential(a=_CONV, b=ReLU()), 2), 2), (2, 3, 4)),
            (Repeat(Sigmoid(), 2), (4,)),
        ),
        build=_turns(Repeat),
    ),
    Row(
        Loop,
        (
            (Loop(Sequential(_CONV, Sigmoid()), 3), (2, 3, 4)),
            (Loop(Repeat(_CONV, 2), 2), (2, 3, 4)),
            (Loop(Sigmoid(), 1), (4,)),
        ),
        build=_turns(Loop),
    ),
    Row(
        Frozen,
        (
            (Frozen(_CONV), (2, 3, 4)),
            (Frozen(Sequential(a=_CONV, b=Repeat(_CONV, 2))), (2, 3, 4)),
            (Frozen(Sigmoid()), (4,)),
        ),
        build=_wrapped(Frozen),
    ),
    Row(
        Cast,
        (
            # To float64: what a lower precision rounds off, central differences see.
            (Cast(Sequential(_CONV, ReLU()), torch.float64), (2, 3, 4)),
            (Cast(Residual(Cast(_CONV, torch.float64)), torch.float64), (2, 3, 4)),
        ),
        build=lambda choose: Cast(_same_shape(choose), torch.float64),
    ),
)
