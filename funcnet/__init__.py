"""Neural-network layers on PyTorch as pure functions with explicit parameter trees.

A network is a value; its parameters are a tree of tensors that you own. Every gradient is written
by hand, and property tests compare it with autograd. By family:

    dense        Linear Embedding PositionalEmbedding
    convolution  Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d
                 UpsampleConv2d Upsample2d PixelShuffle PixelUnshuffle
    pooling      MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d AdaptiveAvgPool1d
                 AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d
                 AdaptiveMaxPool3d
    norms        LayerNorm RMSNorm GroupNorm InstanceNorm BatchNorm ChannelAffine
                 moments, merge_moments, for_inference: BatchNorm without state
    activations  ReLU ReLU6 LeakyReLU PReLU ELU SELU GELU SiLU Mish Softplus Softsign Sigmoid
                 LogSigmoid Tanh Hardtanh Hardsigmoid Hardswish Softmax LogSoftmax
    sequences    RNN LSTM GRU MultiheadAttention
    shape        Flatten Reshape Permute Select Identity
    randomness   Dropout Dropout2d; key Key split fold_in uniform normal bernoulli permutation
    combinators  Sequential Residual Sum Product Concat Loop Repeat Recompute Reversible Cast Frozen
    losses       MSE L1 Huber BCEWithLogits CrossEntropy; Loss for your own
    gradients    value_and_grad per_example gradient_norms clipped_value_and_grad
                 gradients_by_layer trace
    interop      from_torch, to_torch, as_module, wrap, state_dict, load_state_dict
    distributed  value_and_grad, mean, merge_moments, Sharded: many processes
    optimizers   SGD Adam AdamW RMSprop Partition; SGDState AdamState RMSpropState PartitionState
                 schedules, global_norm, clip_by_global_norm, average; Optimizer for your own
    trees        save load save_model load_model inspect Checkpoints CheckpointError register_node
                 summary
    own layers   Layer Param initializers; check_vjp verifies a layer. It is imported separately:
                 from funcnet.testing import check_vjp

    net = fn.Sequential(fn.Linear(64), fn.ReLU(), fn.Linear(10))
    params = net.init(fn.key(0), (784,))
    loss, grads = fn.value_and_grad(net, fn.CrossEntropy())(params, x, target)
"""

import torch  # noqa: F401  (a repr is code, which may name torch.bfloat16)

from funcnet import distributed, initializers, interop, schedules
from funcnet.batch_statistics import for_inference, merge_moments, moments
from funcnet.by_layer import gradients_by_layer
from funcnet.checkpoint import (
    CheckpointError,
    Checkpoints,
    inspect,
    load,
    load_model,
    save,
    save_model,
)
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
from funcnet.keys import Key, bernoulli, fold_in, key, normal, permutation, split, uniform
from funcnet.layer import Layer
from funcnet.layers import (
    ELU,
    GELU,
    GRU,
    LSTM,
    RNN,
    SELU,
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
    Dropout,
    Dropout2d,
    Embedding,
    Flatten,
    GroupNorm,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    Identity,
    InstanceNorm,
    LayerNorm,
    LeakyReLU,
    Linear,
    LogSigmoid,
    LogSoftmax,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    Mish,
    MultiheadAttention,
    Permute,
    PixelShuffle,
    PixelUnshuffle,
    PositionalEmbedding,
    PReLU,
    ReLU,
    ReLU6,
    Reshape,
    RMSNorm,
    Select,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Softsign,
    Tanh,
    Upsample2d,
    UpsampleConv2d,
)
from funcnet.losses import L1, MSE, BCEWithLogits, CrossEntropy, Huber, Loss
from funcnet.memory import keep_freed_memory
from funcnet.optimizers import (
    SGD,
    Adam,
    AdamState,
    AdamW,
    Optimizer,
    Partition,
    PartitionState,
    RMSprop,
    RMSpropState,
    SGDState,
    average,
    clip_by_global_norm,
    global_norm,
)
from funcnet.param import Param
from funcnet.per_example import clipped_value_and_grad, gradient_norms, per_example
from funcnet.summary import summary
from funcnet.trace import trace
from funcnet.tree import register_node

__version__ = "0.2.0"

keep_freed_memory()

__all__ = [
    "ELU",
    "GELU",
    "GRU",
    "L1",
    "LSTM",
    "MSE",
    "RNN",
    "SELU",
    "SGD",
    "Adam",
    "AdamState",
    "AdamW",
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
    "Checkpoints",
    "Concat",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "CrossEntropy",
    "Dropout",
    "Dropout2d",
    "Embedding",
    "Flatten",
    "Frozen",
    "GroupNorm",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "Huber",
    "Identity",
    "InstanceNorm",
    "Key",
    "Layer",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LogSigmoid",
    "LogSoftmax",
    "Loop",
    "Loss",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "Mish",
    "MultiheadAttention",
    "Optimizer",
    "PReLU",
    "Param",
    "Partition",
    "PartitionState",
    "Permute",
    "PixelShuffle",
    "PixelUnshuffle",
    "PositionalEmbedding",
    "Product",
    "RMSNorm",
    "RMSprop",
    "RMSpropState",
    "ReLU",
    "ReLU6",
    "Recompute",
    "Repeat",
    "Reshape",
    "Residual",
    "Reversible",
    "SGDState",
    "Select",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "Softsign",
    "Sum",
    "Tanh",
    "Upsample2d",
    "UpsampleConv2d",
    "average",
    "bernoulli",
    "clip_by_global_norm",
    "clipped_value_and_grad",
    "distributed",
    "fold_in",
    "for_inference",
    "global_norm",
    "gradient_norms",
    "gradients_by_layer",
    "initializers",
    "inspect",
    "interop",
    "key",
    "load",
    "load_model",
    "merge_moments",
    "moments",
    "normal",
    "per_example",
    "permutation",
    "register_node",
    "save",
    "save_model",
    "schedules",
    "split",
    "summary",
    "trace",
    "uniform",
    "value_and_grad",
]


def __dir__() -> list[str]:
    return [*__all__, "__all__", "__doc__", "__version__"]
