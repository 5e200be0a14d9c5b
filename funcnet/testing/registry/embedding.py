"""Embeddings of integers and of positions."""

from __future__ import annotations

from funcnet.interop import blocks
from funcnet.layers import Embedding, PositionalEmbedding
from funcnet.testing.registry.row import Row, same_name

ROWS = (
    Row(
        Embedding,
        (
            (Embedding(7, 3), (4,)),
            (Embedding(5, 2, padding_idx=-2), (2, 6)),
            (Embedding(1, 1, padding_idx=0), (3,)),
            (Embedding(4, 3), ()),
        ),
        settings={"padding_idx": [None, 0, -1, 1]},
        twin=same_name,
        classes=lambda layer: int(layer.num_embeddings),
    ),
    Row(
        PositionalEmbedding,
        ((PositionalEmbedding(6), (4, 3)), (PositionalEmbedding(4), (4, 2))),
        settings={"max_length": [1, 2, 4, 7]},
        twin=lambda layer, shape: blocks.PositionalEmbedding(layer.max_length, shape[1]),
    ),
)
