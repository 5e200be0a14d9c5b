"""Convolution (cross-correlation, as in PyTorch) with stride, padding, dilation and groups.

For one group, kernel taps (t, r), stride s, dilation d, and x taken as 0 outside the picture,

    y[n, o, i, j] = bias[o] + Σ_{c,t,r} weight[o, c, t, r] · x[n, c, s·i + d·t − p, s·j + d·r − p]

so that, with grad for ∂L/∂y,

    dbias[o]            = Σ_{n,i,j} grad[n, o, i, j]
    dweight[o, c, t, r] = Σ_{n,i,j} grad[n, o, i, j] · x[n, c, s·i + d·t − p, s·j + d·r − p]
    dx[n, c, a, b]      = Σ weight[o, c, t, r] · grad[n, o, i, j]
                          over o, t, r, i, j with s·i + d·t − p = a and s·j + d·r − p = b.

`unfold.py` derives these by matrix products; `native.py` calls PyTorch's kernels for them;
`patches.py` is a shorter way where the stride is the kernel's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from funcnet.autocast import without_autocast
from funcnet.keys import Key, check_draw, split, uniform
from funcnet.layer import (
    Layer,
    Shape,
    Tree,
    as_int,
    as_pair,
    as_shape,
    check_grad,
    check_params,
    check_tensor,
    source,
)
from funcnet.layers import native, patches, unfold
from funcnet.layers.geometry import (
    Padding,
    Pair,
    Window,
    as_padding,
    check_pictures,
    padding_sides,
    pair,
)

Method = Literal["auto", "unfold"]


@dataclass(frozen=True, repr=False)
class Conv2d(Layer):
    """A convolution of pictures; the formulas stand at the head of this module.

    `kernel_size`, `stride`, `padding` and `dilation` are ints or pairs (height, width); `padding`
    may also be "valid" (none) or "same" (y as large as x; stride 1 only), with PyTorch's meaning.
    `groups` cuts C and O into that many groups, convolved separately. `method="auto"` calls
    PyTorch's convolution kernels; "unfold" is the derivation by matrix products, written to be
    read. Both give the same numbers; under "auto", y may be in channels_last memory format.

    Shapes: x (N, C, H, W); y (N, O, H′, W′) with H′ = ⌊(H + 2p − d(k−1) − 1)/s⌋ + 1.
    Parameters: {"weight": (O, C/groups, kh, kw), "bias": (O,)}, drawn from U(−√q, √q) with
    q = 1/(C/groups · kh · kw); without "bias" if bias=False. On the CPU, `init` lays the weight out
    in channels_last, as its kernels want it; `.contiguous()` is for tools that want it row-major.

    Raises ValueError or TypeError for hyperparameters, shapes, dtypes and devices that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html

    >>> import funcnet as fn
    >>> layer = fn.Conv2d(8, 3, stride=2, padding=1)
    >>> layer
    Conv2d(8, kernel_size=3, stride=2, padding=1)
    >>> params = layer.init(fn.key(0), (3, 32, 32))
    >>> layer.apply(params, torch.zeros(4, 3, 32, 32)).shape
    torch.Size([4, 8, 16, 16])
    """

    _owns_results = True

    out_channels: int
    kernel_size: int | Pair
    stride: int | Pair = 1
    padding: Padding = 0
    dilation: int | Pair = 1
    groups: int = 1
    bias: bool = True
    method: Method = "auto"
    _window: Window = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        fixed = {
            "out_channels": as_int("Conv2d", "out_channels", self.out_channels, 1),
            "kernel_size": as_pair("Conv2d", "kernel_size", self.kernel_size, 1),
            "stride": as_pair("Conv2d", "stride", self.stride, 1),
            "padding": as_padding("Conv2d", self.padding),
            "dilation": as_pair("Conv2d", "dilation", self.dilation, 1),
            "groups": as_int("Conv2d", "groups", self.groups, 1),
        }
        for name, value in fixed.items():
            object.__setattr__(self, name, value)
        check_options("Conv2d", self.bias, self.method)
        if self.out_channels % self.groups:
            raise ValueError(
                f"Conv2d: expected groups to divide out_channels={self.out_channels}, "
                f"got groups={self.groups}"
            )
        if self.padding == "same" and self.stride != (1, 1):
            raise ValueError(f'Conv2d: expected stride 1 with padding="same", got {self.stride}')
        kernel_size, dilation = pair(self.kernel_size), pair(self.dilation)
        sides = padding_sides(self.padding, kernel_size, dilation)
        window = Window(kernel_size, pair(self.stride), sides, dilation, self.groups)
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
        weight_shape = (self.out_channels, shape[0] // self.groups, *self._window.kernel_size)
        params = init_kernel(self, key, weight_shape, self.bias, dtype, device)
        if self.method == "auto":
            params["weight"] = native.layout(params["weight"])
        return params

    def out_shape(self, shape: Sequence[int]) -> Shape:
        """(O, H′, W′) of (C, H, W)."""
        channels, *size = as_shape(self, shape, rank=3)
        if channels < 1 or channels % self.groups:
            raise ValueError(
                f"{self}: expected channels that groups={self.groups} divides, got {channels}"
            )
        return self.out_channels, *self._window.count(self, size)

    def fwd(self, params: Tree, x: Tensor, *, key: Key | None = None) -> tuple[Tensor, Tensor]:
        """(y, x)."""
        window = self._window
        check_kernel(self, params, x, window, self.bias)
        count = window.count(self, x.shape[2:])
        if self.method == "auto":
            x = native.layout(x)
        with without_autocast(x):
            way = self._way(x, params["weight"], count)
            return way.convolve(x, params["weight"], params.get("bias"), window), x

    def bwd(
        self, params: Tree, residuals: Tensor, grad: Tensor, *, input_grad: bool = True
    ) -> tuple[Tree, Tensor | None]:
        """({"weight": dweight, "bias": dbias}, dx)."""
        x, window = residuals, self._window
        check_kernel(self, params, x, window, self.bias)
        count = window.count(self, x.shape[2:])
        check_grad(self, grad, (len(x), self.out_channels, *count), x)
        with without_autocast(x):
            way = self._way(x, params["weight"], count, backward=True)
            dweight, dx = way.gradients(x, params["weight"], grad, window, input_grad)
            dbias = grad.sum((0, 2, 3)) if self.bias else None
        return like_params(params, dweight, dbias), dx

    def _way(self, x: Tensor, weight: Tensor, count: Pair, backward: bool = False) -> Any:
        """The module that convolves pictures like x, with `count` windows along each axis."""
        if self.method == "unfold":
            return unfold
        worth_it = patches.are_worth_it(x, weight, self._window, count, backward)
        return patches if worth_it else native

    def __repr__(self) -> str:
        return source(self)


def check_options(who: str, bias: bool, method: str) -> None:
    """Refuse values of `bias` and `method` that are not among those there are."""
    if not isinstance(bias, bool):
        raise TypeError(f"{who}: expected bias to be True or False, got {bias!r}")
    if method not in get_args(Method):
        raise ValueError(f"{who}: expected method to be one of {get_args(Method)}, got {method!r}")


def init_kernel(
    layer: Layer,
    key: Key,
    weight_shape: Shape,
    bias: bool,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """Weight and bias from U(−√q, √q), q = 1/(entries of the kernel of one output channel)."""
    check_draw(layer, key, dtype)
    bound = torch.Size(weight_shape[1:]).numel() ** -0.5
    weight_key, bias_key = split(key)
    params = {"weight": uniform(weight_key, weight_shape, -bound, bound, dtype, device)}
    if bias:
        params["bias"] = uniform(bias_key, weight_shape[:1], -bound, bound, dtype, device)
    return params


def like_params(params: Tree, dweight: Tensor, dbias: Tensor | None) -> Tree:
    """The gradients in a dict of the kind of params, in its order."""
    gradients = params.copy()
    gradients["weight"] = dweight
    if dbias is not None:
        gradients["bias"] = dbias
    return gradients


def check_kernel(layer: Any, params: Tree, x: Tensor, window: Window, bias: bool) -> None:
    """Refuse params and x that do not fit a convolution, or one another."""
    check_tensor(layer, "x", x)
    weight = params.get("weight") if isinstance(params, dict) else None
    channels = weight.shape[1] if isinstance(weight, Tensor) and weight.ndim == 4 else "C"
    shapes: dict[str, tuple[int | str, ...]] = {
        "weight": (layer.out_channels, channels, *window.kernel_size)
    }
    if bias:
        shapes["bias"] = (layer.out_channels,)
    check_params(layer, params, shapes, "x", x)
    check_pictures(layer, x, params["weight"].shape[1] * window.groups)
