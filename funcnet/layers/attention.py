"""Attention: every step of a sequence looks at every other one.

For each of h heads, whose q, k and v (T, d) are d = E/h columns of the three projections of x,

    q, k, v = x·W_inᵀ + b_in,      o = softmax(q·kᵀ/√d)·v,      y = o·W_outᵀ + b_out,

with the heads' o side by side, (T, E). With grad for ∂L/∂y,

    dW_out = gradᵀ·o,    db_out = Σ grad,    do = grad·W_out,
    dW_in = d(qkv)ᵀ·x,   db_in = Σ d(qkv),   dx = d(qkv)·W_in,

with sums over examples and steps. `ops/attention.py` derives d(qkv) from do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from funcnet.checks import check_divided
from funcnet.fields import Bias, Flag, Probability, Size
from funcnet.initializers import Uniform, Zeros
from funcnet.keys import Key
from funcnet.layer import Layer, Shape
from funcnet.ops import attention, counter
from funcnet.ops.linear import linear
from funcnet.ops.need import Need
from funcnet.ops.products import ExampleGradients, Products, product_of_rows
from funcnet.ops.window import Ints
from funcnet.param import Param


@dataclass(frozen=True)
class MultiheadAttention(Layer):
    """Self-attention with `num_heads` heads, by the formulas in `funcnet.layers.attention`.

    With `causal`, a step looks at itself and at earlier steps alone. With a key, each attention
    weight is dropped with probability `dropout`, and what is left is divided by 1 − dropout; the
    key alone decides which. On the CPU and without dropout, memory is linear in T.

    Shapes: x and y (N, T, E), where num_heads divides E.
    Parameters: {"in_proj_weight": (3E, E), "in_proj_bias": (3E,), "out_proj": {"weight": (E, E),
    "bias": (E,)}}. The first is drawn from U(−√q, √q) with q = 6/(E + 3E) (Glorot), out_proj's
    weight from U(−1/√E, 1/√E), biases start from 0; with bias=False there are none.

    Raises ValueError or TypeError for hyperparameters, shapes, dtypes and devices that do not fit.
    Vaswani et al., "Attention is all you need", 2017;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.MultiheadAttention.html

    >>> import funcnet as fn
    >>> import torch
    >>> layer = fn.MultiheadAttention(4, causal=True)
    >>> params = layer.init(fn.key(0), (10, 32))
    >>> layer.apply(params, torch.zeros(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    num_heads: Size
    bias: Bias = True
    causal: Flag = False
    dropout: Probability = 0.0

    _axes = "TE"
    _fresh = True

    def _params(self, shape: Shape) -> dict[str, Any]:
        size = shape[1]
        glorot, bound = (1.5 / max(size, 1)) ** 0.5, max(size, 1) ** -0.5
        in_weight = Param((3 * size, size), Uniform(-glorot, glorot))
        out_weight = Param((size, size), Uniform(-bound, bound))
        if not self.bias:
            return {"in_proj_weight": in_weight, "out_proj": {"weight": out_weight}}
        return {
            "in_proj_weight": in_weight,
            "in_proj_bias": Param((3 * size,), Zeros()),
            "out_proj": {"weight": out_weight, "bias": Param((size,), Zeros())},
        }

    def _out_shape(self, shape: Shape) -> Shape:
        check_divided(self, "num_heads", shape[1], "a last axis")
        return shape

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        out = params["out_proj"]
        qkv = linear(x, params["in_proj_weight"], params.get("in_proj_bias"))
        keep = self._keep(x, key)
        o, kept = attention.attend(qkv, self.num_heads, self.causal, keep, self._scale)
        return linear(o, out["weight"], out.get("bias")), (x, qkv, o, kept)

    def _bwd(self, params: Any, residuals: Any, grad: Tensor, need: Need) -> Any:
        return self._gradients(params, residuals, grad, need, product_of_rows, (0, 1))

    def _bwd_each(self, params: Any, residuals: Any, grad: Tensor, need: Need) -> Any:
        return self._gradients(params, residuals, grad, need, Products, (1,))

    def _gradients(
        self,
        params: Any,
        residuals: Any,
        grad: Tensor,
        need: Need,
        product: Callable[[Tensor, Tensor], ExampleGradients],
        summed: Ints,
    ) -> Any:
        """(dparams, dx): of weights by `product`, of biases by sums over the axes `summed`."""
        x, qkv, o, kept = residuals
        do = grad @ params["out_proj"]["weight"]
        dqkv = attention.gradients(qkv, o, kept, do, self.num_heads, self.causal, self._scale)
        dparams: Any = None
        if need.params:
            dparams = {"in_proj_weight": product(dqkv, x), "out_proj": {"weight": product(grad, o)}}
            if self.bias:
                dparams["in_proj_bias"] = dqkv.sum(summed)
                dparams["out_proj"]["bias"] = grad.sum(summed)
        return dparams, dqkv @ params["in_proj_weight"] if need.input else None

    @property
    def _scale(self) -> float:
        """1/(1 − dropout); where everything is dropped, any number will do."""
        return 1.0 / (1.0 - self.dropout) if self.dropout < 1.0 else 0.0

    def _keep(self, x: Tensor, key: Key | None) -> Tensor | None:
        """The mask of attention weights to keep, (N, num_heads, T, T); None to keep all."""
        if key is None or self.dropout == 0.0:
            return None
        examples, steps, _ = x.shape
        shape = (examples, self.num_heads, steps, steps)
        return counter.bernoulli(key, 1.0 - self.dropout, shape, x.device)
