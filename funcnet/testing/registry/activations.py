"""The activations."""

from __future__ import annotations

from torch import nn

from funcnet.layers import ReLU, Sigmoid
from funcnet.testing.registry.row import Row

ROWS = (
    Row(ReLU, ((ReLU(), (3, 4, 5)), (ReLU(), (4,))), twin=lambda *_: nn.ReLU()),
    Row(Sigmoid, ((Sigmoid(), (3, 4, 5)), (Sigmoid(), (4,))), twin=lambda *_: nn.Sigmoid()),
)
