"""The linear layer, along the last axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from funcnet.fields import Bias, Size
from funcnet.initializers import InitializerOrNone, Uniform
from funcnet.keys import Key
from funcnet.layer import Layer, Shape
from funcnet.ops.linear import linear
from funcnet.ops.need import Need
from funcnet.ops.products import ExampleGradients, Products, rows
from funcnet.param import Param


@dataclass(frozen=True)
class Linear(Layer):
    """y = x·Wᵀ + b along the last axis. All axes before it count as one axis of rows:

        dW = dyᵀ·x,  db = Σ dy over the rows,  dx = dy·W.

    Shapes: x (N, …, C); y (N, …, O) with O = `out_features`.
    Parameters: {"weight": (O, C), "bias": (O,)}, both drawn from U(−1/√C, 1/√C) unless
    `weight_init` or `bias_init` draw them; without "bias" if bias=False.

    Raises ValueError or TypeError for hyperparameters, shapes, dtypes and devices that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html

    >>> import funcnet as fn
    >>> import torch
    >>> layer = Linear(10)
    >>> params = layer.init(fn.key(0), (784,))
    >>> layer.apply(params, torch.zeros(32, 784)).shape
    torch.Size([32, 10])
    """

    out_features: Size
    bias: Bias = True
    weight_init: InitializerOrNone = None
    bias_init: InitializerOrNone = None

    _axes = "…C"
    _fresh = True

    def _params(self, shape: Shape) -> dict[str, Param]:
        bound = shape[-1] ** -0.5 if shape[-1] else 0.0
        draw = Uniform(-bound, bound)
        weight = Param((self.out_features, shape[-1]), self.weight_init or draw)
        bias = Param((self.out_features,), self.bias_init or draw)
        return {"weight": weight, "bias": bias} if self.bias else {"weight": weight}

    def _out_shape(self, shape: Shape) -> Shape:
        return (*shape[:-1], self.out_features)

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        return linear(x, params["weight"], params.get("bias")), x

    def _bwd(self, params: Any, x: Tensor, dy: Tensor, need: Need) -> Any:
        dparams = {}
        if need.params:
            flat = dy.flatten(0, -2)
            dparams["weight"] = flat.mT @ x.flatten(0, -2)
            if self.bias:
                dparams["bias"] = flat.sum(0)
        return dparams, dy @ params["weight"] if need.input else None

    def _bwd_each(self, params: Any, x: Tensor, dy: Tensor, need: Need) -> Any:
        each: dict[str, ExampleGradients] = {"weight": Products(rows(dy), rows(x))}
        if self.bias:
            each["bias"] = rows(dy).sum(1)
        return each, dy @ params["weight"] if need.input else None
