"""The registry: one row a layer or loss, which drives all else.

    REGISTRY[Conv2d]          its row: settings, examples with shapes, its twin in torch.nn
    LOSSES[CrossEntropy]      its row: settings, targets, its twin

The strategies, `python -m funcnet.testing`, the benchmark's translation to torch.nn and the tests
that cut across all layers read it. A new layer is its file, one export, and one row here.
"""

from __future__ import annotations

from funcnet.layer import Layer
from funcnet.losses import Loss
from funcnet.testing.registry import (
    activations,
    attention,
    combinators,
    conv,
    dropout,
    embedding,
    linear,
    normalization,
    pixel_shuffle,
    pooling,
    recurrent,
    shape,
    upsample,
)
from funcnet.testing.registry.losses import LOSS_ROWS, LossRow, draw_target
from funcnet.testing.registry.row import Choose, Row

__all__ = ["LOSSES", "REGISTRY", "Choose", "LossRow", "Row", "draw_target", "needs_key"]

REGISTRY: dict[type[Layer], Row] = {
    row.layer: row
    for family in (
        activations,
        attention,
        combinators,
        conv,
        dropout,
        embedding,
        linear,
        normalization,
        pixel_shuffle,
        pooling,
        recurrent,
        shape,
        upsample,
    )
    for row in family.ROWS
}

LOSSES: dict[type[Loss], LossRow] = {row.loss: row for row in LOSS_ROWS}


def needs_key(layer: Layer) -> bool:
    """Whether a layer, or one in it, refuses to evaluate without a key."""
    row = REGISTRY.get(type(layer))
    within = any(needs_key(child) for _, child in layer._children())
    return within or (row is not None and row.needs_key)
