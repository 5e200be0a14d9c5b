"""The vocabulary of layers."""

from funcnet.layers.activations import ReLU, Sigmoid
from funcnet.layers.attention import MultiheadAttention
from funcnet.layers.conv import Conv2d
from funcnet.layers.recurrent import GRU, LSTM, RNN
from funcnet.layers.upsample import Upsample2d, UpsampleConv2d

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Conv2d",
    "MultiheadAttention",
    "ReLU",
    "Sigmoid",
    "Upsample2d",
    "UpsampleConv2d",
]
