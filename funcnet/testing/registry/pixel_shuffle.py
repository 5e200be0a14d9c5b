"""Pixels from channels and back."""

from __future__ import annotations

from funcnet.layers import PixelShuffle, PixelUnshuffle
from funcnet.testing.registry.row import Row, same_name

ROWS = (
    Row(
        PixelShuffle,
        (
            (PixelShuffle(2), (8, 3, 2)),
            (PixelShuffle(3), (9, 1, 2)),
            (PixelShuffle(1), (2, 2, 3)),  # where a reshaping would return x
        ),
        settings={"upscale_factor": [1, 2, 3]},
        twin=same_name,
    ),
    Row(
        PixelUnshuffle,
        (
            (PixelUnshuffle(2), (2, 4, 6)),
            (PixelUnshuffle(3), (1, 3, 6)),
            (PixelUnshuffle(1), (2, 2, 3)),
        ),
        settings={"downscale_factor": [1, 2, 3]},
        twin=same_name,
    ),
)
