"""Nearest-neighbour upsampling by whole numbers, alone and followed by a convolution."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcnet.checks import name_of
from funcnet.fields import Flag, Padding, Sizes
from funcnet.initializers import InitializerOrNone
from funcnet.keys import Key
from funcnet.layer import Layer, Layout, Param, Shape
from funcnet.layers.conv import (
    Conv2d,
    Kernels,
    Method,
    count_windows,
    kernel_gradients,
    kernel_params,
)
from funcnet.ops import low_resolution, upsampling
from funcnet.ops.need import Need
from funcnet.ops.window import Pair, Window, padding_sides


@dataclass(frozen=True)
class Upsample2d(Layer):
    """Every pixel becomes a block of s_h × s_w copies:

        y[n, c, i, j]  = x[n, c, ⌊i/s_h⌋, ⌊j/s_w⌋]
        dx[n, c, i, j] = Σ grad over the block of copies of pixel (i, j).

    `scale` is an int or a pair (height, width).

    Shapes: x (N, C, H, W); y (N, C, s_h·H, s_w·W). No parameters.
    Raises ValueError or TypeError for x that is not a batch of images.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Upsample.html

    >>> Upsample2d(2).apply((), torch.tensor([[[[1.0, 2.0]]]]))
    tensor([[[[1., 1., 2., 2.],
              [1., 1., 2., 2.]]]])
    """

    scale: Sizes

    _axes = "CHW"
    _fresh = True

    def _out_shape(self, shape: Shape) -> Shape:
        channels, height, width = shape
        rows, columns = _pair(self.scale)
        return channels, rows * height, columns * width

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        rows, columns = _pair(self.scale)
        pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None]  # (N, H, 1, W, 1, C): copied whole
        blocks = pixels.expand(-1, -1, rows, -1, columns, -1)
        # Where expanding changes nothing, flatten() would return a view of x.
        copies = blocks.clone(memory_format=torch.contiguous_format)
        y = copies.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        return y, x.new_empty((0, *x.shape))

    def _bwd(self, params: Any, like: Tensor, grad: Tensor, need: Need) -> Any:
        if not need.input:
            return (), None
        if not grad.numel():
            return (), grad.new_zeros(like.shape[1:])
        return (), F.avg_pool2d(grad, _pair(self.scale), divisor_override=1)


@dataclass(frozen=True)
class UpsampleConv2d(Kernels):
    """`Upsample2d(scale)`, then `Conv2d(out_channels, kernel_size, padding=padding)`.

    `kernel_size`, `scale` and `padding` are ints or pairs (height, width); `padding` may also be
    "same" (y as large as the upsampled image) or "valid" (none). `method="unfold"` does one after
    the other; "auto" never makes the upsampled image. On the CPU it does the convolution at low
    resolution, with kh·kw products a source pixel whatever the scale, or fewer for many pixels at
    scale 2 with 3×3 taps, and half precision in float32; on other devices, where the number of
    calls counts most, it is a single transposed convolution.
    All give the same numbers while these are finite: of padding, no product with NaN is made.

    Shapes: x (N, C, H, W); y (N, O, H′, W′) with O = out_channels, H′ = s_h·H + 2p − kh + 1.
    Parameters: {"weight": (O, C, kh, kw), "bias": (O,)}, as for the convolution; on the CPU,
    `init` lays the weight out tap by tap.

    Raises ValueError or TypeError for hyperparameters, shapes, dtypes and devices that do not fit.
    Upsampling and convolving against checkerboard artefacts: Odena et al., "Deconvolution and
    checkerboard artifacts", Distill, 2016.

    >>> import funcnet as fn
    >>> layer = fn.UpsampleConv2d(3)
    >>> params = layer.init(fn.key(0), (8, 16, 16))
    >>> layer.apply(params, torch.zeros(2, 8, 16, 16)).shape
    torch.Size([2, 3, 32, 32])
    """

    kernel_size: Sizes = 3
    _: KW_ONLY
    scale: Sizes = 2
    padding: Padding = "same"
    bias: Flag = True
    method: Method = "auto"
    weight_init: InitializerOrNone = None
    bias_init: InitializerOrNone = None
    _window: Window = field(init=False, repr=False, compare=False)
    _steps: tuple[Upsample2d, Conv2d] = field(init=False, repr=False, compare=False)

    _axes = "CHW"
    _fresh = True

    def __post_init__(self) -> None:
        super().__post_init__()
        kernel_size, padding = _pair(self.kernel_size), self.padding
        steps = (
            Upsample2d(self.scale),
            Conv2d(
                self.out_channels, kernel_size, padding=padding, bias=self.bias, method=self.method
            ),
        )
        window = Window(kernel_size, sides=padding_sides(padding, kernel_size))
        object.__setattr__(self, "_window", window)
        object.__setattr__(self, "_steps", steps)

    def _params(self, shape: Shape) -> dict[str, Param]:
        weight_shape = (self.out_channels, shape[0], *self._window.kernel_size)
        return kernel_params(self, weight_shape, self.out_channels)

    def _layout(self, name: str) -> Layout | None:
        return low_resolution.layout if name == "weight" and self.method == "auto" else None

    def _out_shape(self, shape: Shape) -> Shape:
        channels, height, width = shape
        if channels < 1:
            raise ValueError(f"{self}: expected at least 1 channel, got {channels}")
        rows, columns = _pair(self.scale)
        upsampled = (rows * height, columns * width)
        who = f"{name_of(self)}, after upsampling"
        return self.out_channels, *count_windows(who, self._window, upsampled)

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        if self.method == "unfold":
            upsample, conv = self._steps
            return conv._fwd(params, upsample._fwd((), x, None)[0], None)[0], x
        weight, bias = params["weight"], params.get("bias")
        return upsampling.convolve(x, weight, bias, _pair(self.scale), self._window), x

    def _bwd(self, params: Any, x: Tensor, grad: Tensor, need: Need) -> Any:
        if self.method == "unfold":
            upsample, conv = self._steps
            upsampled, kept = upsample._fwd((), x, None)
            dparams, dupsampled = conv._bwd(params, upsampled, grad, need)
            return dparams, upsample._bwd((), kept, dupsampled, need)[1]
        weight, scale = params["weight"], _pair(self.scale)
        dweight, dx = upsampling.gradients(x, weight, grad, scale, self._window, need)
        return kernel_gradients(dweight, grad, self.bias), dx


def _pair(sizes: Any) -> Pair:
    """The pair that `Sizes` has made of a field."""
    pair: Pair = sizes
    return pair
