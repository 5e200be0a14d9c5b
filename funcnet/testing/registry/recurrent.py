"""Recurrent layers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import nn

from funcnet.layer import Layer, Shape
from funcnet.layers import GRU, LSTM, RNN
from funcnet.testing.registry.row import Row


def _twin(layer: Any, shape: Shape) -> nn.Module:
    """The torch.nn module without the second of its results, its last state."""
    settings = {f.name: getattr(layer, f.name) for f in fields(layer)}
    twin: nn.Module = getattr(nn, type(layer).__name__)(shape[1], batch_first=True, **settings)
    twin.register_forward_hook(lambda module, args, results: results[0])
    return twin


def _row(cls: type[Layer], *examples: tuple[Layer, Shape]) -> Row:
    return Row(cls, examples, settings={"num_layers": [1, 2]}, twin=_twin)


ROWS = (
    _row(
        RNN,
        (RNN(3), (4, 2)),
        (RNN(2, nonlinearity="relu", bidirectional=True), (3, 3)),
        (RNN(2, num_layers=2, bias=False), (1, 2)),  # a sequence of one step
    ),
    _row(
        LSTM,
        (LSTM(3), (4, 2)),
        (LSTM(2, num_layers=2, bidirectional=True), (3, 3)),
        (LSTM(2, bias=False), (1, 2)),
    ),
    _row(
        GRU,
        (GRU(3), (4, 2)),
        (GRU(2, num_layers=2, bidirectional=True), (3, 3)),
        (GRU(2, bias=False), (1, 2)),
    ),
)
