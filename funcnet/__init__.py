"""Neural-network layers on PyTorch as pure functions with explicit parameter trees.

Every gradient is written by hand and held to autograd by property tests; see README.md.
"""

import torch  # noqa: F401  (the code that a repr is may say torch.bfloat16)

from funcnet import initializers
from funcnet.batch_statistics import for_inference, merge_moments, moments
from funcnet.checkpoint import CheckpointError, inspect, load, load_model, save, save_model
from funcnet.combinators import (
    Cast,
    Concat,
    Frozen,
    Loop,
    Product,
    Recompute,
    Repeat,
    Residual,
    Reversible,
    Sequential,
    Sum,
)
from funcnet.gradients import value_and_grad
from funcnet.keys import Key, bernoulli, fold_in, key, normal, split, uniform
from funcnet.layer import Layer, Param
from funcnet.layers import (
    GRU,
    LSTM,
    RNN,
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    BatchNorm,
    ChannelAffine,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    MultiheadAttention,
    PixelShuffle,
    PixelUnshuffle,
    ReLU,
    RMSNorm,
    Sigmoid,
    Upsample2d,
    UpsampleConv2d,
)
from funcnet.losses import L1, MSE, BCEWithLogits, CrossEntropy, Huber, Loss
from funcnet.memory import keep_freed_memory
from funcnet.optimizers import SGD, SGDState
from funcnet.summary import summary
from funcnet.tree import register_node

__version__ = "0.1.0"

keep_freed_memory()

__all__ = [
    "GRU",
    "L1",
    "LSTM",
    "MSE",
    "RNN",
    "SGD",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BCEWithLogits",
    "BatchNorm",
    "Cast",
    "ChannelAffine",
    "CheckpointError",
    "Concat",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "CrossEntropy",
    "Frozen",
    "GroupNorm",
    "Huber",
    "InstanceNorm",
    "Key",
    "Layer",
    "LayerNorm",
    "Loop",
    "Loss",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MultiheadAttention",
    "Param",
    "PixelShuffle",
    "PixelUnshuffle",
    "Product",
    "RMSNorm",
    "ReLU",
    "Recompute",
    "Repeat",
    "Residual",
    "Reversible",
    "SGDState",
    "Sequential",
    "Sigmoid",
    "Sum",
    "Upsample2d",
    "UpsampleConv2d",
    "bernoulli",
    "fold_in",
    "for_inference",
    "initializers",
    "inspect",
    "key",
    "load",
    "load_model",
    "merge_moments",
    "moments",
    "normal",
    "register_node",
    "save",
    "save_model",
    "split",
    "summary",
    "uniform",
    "value_and_grad",
]
