"""Nearest-neighbour upsampling by whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from funcnet.keys import Key
from funcnet.layer import (
    Layer,
    Shape,
    Tree,
    as_pair,
    as_shape,
    check_grad,
    check_no_params,
    check_tensor,
    source,
)
from funcnet.layers.geometry import Pair, check_pictures, pair


@dataclass(frozen=True, repr=False)
class Upsample2d(Layer):
    """Every pixel becomes a block of s_h × s_w copies:

        y[n, c, i, j]  = x[n, c, ⌊i/s_h⌋, ⌊j/s_w⌋]
        dx[n, c, i, j] = Σ grad over the block of copies of pixel (i, j).

    `scale` is an int or a pair (height, width).

    Shapes: x (N, C, H, W); y (N, C, s_h·H, s_w·W). No parameters.
    Raises ValueError or TypeError for x that is not a batch of pictures.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Upsample.html

    >>> Upsample2d(2).apply((), torch.tensor([[[[1.0, 2.0]]]]))
    tensor([[[[1., 1., 2., 2.],
              [1., 1., 2., 2.]]]])
    """

    _owns_results = True

    scale: int | Pair

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", as_pair("Upsample2d", "scale", self.scale, 1))

    def init(
        self,
        key: Key,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tree:
        """(): there is nothing to learn."""
        self.out_shape(shape)
        return ()

    def out_shape(self, shape: Sequence[int]) -> Shape:
        """(C, s_h·H, s_w·W) of (C, H, W)."""
        channels, height, width = as_shape(self, shape, rank=3)
        rows, columns = pair(self.scale)
        return channels, rows * height, columns * width

    def fwd(self, params: Tree, x: Tensor, *, key: Key | None = None) -> tuple[Tensor, Tensor]:
        """(y, zeros of x's shape that take no memory)."""
        check_no_params(self, params)
        check_tensor(self, "x", x)
        check_pictures(self, x)
        rows, columns = pair(self.scale)
        pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None]  # (N, H, 1, W, 1, C): copied whole
        blocks = pixels.expand(-1, -1, rows, -1, columns, -1)
        copies = blocks.clone(memory_format=torch.contiguous_format)  # flatten may make a view
        y = copies.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        return y, x.new_zeros(()).expand(x.shape)

    def bwd(
        self, params: Tree, residuals: Tensor, grad: Tensor, *, input_grad: bool = True
    ) -> tuple[Tree, Tensor | None]:
        """((), dx)."""
        check_no_params(self, params)
        x = residuals
        batch, channels, height, width = x.shape
        rows, columns = pair(self.scale)
        check_grad(self, grad, (batch, channels, rows * height, columns * width), x)
        if not input_grad:
            return (), None
        if not grad.numel():
            return (), torch.zeros_like(x)
        return (), F.avg_pool2d(grad, (rows, columns), divisor_override=1)

    def __repr__(self) -> str:
        return source(self)
