"""Pixels from channels and back: a block of r×r pixels becomes r² channels of one pixel.

With c < C and a, b < r,

    shuffled[n, c, r·i + a, r·j + b] = x[n, (c·r + a)·r + b, i, j].

Nothing is computed: each gradient is the other layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcnet.fields import Size
from funcnet.keys import Key
from funcnet.layer import Layer, Shape
from funcnet.ops import native
from funcnet.ops.need import Need


@dataclass(frozen=True)
class PixelShuffle(Layer):
    """Each pixel's r² channels become a block of r×r pixels; dx is dy, unshuffled.

    The formula stands at the head of `funcnet.layers.pixel_shuffle`; r is `upscale_factor`.

    Shapes: x (N, C·r², H, W); y (N, C, H·r, W·r). No parameters.
    Raises ValueError or TypeError for x of another shape.
    Shi et al., "Real-time single image and video super-resolution using an efficient sub-pixel
    convolutional neural network", 2016.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.PixelShuffle.html

    >>> PixelShuffle(2).apply((), torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1))
    tensor([[[[1., 2.],
              [3., 4.]]]])
    """

    upscale_factor: Size

    _axes = "CHW"
    _fresh = True

    def _out_shape(self, shape: Shape) -> Shape:
        (channels, height, width), r = shape, self.upscale_factor
        if channels % r**2:
            raise ValueError(
                f"{self}: expected channels that {r}² = {r**2} divides, got {channels} "
                f"in the shape {shape}"
            )
        return channels // r**2, r * height, r * width

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, tuple[()]]:
        return _shuffle(x, self.upscale_factor), ()

    def _bwd(self, params: Any, residuals: Any, dy: Tensor, need: Need) -> Any:
        return (), _unshuffle(dy, self.upscale_factor)


@dataclass(frozen=True)
class PixelUnshuffle(Layer):
    """Each block of r×r pixels becomes r² channels of one pixel; dx is dy, shuffled.

    The formula stands at the head of `funcnet.layers.pixel_shuffle`; r is `downscale_factor`.

    Shapes: x (N, C, H·r, W·r); y (N, C·r², H, W). No parameters.
    Raises ValueError or TypeError for x of another shape.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.PixelUnshuffle.html

    >>> PixelUnshuffle(2).apply((), torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).flatten()
    tensor([1., 2., 3., 4.])
    """

    downscale_factor: Size

    _axes = "CHW"
    _fresh = True

    def _out_shape(self, shape: Shape) -> Shape:
        (channels, height, width), r = shape, self.downscale_factor
        if height % r or width % r:
            raise ValueError(
                f"{self}: expected height and width that {r} divides, got {height} and {width} "
                f"in the shape {shape}"
            )
        return r**2 * channels, height // r, width // r

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, tuple[()]]:
        return _unshuffle(x, self.downscale_factor), ()

    def _bwd(self, params: Any, residuals: Any, dy: Tensor, need: Need) -> Any:
        return (), _shuffle(dy, self.downscale_factor)


def _shuffle(x: Tensor, r: int) -> Tensor:
    """(N, C, H·r, W·r) of x (N, C·r², H, W), in x's memory format."""
    if r > 1 and native.memory_format(x) != torch.contiguous_format:
        return torch.pixel_shuffle(x, r)  # in channels_last, PyTorch's is faster
    blocks = torch.unflatten(x, 1, (-1, r, r)).permute(0, 1, 4, 2, 5, 3)  # (N, C, H, r, W, r)
    return _copy(blocks).flatten(4, 5).flatten(2, 3)


def _unshuffle(x: Tensor, r: int) -> Tensor:
    """(N, C·r², H, W) of x (N, C, H·r, W·r)."""
    blocks = torch.unflatten(torch.unflatten(x, 3, (-1, r)), 2, (-1, r))  # (N, C, H, r, W, r)
    return _copy(blocks.permute(0, 1, 3, 5, 2, 4)).flatten(1, 3)


def _copy(x: Tensor) -> Tensor:
    # contiguous() would return x itself where r is 1.
    return x.clone(memory_format=torch.contiguous_format)
