"""Embeddings of integers and of positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from funcnet.layers import Embedding, PositionalEmbedding
from funcnet.testing.registry.row import Row


class _Positions(nn.Module):
    """The embedding of positions, from a table as torch.nn has it."""

    def __init__(self, layer: Any, embedding_dim: int) -> None:
        super().__init__()
        self.weight = nn.Embedding(layer.max_length, embedding_dim).weight

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[: x.shape[1]]


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
        twin=lambda layer, _: nn.Embedding(
            layer.num_embeddings, layer.embedding_dim, layer.padding_idx
        ),
        classes=lambda layer: int(layer.num_embeddings),
    ),
    Row(
        PositionalEmbedding,
        ((PositionalEmbedding(6), (4, 3)), (PositionalEmbedding(4), (4, 2))),
        settings={"max_length": [1, 2, 4, 7]},
        twin=lambda layer, shape: _Positions(layer, shape[1]),
    ),
)
