"""Dropout. Its twins, in evaluation, drop nothing."""

from __future__ import annotations

from torch import nn

from funcnet.layers import Dropout, Dropout2d
from funcnet.testing.registry.row import Row

ROWS = (
    Row(
        Dropout,
        ((Dropout(), (3, 4)), (Dropout(0.25), (5,)), (Dropout(0.0), (2,)), (Dropout(1.0), (2,))),
        twin=lambda layer, _: nn.Dropout(layer.p).eval(),
    ),
    Row(
        Dropout2d,
        ((Dropout2d(), (3, 4, 5)), (Dropout2d(0.25), (4, 1, 2))),
        twin=lambda layer, _: nn.Dropout2d(layer.p).eval(),
    ),
)
