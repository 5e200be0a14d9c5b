"""Neural-network layers on PyTorch as pure functions with explicit parameter trees.

Every gradient is written by hand and held to autograd by property tests; see README.md.
"""

from funcnet.batch_statistics import for_inference, merge_moments, moments
from funcnet.checkpoint import (
    CheckpointError,
    inspect,
    load,
    load_model,
    save,
    save_model,
)
from funcnet.combinators import Sequential
from funcnet.gradients import value_and_grad
from funcnet.keys import Key, bernoulli, fold_in, key, normal, split, uniform
from funcnet.layer import Layer, Param
from funcnet.layers import (
    BatchNorm,
    ChannelAffine,
    Conv2d,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    ReLU,
    RMSNorm,
    Sigmoid,
    Upsample2d,
    UpsampleConv2d,
)
from funcnet.losses import MSE, Loss
from funcnet.memory import keep_freed_memory
from funcnet.optimizers import SGD, SGDState
from funcnet.summary import summary
from funcnet.tree import register_node

__version__ = "0.1.0"

keep_freed_memory()

__all__ = [
    "MSE",
    "SGD",
    "BatchNorm",
    "ChannelAffine",
    "CheckpointError",
    "Conv2d",
    "GroupNorm",
    "InstanceNorm",
    "Key",
    "Layer",
    "LayerNorm",
    "Loss",
    "Param",
    "RMSNorm",
    "ReLU",
    "SGDState",
    "Sequential",
    "Sigmoid",
    "Upsample2d",
    "UpsampleConv2d",
    "bernoulli",
    "fold_in",
    "for_inference",
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
