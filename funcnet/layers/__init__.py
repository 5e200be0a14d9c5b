"""The vocabulary of layers."""

from funcnet.layers.activations import ReLU, Sigmoid
from funcnet.layers.conv import Conv2d
from funcnet.layers.upsample import Upsample2d, UpsampleConv2d

__all__ = ["Conv2d", "ReLU", "Sigmoid", "Upsample2d", "UpsampleConv2d"]
