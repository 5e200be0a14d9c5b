"""Recurrent layers: a state h that goes from step to step, starting from 0.

With x_t (C,) for step t of an example, h₋ for h of the step before, a = W_ih·x_t + b_ih and
u = W_hh·h₋ + b_hh, in both of which the gates lie one after another,

    RNN     h = tanh(a + u), or max(a + u, 0)
    LSTM    i = σ(a_i + u_i),    f = σ(a_f + u_f),    g = tanh(a_g + u_g),    o = σ(a_o + u_o),
            c = f∘c₋ + i∘g,      h = o∘tanh(c)
    GRU     r = σ(a_r + u_r),    z = σ(a_z + u_z),    n = tanh(a_n + r∘u_n),
            h = (1 − z)∘n + z∘h₋

and y_t = h. With several layers, each takes the y of the layer below as its x. A bidirectional
layer has a second set of parameters, `…_reverse`, for a state that goes from the last step to the
first; its h follows the other h along the last axis of y. `ops/recurrent.py` derives the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from torch import Tensor

from funcnet.checks import name_of
from funcnet.fields import Bias, Flag, OneOf, Size
from funcnet.initializers import Uniform
from funcnet.keys import Key
from funcnet.layer import Layer, Shape
from funcnet.ops import recurrent
from funcnet.ops.need import Need
from funcnet.ops.products import ExampleGradients
from funcnet.param import Param

Nonlinearity: TypeAlias = Annotated[Literal["tanh", "relu"], OneOf(("tanh", "relu"))]


@dataclass(frozen=True)
class Recurrent(Layer):
    """A stack of recurrent layers, whose cell has `_gates` gates of hidden_size numbers each."""

    hidden_size: Size
    num_layers: Size = 1

    _axes = "TC"
    _gates: ClassVar[int] = 1

    @property
    def _cell(self) -> recurrent.Cell:
        raise NotImplementedError

    def _params(self, shape: Shape) -> dict[str, Param]:
        uniform = Uniform(-(self.hidden_size**-0.5), self.hidden_size**-0.5)
        rows, size = self._gates * self.hidden_size, shape[1]
        params: dict[str, Param] = {}
        for directions in self._names:
            for names in directions:
                shapes = ((rows, size), (rows, self.hidden_size), (rows,), (rows,))
                params |= {n: Param(s, uniform) for n, s in zip(names, shapes, strict=False)}
            size = len(directions) * self.hidden_size
        return params

    def _out_shape(self, shape: Shape) -> Shape:
        if min(shape) < 1:
            raise ValueError(
                f"{name_of(self)}: expected at least one step and one channel, got {shape}"
            )
        return shape[0], len(self._names[0]) * self.hidden_size

    def _apply(self, params: Any, x: Tensor, key: Key | None) -> Tensor:
        return recurrent.apply(self._cell, x, self._weights(params))

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        return recurrent.forward(self._cell, x, self._weights(params))

    def _bwd(self, params: Any, residuals: Any, grad: Tensor, need: Need) -> Any:
        weights = self._weights(params)
        dweights, dx = recurrent.gradients(self._cell, residuals, weights, grad, need)
        if not need.params:
            return None, dx
        dparams: dict[str, ExampleGradients] = {}
        for named, computed in zip(self._names, dweights, strict=True):
            for names, own in zip(named, computed, strict=True):
                dparams |= dict(zip(names, own, strict=False))
        return dparams, dx

    def _bwd_each(self, params: Any, residuals: Any, grad: Tensor, need: Need) -> Any:
        return self._bwd(params, residuals, grad, need._replace(each=True))

    @property
    def _names(self) -> list[list[list[str]]]:
        """The names of the parameters by layer and direction."""
        layer: Any = self  # subclasses declare the flags, in PyTorch's order
        kinds = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * layer.bias
        ends = ["", "_reverse"][: 1 + layer.bidirectional]
        return [
            [[f"{kind}_l{i}{end}" for kind in kinds] for end in ends]
            for i in range(self.num_layers)
        ]

    def _weights(self, params: Any) -> recurrent.Layers:
        return [
            [recurrent.Weights(*(params[name] for name in names)) for names in directions]
            for directions in self._names
        ]


@dataclass(frozen=True)
class RNN(Recurrent):
    """Elman's recurrent layers, by the formulas in `funcnet.layers.recurrent`.

    Shapes: x (N, T, C) with T ≥ 1; y (N, T, H), or (N, T, 2H) if bidirectional, H = hidden_size.
    Parameters, for each layer k: {"weight_ih_lk": (H, C), "weight_hh_lk": (H, H), "bias_ih_lk":
    (H,), "bias_hh_lk": (H,)}, and the same with "_reverse"; above the first layer, C is the size
    of y's last axis. All are drawn from U(−1/√H, 1/√H). With bias=False there are no biases.

    Raises ValueError or TypeError for hyperparameters, shapes, dtypes and devices that do not fit.
    Elman, "Finding structure in time", 1990;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html

    >>> import funcnet as fn
    >>> import torch
    >>> layer = fn.RNN(16, nonlinearity="relu")
    >>> params = layer.init(fn.key(0), (10, 8))
    >>> layer.apply(params, torch.zeros(2, 10, 8)).shape
    torch.Size([2, 10, 16])
    """

    nonlinearity: Nonlinearity = "tanh"
    bias: Bias = True
    bidirectional: Flag = False

    @property
    def _cell(self) -> recurrent.Cell:
        return recurrent.TANH if self.nonlinearity == "tanh" else recurrent.RELU


@dataclass(frozen=True)
class LSTM(Recurrent):
    """Layers of long short-term memory, by the formulas in `funcnet.layers.recurrent`.

    Shapes: x (N, T, C) with T ≥ 1; y (N, T, H), or (N, T, 2H) if bidirectional, H = hidden_size.
    Parameters, for each layer k: {"weight_ih_lk": (4H, C), "weight_hh_lk": (4H, H), "bias_ih_lk":
    (4H,), "bias_hh_lk": (4H,)} with rows for i, f, g and o, and the same with "_reverse"; above the
    first layer, C is the size of y's last axis. All are drawn from U(−1/√H, 1/√H). With bias=False
    there are no biases.

    Raises ValueError or TypeError for hyperparameters, shapes, dtypes and devices that do not fit.
    Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers et al., "Learning to forget",
    2000; https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html

    >>> import funcnet as fn
    >>> import torch
    >>> layer = fn.LSTM(16, bidirectional=True)
    >>> params = layer.init(fn.key(0), (10, 8))
    >>> layer.apply(params, torch.zeros(2, 10, 8)).shape
    torch.Size([2, 10, 32])
    """

    bias: Bias = True
    bidirectional: Flag = False

    _gates = 4
    _cell = recurrent.LSTM()


@dataclass(frozen=True)
class GRU(Recurrent):
    """Layers of gated recurrent units, by the formulas in `funcnet.layers.recurrent`.

    Shapes: x (N, T, C) with T ≥ 1; y (N, T, H), or (N, T, 2H) if bidirectional, H = hidden_size.
    Parameters, for each layer k: {"weight_ih_lk": (3H, C), "weight_hh_lk": (3H, H), "bias_ih_lk":
    (3H,), "bias_hh_lk": (3H,)} with rows for r, z and n, and the same with "_reverse"; above the
    first layer, C is the size of y's last axis. All are drawn from U(−1/√H, 1/√H). With bias=False
    there are no biases.

    Raises ValueError or TypeError for hyperparameters, shapes, dtypes and devices that do not fit.
    Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014, with the reset
    gate after the product as in https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html

    >>> import funcnet as fn
    >>> import torch
    >>> layer = fn.GRU(16, num_layers=2)
    >>> params = layer.init(fn.key(0), (10, 8))
    >>> layer.apply(params, torch.zeros(2, 10, 8)).shape
    torch.Size([2, 10, 16])
    """

    bias: Bias = True
    bidirectional: Flag = False

    _gates = 3
    _cell = recurrent.GRU()
