"""The activations."""

from __future__ import annotations

from torch import nn

from funcnet.layers import (
    ELU,
    GELU,
    SELU,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    LeakyReLU,
    LogSigmoid,
    LogSoftmax,
    Mish,
    PReLU,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Softsign,
    Tanh,
)
from funcnet.testing.registry.row import Row

ROWS = (
    Row(ReLU, ((ReLU(), (3, 4, 5)), (ReLU(), (4,))), twin=lambda *_: nn.ReLU()),
    Row(Sigmoid, ((Sigmoid(), (3, 4, 5)), (Sigmoid(), (4,))), twin=lambda *_: nn.Sigmoid()),
    Row(Tanh, ((Tanh(), (3, 4)),), twin=lambda *_: nn.Tanh()),
    Row(
        LeakyReLU,
        ((LeakyReLU(), (3, 4, 5)), (LeakyReLU(-0.5), (4,)), (LeakyReLU(0.0), (4,))),
        twin=lambda layer, _: nn.LeakyReLU(layer.negative_slope),
    ),
    Row(
        Hardtanh,
        ((Hardtanh(), (3, 4)), (Hardtanh(-0.25, 2.0), (4,))),
        settings={"min_val": [-1.0, -0.25, 0.0], "max_val": [1.0, 2.0, 0.25]},
        twin=lambda layer, _: nn.Hardtanh(layer.min_val, layer.max_val),
    ),
    Row(ReLU6, ((ReLU6(), (3, 4)),), twin=lambda *_: nn.ReLU6()),
    Row(
        Softmax,
        ((Softmax(1), (3, 4)), (Softmax(-1), (5,)), (Softmax(-2), (3, 4, 2))),
        settings={"dim": [1, -1, 2, -2]},
        twin=lambda layer, _: nn.Softmax(layer.dim),
    ),
    Row(
        LogSoftmax,
        ((LogSoftmax(1), (3, 4)), (LogSoftmax(-1), (5,)), (LogSoftmax(-2), (3, 4, 2))),
        settings={"dim": [1, -1, 2, -2]},
        twin=lambda layer, _: nn.LogSoftmax(layer.dim),
    ),
    Row(
        GELU,
        ((GELU(), (3, 4)), (GELU("tanh"), (4,))),
        twin=lambda layer, _: nn.GELU(layer.approximate),
    ),
    Row(SiLU, ((SiLU(), (3, 4)),), twin=lambda *_: nn.SiLU()),
    Row(Mish, ((Mish(), (3, 4)),), twin=lambda *_: nn.Mish()),
    Row(
        Softplus,
        ((Softplus(), (3, 4)), (Softplus(beta=2.5, threshold=15.0), (4,))),
        settings={"beta": [1.0, 0.5, 3.0, -2.0], "threshold": [20.0, 15.0]},
        twin=lambda layer, _: nn.Softplus(layer.beta, layer.threshold),
    ),
    Row(ELU, ((ELU(), (3, 4)), (ELU(alpha=-1.5), (4,))), twin=lambda layer, _: nn.ELU(layer.alpha)),
    Row(SELU, ((SELU(), (3, 4)),), twin=lambda *_: nn.SELU()),
    Row(Hardswish, ((Hardswish(), (3, 4)),), twin=lambda *_: nn.Hardswish()),
    Row(Hardsigmoid, ((Hardsigmoid(), (3, 4)),), twin=lambda *_: nn.Hardsigmoid()),
    Row(LogSigmoid, ((LogSigmoid(), (3, 4)),), twin=lambda *_: nn.LogSigmoid()),
    Row(Softsign, ((Softsign(), (3, 4)),), twin=lambda *_: nn.Softsign()),
    Row(
        PReLU,
        ((PReLU(), (3, 4)), (PReLU(3), (3, 4, 2)), (PReLU(4), (4,))),
        settings={"num_parameters": [1, 2, 3]},
        twin=lambda layer, _: nn.PReLU(layer.num_parameters),
    ),
)
