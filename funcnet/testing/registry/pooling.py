"""Pooling: of windows, and to a given size."""

from __future__ import annotations

from typing import Any

from torch import nn

from funcnet.layer import Layer, Shape
from funcnet.layers import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
)
from funcnet.layers.pooling import MaxPool
from funcnet.testing.registry.row import Choose, Row, per_axis, same_name


def _windowed(cls: Any, *examples: tuple[Layer, Shape]) -> Row:
    """The row of a layer with any padding that its kernel allows."""
    axes = len(cls._axes) - 1
    most = 4 if axes < 3 else 3

    def build(choose: Choose) -> Layer:
        kernel_size = choose(per_axis(1, most, axes))
        layer: Layer = cls(
            kernel_size,
            stride=choose([None, *per_axis(1, 3, axes)]),
            padding=tuple(choose([*range(k // 2 + 1)]) for k in kernel_size),
            ceil_mode=choose([False, True]),
            **(
                {"dilation": choose(per_axis(1, most - 1, axes))}
                if issubclass(cls, MaxPool)
                else {"count_include_pad": choose([False, True])}
            ),
        )
        return layer

    return Row(cls, examples, build=build, twin=same_name)


def _adaptive_twin(layer: Any, shape: Shape) -> nn.Module:
    # In one dimension, torch.nn knows no None.
    size = [n if m is None else m for m, n in zip(layer.output_size, shape[1:], strict=True)]
    twin: nn.Module = getattr(nn, type(layer).__name__)(tuple(size))
    return twin


def _adaptive(cls: Any, *examples: tuple[Layer, Shape]) -> Row:
    axes = len(cls._axes) - 1
    some_kept = [(2, *[None] * (axes - 1))] if axes > 1 else []
    sizes = [*per_axis(1, 4, axes), None, *some_kept]
    return Row(cls, examples, settings={"output_size": sizes}, twin=_adaptive_twin)


ROWS = (
    _windowed(
        MaxPool1d,
        (MaxPool1d(2), (2, 5)),
        (MaxPool1d(3, 2, 1, ceil_mode=True), (1, 6)),
        (MaxPool1d(2, 1, 1, dilation=2), (2, 3)),
    ),
    _windowed(
        MaxPool2d,
        (MaxPool2d(2), (2, 4, 6)),
        (MaxPool2d(3, 2, 1), (1, 5, 4)),
        (MaxPool2d((2, 3), (3, 1), (1, 0), ceil_mode=True), (2, 6, 4)),
        (MaxPool2d(2, 1, dilation=(1, 2)), (3, 3, 4)),
    ),
    _windowed(
        MaxPool3d,
        (MaxPool3d(2), (2, 2, 3, 4)),
        (MaxPool3d((1, 2, 3), 2, (0, 1, 1), ceil_mode=True), (1, 3, 4, 4)),
    ),
    _windowed(
        AvgPool1d,
        (AvgPool1d(2), (2, 5)),
        (AvgPool1d(3, 2, 1, ceil_mode=True), (1, 6)),
        (AvgPool1d(4, 3, 2, count_include_pad=False), (2, 7)),
    ),
    _windowed(
        AvgPool2d,
        (AvgPool2d(2), (2, 4, 6)),
        (AvgPool2d(3, 2, 1), (1, 5, 4)),
        (AvgPool2d(3, 2, 1, ceil_mode=True), (2, 6, 4)),
        (AvgPool2d((2, 3), (2, 1), (1, 0), True, False), (2, 6, 4)),
    ),
    _windowed(
        AvgPool3d,
        (AvgPool3d(2), (2, 2, 3, 4)),
        (AvgPool3d((1, 2, 3), 2, (0, 1, 1), True, False), (1, 3, 4, 4)),
    ),
    _adaptive(AdaptiveAvgPool1d, (AdaptiveAvgPool1d(2), (2, 5)), (AdaptiveAvgPool1d(4), (1, 3))),
    _adaptive(
        AdaptiveAvgPool2d,
        (AdaptiveAvgPool2d(1), (2, 4, 3)),
        (AdaptiveAvgPool2d((3, 2)), (2, 5, 4)),  # windows that overlap
        (AdaptiveAvgPool2d((None, 5)), (1, 2, 3)),  # larger than x
    ),
    _adaptive(
        AdaptiveAvgPool3d,
        (AdaptiveAvgPool3d((1, 2, 3)), (2, 2, 3, 4)),
        (AdaptiveAvgPool3d(2), (1, 1, 3, 2)),
    ),
    _adaptive(AdaptiveMaxPool1d, (AdaptiveMaxPool1d(2), (2, 5)), (AdaptiveMaxPool1d(4), (1, 3))),
    _adaptive(
        AdaptiveMaxPool2d,
        (AdaptiveMaxPool2d(1), (2, 4, 3)),
        (AdaptiveMaxPool2d((3, 2)), (2, 5, 4)),
        (AdaptiveMaxPool2d((None, 5)), (1, 2, 3)),
    ),
    _adaptive(
        AdaptiveMaxPool3d,
        (AdaptiveMaxPool3d((1, 2, 3)), (2, 2, 3, 4)),
        (AdaptiveMaxPool3d(2), (1, 1, 3, 2)),
    ),
)
