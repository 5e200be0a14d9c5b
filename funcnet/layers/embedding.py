"""Embeddings of integers and of positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_exporting

from funcnet.checks import name_of
from funcnet.fields import IndexOrNone, Size
from funcnet.initializers import Device, Initializer, InitializerOrNone, Normal
from funcnet.keys import Key
from funcnet.layer import Layer, Shape, Spec
from funcnet.ops import embedding
from funcnet.ops.inplace import is_eager
from funcnet.ops.need import Need
from funcnet.ops.products import Rows, rows
from funcnet.param import Param


@dataclass(frozen=True)
class Embedding(Layer):
    """y[n, …] = weight[x[n, …]]: the row of a table that each integer of x names;

        dweight[i] = Σ dy[n, …] over x[n, …] = i, and 0 for i = `padding_idx`.

    A negative `padding_idx` counts from the last row, as in PyTorch.

    Shapes: x (N, …) of int32 or int64; y (N, …, E) with E = `embedding_dim`. x has no gradient.
    Parameters: {"weight": (num_embeddings, E)} drawn from N(0, 1) or by `weight_init`; the row
    `padding_idx` is 0.

    Raises TypeError for an x of another dtype, and ValueError for a `padding_idx` without a row and
    for x outside [0, num_embeddings). The numbers in x are checked on the CPU alone, outside of
    torch.func and torch.compile: on other devices that would take a synchronisation. Where they are
    not checked, PyTorch's kernels decide what happens.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Embedding.html

    >>> import funcnet as fn
    >>> layer = Embedding(10, 3)
    >>> params = layer.init(fn.key(0), (4,))
    >>> layer.apply(params, torch.tensor([[1, 2, 3, 1]])).shape
    torch.Size([1, 4, 3])
    >>> layer.apply(params, torch.tensor([[1, 10]]))
    Traceback (most recent call last):
    ValueError: Embedding(10, embedding_dim=3): expected x in [0, 10), got numbers from 1 to 10
    """

    num_embeddings: Size
    embedding_dim: Size
    padding_idx: IndexOrNone = None
    weight_init: InitializerOrNone = None

    _fresh = True

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, index = self.num_embeddings, self.padding_idx
        if index is None:
            return
        if not -rows <= index < rows:
            raise ValueError(f"Embedding: expected padding_idx in [{-rows}, {rows}), got {index}")
        object.__setattr__(self, "padding_idx", index % rows)

    def _check_x(self, x: Spec) -> None:
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name_of(self)}: expected x to be int32 or int64, got {x.dtype}")

    def _params(self, shape: Shape) -> dict[str, Param]:
        draw = self.weight_init or Normal()
        if self.padding_idx is not None:
            draw = _WithZeroRow(draw, self.padding_idx)
        return {"weight": Param((self.num_embeddings, self.embedding_dim), draw)}

    def _out_shape(self, shape: Shape) -> Shape:
        return (*shape, self.embedding_dim)

    def _frozen_params(self, params: Any) -> list[tuple[Tensor, Any]]:
        return [] if self.padding_idx is None else [(params["weight"], self.padding_idx)]

    def _look_up(self, weight: Tensor, x: Tensor) -> Tensor:
        if self.padding_idx is None or is_eager() or is_exporting():
            return F.embedding(x, weight, self.padding_idx)
        # Under vmap and in forward mode, torch forgets the row that has no derivative.
        y = F.embedding(x, weight)
        return torch.where((x == self.padding_idx).unsqueeze(-1), y.detach(), y)

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        try:
            return self._look_up(params["weight"], x), x
        except IndexError:
            if not is_eager():
                raise
            raise ValueError(
                f"{name_of(self)}: expected x in [0, {self.num_embeddings}), "
                f"got numbers from {int(x.min())} to {int(x.max())}"
            ) from None

    def _bwd(self, params: Any, x: Tensor, dy: Tensor, need: Need) -> Any:
        if not need.params:
            return None, None
        dweight = embedding.gradient(dy, x, self.num_embeddings, self.padding_idx)
        return {"weight": dweight}, None

    def _bwd_each(self, params: Any, x: Tensor, dy: Tensor, need: Need) -> Any:
        index, found = rows(x, 0).long(), rows(dy)
        if self.padding_idx is not None:
            found = found.masked_fill((index == self.padding_idx).unsqueeze(2), 0.0)
        return {"weight": Rows(index, found, self.num_embeddings)}, None


@dataclass(frozen=True)
class _WithZeroRow(Initializer):
    """Another initialiser's numbers, with zeros in one row."""

    initializer: Initializer
    row: int

    def _draw(self, key: Key, shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> Tensor:
        weight = self.initializer(key, shape, dtype, device)
        weight[self.row] = 0
        return weight


@dataclass(frozen=True)
class PositionalEmbedding(Layer):
    """y = x + weight[:T], a vector for each position in a sequence of length T;

        dx = dy,  dweight[t] = Σ dy[n, t] over n, and 0 for t ≥ T.

    Shapes: x (N, T, E) with T ≤ `max_length`; y has x's shape.
    Parameters: {"weight": (max_length, E)} drawn from N(0, 0.02²) or by `weight_init`.

    Raises ValueError for a sequence longer than `max_length`.
    Radford et al., "Language models are unsupervised multitask learners", 2019.

    >>> import funcnet as fn
    >>> layer = PositionalEmbedding(16)
    >>> params = layer.init(fn.key(0), (10, 4))
    >>> params["weight"].shape, layer.apply(params, torch.zeros(2, 10, 4)).shape
    (torch.Size([16, 4]), torch.Size([2, 10, 4]))
    """

    max_length: Size
    weight_init: InitializerOrNone = None

    _axes = "TE"
    _fresh = True

    def _params(self, shape: Shape) -> dict[str, Param]:
        draw = self.weight_init or Normal(std=0.02)
        return {"weight": Param((self.max_length, shape[1]), draw)}

    def _out_shape(self, shape: Shape) -> Shape:
        if shape[0] > self.max_length:
            raise ValueError(
                f"{name_of(self)}: expected sequences of at most {self.max_length}, got {shape[0]}"
            )
        return shape

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, None]:
        return x + params["weight"].narrow(0, 0, x.shape[1]), None

    def _bwd(self, params: Any, _: None, dy: Tensor, need: Need) -> Any:
        return self._dparams(dy, need), dy.clone() if need.input else None

    def _fwd_(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, None]:
        return x.add_(params["weight"].narrow(0, 0, x.shape[1])), None

    def _bwd_(self, params: Any, _: None, dy: Tensor, need: Need) -> Any:
        return self._dparams(dy, need), dy if need.input else None

    def _bwd_each(self, params: Any, _: None, dy: Tensor, need: Need) -> Any:
        each = F.pad(dy, (0, 0, 0, self.max_length - dy.shape[1]))
        return {"weight": each}, dy.clone() if need.input else None

    def _dparams(self, dy: Tensor, need: Need) -> dict[str, Tensor] | None:
        if not need.params:
            return None
        return {"weight": F.pad(dy.sum(0), (0, 0, 0, self.max_length - dy.shape[1]))}
