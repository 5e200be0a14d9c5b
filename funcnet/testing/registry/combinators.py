"""The layers made of layers."""

from __future__ import annotations

from funcnet.combinators import Sequential
from funcnet.layer import Layer
from funcnet.layers import Conv2d, ReLU, Sigmoid, Upsample2d, UpsampleConv2d
from funcnet.testing.registry.row import Choose, Row


def _sequential(choose: Choose) -> Layer:
    part = [ReLU(), Sigmoid(), Upsample2d(2), Conv2d(2, 1), UpsampleConv2d(2), Sequential(ReLU())]
    return Sequential(*(choose(part) for _ in range(choose([0, 1, 2, 3]))))


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
        ),
        build=_sequential,
    ),
)
