"""Convolution (cross-correlation, as in PyTorch) with stride, padding, dilation and groups.

For one group, kernel taps (t, r), stride s, dilation d, and x taken as 0 outside the image,

    y[n, o, i, j] = bias[o] + Σ_{c,t,r} weight[o, c, t, r] · x[n, c, s·i + d·t − p, s·j + d·r − p]

so that, with grad for ∂L/∂y,

    dbias[o]            = Σ_{n,i,j} grad[n, o, i, j]
    dweight[o, c, t, r] = Σ_{n,i,j} grad[n, o, i, j] · x[n, c, s·i + d·t − p, s·j + d·r − p]
    dx[n, c, a, b]      = Σ weight[o, c, t, r] · grad[n, o, i, j]
                          over o, t, r, i, j with s·i + d·t − p = a and s·j + d·r − p = b.

`ops/convolution.py` chooses between implementations; `ops/unfold.py` derives these formulas by
matrix products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from torch import Tensor

from funcnet.checks import name_of
from funcnet.fields import Flag, OneOf, Padding, Size, Sizes
from funcnet.initializers import Uniform
from funcnet.keys import Key
from funcnet.layer import Layer, Param, Shape
from funcnet.ops import convolution, native
from funcnet.ops.need import Need
from funcnet.ops.window import Window, padding_sides

Method: TypeAlias = Annotated[Literal["auto", "unfold"], OneOf(("auto", "unfold"))]


@dataclass(frozen=True)
class Conv2d(Layer):
    """A convolution of images; the formulas stand at the head of this module.

    `kernel_size`, `stride`, `padding` and `dilation` are ints or pairs (height, width); `padding`
    may also be "valid" (none) or "same" (y as large as x; stride 1 only), with PyTorch's meaning.
    `groups` cuts C and O into that many groups, convolved separately. `method="auto"` calls
    the fastest implementation; "unfold" is the derivation by matrix products, written to be read.
    Both give the same numbers; under "auto", y may be in channels_last memory format.

    Shapes: x (N, C, H, W); y (N, O, H′, W′) with H′ = ⌊(H + 2p − d(k−1) − 1)/s⌋ + 1.
    Parameters: {"weight": (O, C/groups, kh, kw), "bias": (O,)}, drawn from U(−√q, √q) with
    q = 1/(C/groups · kh · kw); without "bias" if bias=False. On the CPU, `init` lays the weight out
    in channels_last, as its kernels want it; `.contiguous()` is for tools that want it contiguous.

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

    out_channels: Size
    kernel_size: Sizes
    stride: Sizes = 1
    padding: Padding = 0
    dilation: Sizes = 1
    groups: Size = 1
    bias: Flag = True
    method: Method = "auto"
    _window: Window = field(init=False, repr=False, compare=False)

    _axes = "CHW"
    _fresh = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out_channels % self.groups:
            raise ValueError(
                f"Conv2d: expected groups to divide out_channels={self.out_channels}, "
                f"got groups={self.groups}"
            )
        if self.padding == "same" and self.stride != (1, 1):
            raise ValueError(f'Conv2d: expected stride 1 with padding="same", got {self.stride}')
        sizes: Any = self
        sides = padding_sides(sizes.padding, sizes.kernel_size, sizes.dilation)
        window = Window(sizes.kernel_size, sizes.stride, sides, sizes.dilation, self.groups)
        object.__setattr__(self, "_window", window)

    def _params(self, shape: Shape) -> dict[str, Param]:
        # No weight fits an x that cannot be divided into groups.
        channels = 0 if shape[0] % self.groups else shape[0] // self.groups
        weight_shape = (self.out_channels, channels, *self._window.kernel_size)
        return kernel_params(weight_shape, self.bias, self.method == "auto" and native.layout)

    def _out_shape(self, shape: Shape) -> Shape:
        channels, *size = shape
        if channels < 1 or channels % self.groups:
            raise ValueError(
                f"{self}: expected channels that groups={self.groups} divides, got {channels}"
            )
        return self.out_channels, *count_windows(self, self._window, size)

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        weight, bias = params["weight"], params.get("bias")
        return convolution.convolve(x, weight, bias, self._window, self.method)

    def _bwd(self, params: Any, x: Tensor, grad: Tensor, need: Need) -> Any:
        weight = params["weight"]
        dweight, dx = convolution.gradients(x, weight, grad, self._window, self.method, need)
        return kernel_gradients(dweight, grad, self.bias), dx


def kernel_params(weight_shape: Shape, bias: bool, layout: Any) -> dict[str, Param]:
    """Weight and bias from U(−√q, √q), q = 1/(entries of the kernel of one output channel)."""
    bound = max(1, math.prod(weight_shape[1:])) ** -0.5
    params = {"weight": Param(weight_shape, Uniform(-bound, bound), layout or None)}
    if bias:
        params["bias"] = Param(weight_shape[:1], Uniform(-bound, bound))
    return params


def kernel_gradients(dweight: Tensor | None, grad: Tensor, bias: bool) -> dict[str, Tensor] | None:
    """The gradients of weight and bias, given the first; None if they are not needed."""
    if dweight is None:
        return None
    return {"weight": dweight, "bias": grad.sum((0, 2, 3))} if bias else {"weight": dweight}


def count_windows(who: object, window: Window, size: Any) -> tuple[int, int]:
    """How many windows fit on each axis. Raises ValueError where not even one does."""
    if min(size) < 1:
        raise ValueError(f"{name_of(who)}: expected images of at least 1×1, got size {tuple(size)}")
    count = window.count(size)
    if min(count) < 1:
        raise ValueError(
            f"{name_of(who)}: expected images at least as large as the kernel's reach "
            f"{window.reach}, got size {tuple(size)}, {window.padded(size)} with padding"
        )
    return count
