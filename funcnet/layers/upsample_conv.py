"""Nearest-neighbour upsampling followed by a convolution, in one layer.

`low_resolution.py`, `karatsuba.py` and `transposed.py` are exact ways that never make the upsampled
picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funcnet.autocast import without_autocast
from funcnet.keys import Key
from funcnet.layer import Layer, Shape, Tree, as_int, as_pair, as_shape, check_grad, source
from funcnet.layers import karatsuba, low_resolution, transposed
from funcnet.layers.conv import (
    Conv2d,
    Method,
    check_kernel,
    check_options,
    init_kernel,
    like_params,
)
from funcnet.layers.geometry import Padding, Pair, Window, as_padding, padding_sides, pair
from funcnet.layers.upsample import Upsample2d


@dataclass(frozen=True, repr=False)
class UpsampleConv2d(Layer):
    """`Upsample2d(scale)`, then `Conv2d(out_channels, kernel_size, padding=padding)`.

    `kernel_size`, `scale` and `padding` are ints or pairs (height, width); `padding` may also be
    "same" (y as large as the upsampled picture) or "valid" (none). `method="unfold"` does one after
    the other; "auto" never makes the upsampled picture. On the CPU it does the convolution at low
    resolution, with kh·kw products a source pixel whatever the scale, or fewer for many pixels at
    scale 2 with 3×3 taps, and half precision in float32; on other devices, where the number of
    calls counts most, it is a single transposed convolution.
    All give the same numbers while these are finite: of padding, no product with NaN is made.

    Shapes: x (N, C, H, W); y (N, O, H′, W′) with O = out_channels, H′ = s_h·H + 2p − kh + 1.
    Parameters: {"weight": (O, C, kh, kw), "bias": (O,)}, those of the convolution; on the CPU,
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

    _owns_results = True

    out_channels: int
    kernel_size: int | Pair = 3
    scale: int | Pair = 2
    padding: Padding = "same"
    bias: bool = True
    method: Method = "auto"
    _window: Window = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        fixed = {
            "out_channels": as_int("UpsampleConv2d", "out_channels", self.out_channels, 1),
            "kernel_size": as_pair("UpsampleConv2d", "kernel_size", self.kernel_size, 1),
            "scale": as_pair("UpsampleConv2d", "scale", self.scale, 1),
            "padding": as_padding("UpsampleConv2d", self.padding),
        }
        for name, value in fixed.items():
            object.__setattr__(self, name, value)
        check_options("UpsampleConv2d", self.bias, self.method)
        kernel_size = pair(self.kernel_size)
        window = Window(kernel_size, sides=padding_sides(self.padding, kernel_size))
        object.__setattr__(self, "_window", window)

    def init(
        self,
        key: Key,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tree:
        """{"weight", "bias"} for examples of shape (C, H, W)."""
        self.out_shape(shape)
        weight_shape = (self.out_channels, shape[0], *self._window.kernel_size)
        params = init_kernel(self, key, weight_shape, self.bias, dtype, device)
        if self.method == "auto":
            params["weight"] = low_resolution.layout(params["weight"])
        return params

    def out_shape(self, shape: Sequence[int]) -> Shape:
        """(O, H′, W′) of (C, H, W)."""
        channels, *size = as_shape(self, shape, rank=3)
        if channels < 1:
            raise ValueError(f"{self}: expected at least 1 channel, got {channels}")
        return self.out_channels, *self._out_size(size)

    def fwd(self, params: Tree, x: Tensor, *, key: Key | None = None) -> tuple[Tensor, Tensor]:
        """(y, x)."""
        window = self._window
        check_kernel(self, params, x, window, self.bias)
        self._out_size(x.shape[2:])
        if self.method == "unfold":
            upsample, conv = self._two_steps
            return conv.apply(params, upsample.apply((), x)), x
        weight, bias = params["weight"], params.get("bias")
        with without_autocast(x):
            return self._way(x, weight).convolve(x, weight, bias, pair(self.scale), window), x

    def bwd(
        self, params: Tree, residuals: Tensor, grad: Tensor, *, input_grad: bool = True
    ) -> tuple[Tree, Tensor | None]:
        """({"weight": dweight, "bias": dbias}, dx)."""
        x, window = residuals, self._window
        check_kernel(self, params, x, window, self.bias)
        batch, _, *size = x.shape
        check_grad(self, grad, (batch, self.out_channels, *self._out_size(size)), x)
        if self.method == "unfold":
            upsample, conv = self._two_steps
            upsampled, kept = upsample.fwd((), x)
            dparams, dx = conv.vjp(params, upsampled, grad, input_grad=input_grad)
            return dparams, None if dx is None else upsample.bwd((), kept, dx)[1]
        weight, scale = params["weight"], pair(self.scale)
        with without_autocast(x):
            dweight, dx = self._way(x, weight).gradients(x, weight, grad, scale, window, input_grad)
            dbias = grad.sum((0, 2, 3)) if self.bias else None
        return like_params(params, dweight, dbias), dx

    def _way(self, x: Tensor, weight: Tensor) -> Any:
        """The module that is fastest for pictures like x."""
        if not x.is_cpu:
            return transposed
        worth_it = karatsuba.is_worth_it(x, weight, pair(self.scale), self._window)
        return karatsuba if worth_it else low_resolution

    @property
    def _two_steps(self) -> tuple[Upsample2d, Conv2d]:
        conv = Conv2d(
            self.out_channels,
            self.kernel_size,
            padding=self.padding,
            bias=self.bias,
            method=self.method,
        )
        return Upsample2d(self.scale), conv

    def _out_size(self, size: Sequence[int]) -> Pair:
        scale = pair(self.scale)
        upsampled = (scale[0] * size[0], scale[1] * size[1])
        return self._window.count(f"{self}, after upsampling", upsampled)

    def __repr__(self) -> str:
        return source(self)
