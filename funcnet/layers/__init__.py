"""The vocabulary of layers."""

from funcnet.layers.activations import ReLU, Sigmoid
from funcnet.layers.conv import Conv2d
from funcnet.layers.normalization import (
    BatchNorm,
    ChannelAffine,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
)
from funcnet.layers.upsample import Upsample2d, UpsampleConv2d

__all__ = [
    "BatchNorm",
    "ChannelAffine",
    "Conv2d",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "ReLU",
    "Sigmoid",
    "Upsample2d",
    "UpsampleConv2d",
]
