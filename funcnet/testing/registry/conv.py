"""The convolutions."""

from __future__ import annotations

from typing import Any

from torch import nn

from funcnet.layer import Layer, Shape
from funcnet.layers import Conv2d
from funcnet.testing.registry.row import Choose, Row, per_axis


def _conv2d(choose: Choose) -> Layer:
    groups = choose([1, 2, 3])
    kernel_size = choose(per_axis(1, 4, 2))
    stride = choose([*per_axis(1, 3, 2), *[kernel_size] * 3])
    paddings: list[Any] = [*per_axis(0, 4, 2), *["valid"] * 3]
    return Conv2d(
        groups * choose({1: [1, 2, 3, 4], 2: [1, 2, 1, 2], 3: [1, 1, 1, 1]}[groups]),
        kernel_size,
        stride=stride,
        padding=choose([*paddings, *["same"] * 10] if stride == (1, 1) else paddings),
        dilation=choose(per_axis(1, 3, 2)),
        groups=groups,
        bias=choose([False, True]),
        method=choose(["auto", "unfold"]),
    )


def _twin(layer: Any, shape: Shape) -> nn.Module:
    options = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.bias)
    return nn.Conv2d(shape[0], layer.out_channels, layer.kernel_size, *options)


ROWS = (
    Row(
        Conv2d,
        (
            (Conv2d(4, 2, stride=2), (3, 8, 6)),  # patches that do not overlap
            (Conv2d(4, 2, stride=2, bias=False), (3, 5, 7)),  # with a remainder
            (Conv2d(6, (3, 2), stride=(2, 1), padding=(1, 3), dilation=2, groups=3), (3, 9, 5)),
            (Conv2d(6, (3, 2), padding="same", groups=2, method="unfold"), (4, 5, 4)),
            (Conv2d(2, 4, padding="same", dilation=3), (1, 4, 5)),
        ),
        build=_conv2d,
        twin=_twin,
    ),
)
