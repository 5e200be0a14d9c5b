"""The convolutions, and the transposed ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from funcnet.initializers import Normal, Zeros
from funcnet.layer import Layer, Shape
from funcnet.layers import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from funcnet.testing.registry.row import Choose, Row, per_axis, same_name

_CHANNELS_PER_GROUP = {1: [1, 2, 3, 4], 2: [1, 2, 1, 2], 3: [1, 1, 1, 1]}


def _conv(cls: Any, *examples: tuple[Layer, Shape]) -> Row:
    axes = len(cls._axes) - 1
    most = 4 if axes < 3 else 3

    def build(choose: Choose) -> Layer:
        groups = choose([1, 2, 3])
        kernel_size = choose(per_axis(1, most, axes))
        stride = choose([*per_axis(1, 3, axes), *[kernel_size] * 3])
        paddings: list[Any] = [*per_axis(0, most, axes), *["valid"] * 3]
        methods: dict[str, Any] = {"method": choose(["auto", "unfold"])} if axes == 2 else {}
        layer: Layer = cls(
            groups * choose(_CHANNELS_PER_GROUP[groups]),
            kernel_size,
            stride=stride,
            padding=choose([*paddings, *["same"] * 10] if set(stride) == {1} else paddings),
            dilation=choose(per_axis(1, 3, axes)),
            groups=groups,
            bias=choose([False, True]),
            **methods,
        )
        return layer

    return Row(cls, examples, build=build, twin=_twin)


def _conv_transpose(cls: Any, *examples: tuple[Layer, Shape]) -> Row:
    axes = len(cls._axes) - 1

    def build(choose: Choose) -> Layer:
        groups = choose([1, 2, 3])
        stride, dilation = choose(per_axis(1, 3, axes)), choose(per_axis(1, 3, axes))
        most = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
        layer: Layer = cls(
            groups * choose(_CHANNELS_PER_GROUP[groups]),
            choose(per_axis(1, 4 if axes < 3 else 3, axes)),
            stride=stride,
            padding=choose(per_axis(0, 2, axes)),
            output_padding=tuple(choose([*range(n + 1)]) for n in most),
            groups=groups,
            bias=choose([False, True]),
            dilation=dilation,
        )
        return layer

    return Row(cls, examples, build=build, twin=_twin)


def _twin(layer: Any, shape: Shape) -> nn.Module:
    return same_name(layer, shape, shape[0])


ROWS = (
    _conv(
        Conv1d,
        (Conv1d(4, 3, padding=1), (3, 6)),
        (Conv1d(4, 2, stride=2, bias=False), (3, 5)),  # patches, with a remainder
        (Conv1d(6, 4, padding="same", dilation=3, groups=2), (4, 5)),
        (Conv1d(3, 3, stride=2, padding=4, dilation=2, groups=3), (3, 1)),
        (Conv1d(2, 2, padding="valid", weight_init=Normal(std=0.5), bias_init=Zeros()), (1, 4)),
    ),
    _conv(
        Conv2d,
        (Conv2d(4, 2, stride=2), (3, 8, 6)),  # patches that do not overlap
        (Conv2d(4, 2, stride=2, bias=False), (3, 5, 7)),  # with a remainder
        (Conv2d(6, (3, 2), stride=(2, 1), padding=(1, 3), dilation=2, groups=3), (3, 9, 5)),
        (Conv2d(6, (3, 2), padding="same", groups=2, method="unfold"), (4, 5, 4)),
        (Conv2d(2, 4, padding="same", dilation=3), (1, 4, 5)),
    ),
    _conv(
        Conv3d,
        (Conv3d(2, 3, padding=1), (3, 2, 3, 4)),
        (Conv3d(4, (1, 2, 2), stride=(1, 2, 2), groups=2, bias=False), (2, 2, 5, 4)),
        (Conv3d(2, (2, 3, 1), padding="same", dilation=(3, 1, 2)), (1, 2, 3, 2)),
        (Conv3d(3, 2, stride=(2, 1, 3), padding=(0, 2, 1), dilation=2), (2, 3, 2, 3)),
    ),
    _conv_transpose(
        ConvTranspose1d,
        (ConvTranspose1d(4, 4, stride=2, padding=1), (3, 4)),
        (ConvTranspose1d(4, 2, stride=3, output_padding=2, groups=2, bias=False), (2, 3)),
        # More entries than a stride
        (ConvTranspose1d(2, 2, output_padding=2, dilation=3, padding=1), (1, 2)),
    ),
    _conv_transpose(
        ConvTranspose2d,
        (ConvTranspose2d(4, 2, stride=2), (3, 3, 4)),
        (ConvTranspose2d(2, 3, stride=2, padding=1, output_padding=1), (4, 3, 2)),
        (ConvTranspose2d(6, (3, 1), stride=(1, 3), groups=3, bias=False), (3, 2, 3)),
        (ConvTranspose2d(1, 2, dilation=(3, 2), output_padding=(2, 1)), (1, 1, 2)),
    ),
    _conv_transpose(
        ConvTranspose3d,
        (ConvTranspose3d(2, 2, stride=2), (3, 2, 1, 2)),
        (
            ConvTranspose3d(
                4,
                (1, 3, 2),
                stride=(1, 2, 3),
                padding=(0, 1, 1),
                output_padding=(0, 1, 2),
                groups=2,
            ),
            (2, 2, 2, 3),
        ),
        (ConvTranspose3d(1, 2, dilation=2, output_padding=1, bias=False), (1, 1, 2, 2)),
    ),
)
