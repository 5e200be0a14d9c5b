"""The linear layer."""

from __future__ import annotations

from torch import nn

from funcnet.layers import Linear
from funcnet.testing.registry.row import Row

ROWS = (
    Row(
        Linear,
        ((Linear(3), (5,)), (Linear(4, bias=False), (2, 3)), (Linear(1), (2, 3, 1))),
        twin=lambda layer, shape: nn.Linear(shape[-1], layer.out_features, layer.bias),
    ),
)
