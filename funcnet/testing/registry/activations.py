"""The activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from funcnet.testing.registry.row import Row, same_name


class _Hardsigmoid(nn.Hardsigmoid):
    """nn.Hardsigmoid with a slope of 1/6 in float64, where the kernel's is 1/6 in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6 if x.dtype == torch.float64 else F.hardsigmoid(x)


ROWS = (
    Row(ReLU, ((ReLU(), (3, 4, 5)), (ReLU(), (4,))), twin=same_name),
    Row(Sigmoid, ((Sigmoid(), (3, 4, 5)), (Sigmoid(), (4,))), twin=same_name),
    Row(Tanh, ((Tanh(), (3, 4)),), twin=same_name),
    Row(
        LeakyReLU,
        ((LeakyReLU(), (3, 4, 5)), (LeakyReLU(-0.5), (4,)), (LeakyReLU(0.0), (4,))),
        twin=same_name,
    ),
    Row(
        Hardtanh,
        ((Hardtanh(), (3, 4)), (Hardtanh(-0.25, 2.0), (4,))),
        settings={"min_val": [-1.0, -0.25, 0.0], "max_val": [1.0, 2.0, 0.25]},
        twin=same_name,
    ),
    Row(ReLU6, ((ReLU6(), (3, 4)),), twin=same_name),
    Row(
        Softmax,
        ((Softmax(1), (3, 4)), (Softmax(-1), (5,)), (Softmax(-2), (3, 4, 2))),
        settings={"dim": [1, -1, 2, -2]},
        twin=same_name,
    ),
    Row(
        LogSoftmax,
        ((LogSoftmax(1), (3, 4)), (LogSoftmax(-1), (5,)), (LogSoftmax(-2), (3, 4, 2))),
        settings={"dim": [1, -1, 2, -2]},
        twin=same_name,
    ),
    Row(GELU, ((GELU(), (3, 4)), (GELU("tanh"), (4,))), twin=same_name),
    Row(SiLU, ((SiLU(), (3, 4)),), twin=same_name),
    Row(Mish, ((Mish(), (3, 4)),), twin=same_name),
    Row(
        Softplus,
        ((Softplus(), (3, 4)), (Softplus(beta=2.5, threshold=15.0), (4,))),
        settings={"beta": [1.0, 0.5, 3.0, -2.0], "threshold": [20.0, 15.0]},
        twin=same_name,
    ),
    Row(ELU, ((ELU(), (3, 4)), (ELU(alpha=-1.5), (4,))), twin=same_name),
    Row(SELU, ((SELU(), (3, 4)),), twin=same_name),
    Row(Hardswish, ((Hardswish(), (3, 4)),), twin=same_name),
    Row(Hardsigmoid, ((Hardsigmoid(), (3, 4)),), twin=lambda *_: _Hardsigmoid()),
    Row(LogSigmoid, ((LogSigmoid(), (3, 4)),), twin=same_name),
    Row(Softsign, ((Softsign(), (3, 4)),), twin=same_name),
    Row(
        PReLU,
        ((PReLU(), (3, 4)), (PReLU(3), (3, 4, 2)), (PReLU(4), (4,))),
        settings={"num_parameters": [1, 2, 3]},
        twin=same_name,
    ),
)
