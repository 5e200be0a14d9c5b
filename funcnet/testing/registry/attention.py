"""Attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from funcnet.layer import Shape
from funcnet.layers import MultiheadAttention
from funcnet.testing.registry.row import Row


class _OfItself(nn.MultiheadAttention):
    """Attention of x to itself, causal or not."""

    causal: bool

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        mask = None
        if self.causal:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        y: Tensor = super().forward(x, x, x, attn_mask=mask, need_weights=False)[0]
        return y


def _twin(layer: Any, shape: Shape) -> nn.Module:
    twin = _OfItself(shape[1], layer.num_heads, bias=layer.bias, batch_first=True)
    twin.causal = layer.causal
    return twin


ROWS = (
    Row(
        MultiheadAttention,
        (
            (MultiheadAttention(2), (4, 6)),
            (MultiheadAttention(3, causal=True), (5, 6)),
            (MultiheadAttention(1, bias=False, causal=True), (1, 3)),  # a sequence of one step
            (MultiheadAttention(4, dropout=0.5), (3, 4)),  # heads of size 1
        ),
        twin=_twin,
    ),
)
