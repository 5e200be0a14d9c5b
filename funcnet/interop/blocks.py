"""Modules that torch.nn lacks: each computes what the layer or combinator of its name does.

Their names, fields and parameters are the layer's. They branch on nothing but their own settings,
so that torch.fx, torch.export and ONNX can trace them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcnet.compat import children

# --- Layers


class BatchNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d, 2d and 3d in one: any number of axes after the channels, or none."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        pass


class ChannelAffine(nn.Module):
    """y = weight ∘ x + bias, with one weight and one bias for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return y (N, C, …), of x's shape."""
        return (x.transpose(1, -1) * self.weight + self.bias).transpose(1, -1)


class First(nn.Module):
    """The first result of a module that returns several, as nn.LSTM does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)[0]
        return y


class MultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention of x to itself, causal or not."""

    def __init__(self, embed_dim: int, num_heads: int, bias: bool, causal: bool, dropout: float):
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first=True)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return y (N, T, E), of x's shape."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = torch.unflatten(qkv, -1, (3, self.num_heads, self.head_dim)).transpose(1, 3)
        dropout = self.dropout if self.training else 0.0
        q, k, v = qkv.select(2, 0), qkv.select(2, 1), qkv.select(2, 2)
        o = F.scaled_dot_product_attention(q, k, v, None, dropout, self.causal)
        y: Tensor = self.out_proj(o.transpose(1, 2).flatten(2))
        return y


class Permute(nn.Module):
    """Axis i of y is axis dims[i] of x."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)

    def extra_repr(self) -> str:
        return str(self.dims)


class PositionalEmbedding(nn.Module):
    """y = x + weight[:T], a vector for each position."""

    def __init__(self, max_length: int, embedding_dim: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.weight = nn.Parameter(torch.zeros(max_length, embedding_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return y (N, T, E), of x's shape."""
        return x + self.weight[: x.shape[1]]


class Reshape(nn.Module):
    """Give every example another shape: y is (N, *shape)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape((x.shape[0], *self.shape))

    def extra_repr(self) -> str:
        return str(self.shape)


class Select(nn.Module):
    """y is entry `index` along axis `dim` of x."""

    def __init__(self, dim: int, index: int) -> None:
        super().__init__()
        self.dim, self.index = dim, index

    def forward(self, x: Tensor) -> Tensor:
        return x.select(self.dim, self.index)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, index={self.index}"


# --- Combinators


class Cast(nn.Module):
    """y = f(x) computed in another dtype, which the parameters of f have.

    `out` is y's dtype if x is of integers. Otherwise it is None, and y has x's dtype.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype, out: torch.dtype | None) -> None:
        super().__init__()
        self.layer, self.dtype, self.out = layer, dtype, out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.to(self.dtype) if self.out is None else x)
        return y.to(self.out or x.dtype)

    def extra_repr(self) -> str:
        return str(self.dtype)


class Residual(nn.Module):
    """y = x + f(x)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layer(x)
        return y


class Loop(nn.Module):
    """y = f(… f(f(x))), n times with the same parameters."""

    def __init__(self, layer: nn.Module, n: int) -> None:
        super().__init__()
        self.layer, self.n = layer, n

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.n):
            x = self.layer(x)
        return x

    def extra_repr(self) -> str:
        return f"n={self.n}"


class Branches(nn.Module):
    """Modules by name, `0`, `1`, … or others, which all see x."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def _results(self, x: Tensor) -> list[Tensor]:
        return [module(x) for module in children(self).values() if module is not None]


class Sum(Branches):
    """y = f₀(x) + f₁(x) + …"""

    def forward(self, x: Tensor) -> Tensor:
        return reduce(lambda a, b: a + b, self._results(x))


class Product(Branches):
    """y = f₀(x) ∘ f₁(x) ∘ …"""

    def forward(self, x: Tensor) -> Tensor:
        return reduce(lambda a, b: a * b, self._results(x))


class Concat(Branches):
    """y = [f₀(x), f₁(x), …] along axis `dim`."""

    def __init__(self, modules: Mapping[str, nn.Module], dim: int) -> None:
        super().__init__(modules)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self._results(x), self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Reversible(Branches):
    """One module after the other adds to half of the channels: y₁ = x₁ + f(x₂), y₂ = x₂ + g(y₁)."""

    def forward(self, x: Tensor) -> Tensor:
        halves = x.chunk(2, 1)
        a, b = halves[0], halves[1]
        for module in children(self).values():
            a, b = b, a + module(b)
        return torch.cat([a, b], 1)
