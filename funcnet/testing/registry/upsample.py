"""Upsampling, alone and followed by a convolution."""

from __future__ import annotations

from typing import Any

from torch import nn

from funcnet.layer import Shape
from funcnet.layers import Upsample2d, UpsampleConv2d
from funcnet.testing.registry.row import Row, per_axis


class _Twin(nn.Conv2d):
    """Upsampling before a convolution, as one module with the convolution's names."""

    def __init__(self, layer: Any, shape: Shape) -> None:
        padding = layer.padding
        super().__init__(
            shape[0], layer.out_channels, layer.kernel_size, padding=padding, bias=layer.bias
        )
        self.upsample = nn.Upsample(scale_factor=layer.scale, mode="nearest")

    def forward(self, x: Any) -> Any:
        return super().forward(self.upsample(x))


ROWS = (
    Row(
        Upsample2d,
        (
            (Upsample2d(2), (3, 4, 5)),
            (Upsample2d((1, 3)), (2, 3, 2)),
            (Upsample2d(1), (2, 3, 2)),
            (Upsample2d(2), (1, 1, 1)),  # where expanding alone would do
        ),
        twin=lambda layer, _: nn.Upsample(scale_factor=layer.scale, mode="nearest"),
    ),
    Row(
        UpsampleConv2d,
        (
            (UpsampleConv2d(3), (4, 4, 5)),
            (UpsampleConv2d(20, bias=False), (2, 3, 2)),
            (UpsampleConv2d(2, (4, 1), scale=(3, 2), padding=(0, 2)), (3, 2, 4)),
            (UpsampleConv2d(2, 2, scale=1, padding="valid"), (3, 3, 3)),
            (UpsampleConv2d(2, (2, 5), scale=3, method="unfold"), (2, 2, 3)),
            (UpsampleConv2d(2, method="karatsuba"), (2, 2, 4)),
        ),
        settings={
            "kernel_size": per_axis(1, 4, 2),
            "padding": [*per_axis(0, 3, 2), *["valid", "same"] * 4],
            "method": ["auto", "unfold"],
        },
        twin=_Twin,
    ),
)
