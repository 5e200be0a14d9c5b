"""The vocabulary of layers."""

from funcnet.layers.activations import ReLU, Sigmoid
from funcnet.layers.attention import MultiheadAttention
from funcnet.layers.conv import Conv1d, Conv2d, Conv3d
from funcnet.layers.conv_transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from funcnet.layers.normalization import (
    BatchNorm,
    ChannelAffine,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
)
from funcnet.layers.pixel_shuffle import PixelShuffle, PixelUnshuffle
from funcnet.layers.pooling import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
)
from funcnet.layers.recurrent import GRU, LSTM, RNN
from funcnet.layers.upsample import Upsample2d, UpsampleConv2d

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BatchNorm",
    "ChannelAffine",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MultiheadAttention",
    "PixelShuffle",
    "PixelUnshuffle",
    "RMSNorm",
    "ReLU",
    "Sigmoid",
    "Upsample2d",
    "UpsampleConv2d",
]
