"""Convolution (cross-correlation, as in PyTorch) with stride, padding, dilation and groups.

For one group, kernel taps (t, r), stride s, dilation d, and x taken as 0 outside the image,

    y[n, o, i, j] = bias[o] + Σ_{c,t,r} weight[o, c, t, r] · x[n, c, s·i + d·t − p, s·j + d·r − p]

so that, with grad for ∂L/∂y,

    dbias[o]            = Σ_{n,i,j} grad[n, o, i, j]
    dweight[o, c, t, r] = Σ_{n,i,j} grad[n, o, i, j] · x[n, c, s·i + d·t − p, s·j + d·r − p]
    dx[n, c, a, b]      = Σ weight[o, c, t, r] · grad[n, o, i, j]
                          over o, t, r, i, j with s·i + d·t − p = a and s·j + d·r − p = b.

Signals and volumes are convolved likewise, along one axis or three.
`ops/convolution.py` chooses between implementations; `ops/unfold.py` derives these formulas by
matrix products.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from torch import Tensor

from funcnet.checks import check_divided
from funcnet.fields import Flag, OneOf, Padding, Size, Sizes
from funcnet.initializers import InitializerOrNone
from funcnet.keys import Key
from funcnet.layer import Layer, Part, Shape
from funcnet.layers.kernels import Kernels, count_windows
from funcnet.ops import convolution, kernel_products
from funcnet.ops.need import Need
from funcnet.ops.window import Window
from funcnet.param import Layout, Param

Method: TypeAlias = Annotated[Literal["auto", "unfold"], OneOf(("auto", "unfold"))]
OnlyAuto: TypeAlias = Annotated[Literal["auto"], OneOf(("auto",))]


@dataclass(frozen=True)
class Convolution(Kernels):
    """A convolution along every axis after the channels; `Conv2d` explains it."""

    _: KW_ONLY
    stride: Sizes = 1
    padding: Padding = 0
    dilation: Sizes = 1
    groups: Size = 1
    bias: Flag = True
    method: Method = "auto"
    weight_init: InitializerOrNone = None
    bias_init: InitializerOrNone = None
    _window: Window = field(init=False, repr=False, compare=False)

    _fresh = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_window()
        if self.padding == "same" and self._window.is_strided:
            raise ValueError(
                f'{type(self).__name__}: expected stride 1 with padding="same", got {self.stride}'
            )

    def _params(self, shape: Shape) -> dict[str, Param]:
        # No weight fits an x that cannot be divided into groups.
        channels = 0 if shape[0] % self.groups else shape[0] // self.groups
        weight_shape = (self.out_channels, channels, *self._window.kernel_size)
        return self._kernel_params(weight_shape)

    def _layout(self, name: str) -> Layout | None:
        return convolution.layout if name == "weight" and self.method == "auto" else None

    def _out_shape(self, shape: Shape) -> Shape:
        check_divided(self, "groups", shape[0])
        return self.out_channels, *count_windows(self, shape[1:])

    def _tile(self, shape: Shape, part: Part) -> tuple[Part, Layer] | None:
        return self._windowed_tile(shape, part)

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        weight, bias = params["weight"], params.get("bias")
        return convolution.convolve(x, weight, bias, self._window, self.method)

    def _bwd(self, params: Any, x: Tensor, grad: Tensor, need: Need) -> Any:
        weight = params["weight"]
        dweight, dx = convolution.gradients(x, weight, grad, self._window, self.method, need)
        return self._kernel_gradients(dweight, grad), dx

    def _bwd_each(self, params: Any, x: Tensor, grad: Tensor, need: Need) -> Any:
        dweight = kernel_products.convolution(x, params["weight"], grad, self._window)
        return self._kernel_gradients_each(dweight, params, x, grad, need)


@dataclass(frozen=True)
class Conv1d(Convolution):
    """A convolution of signals: `Conv2d` with a single axis.

    Sizes are ints or tuples of one.

    Shapes: x (N, C, L); y (N, O, L′) with L′ = ⌊(L + 2p − d(k−1) − 1)/s⌋ + 1.
    Parameters: {"weight": (O, C/groups, k), "bias": (O,)}, drawn as for `Conv2d`.

    Raises ValueError or TypeError for hyperparameters, shapes, dtypes and devices that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv1d.html

    >>> import funcnet as fn
    >>> import torch
    >>> layer = fn.Conv1d(8, 5, padding="same", dilation=2)
    >>> params = layer.init(fn.key(0), (3, 100))
    >>> layer.apply(params, torch.zeros(4, 3, 100)).shape
    torch.Size([4, 8, 100])
    """

    method: OnlyAuto = field(default="auto", kw_only=True)

    _axes = "CL"


@dataclass(frozen=True)
class Conv2d(Convolution):
    """A convolution of images, by the formulas in `funcnet.layers.conv`.

    `kernel_size`, `stride`, `padding` and `dilation` are ints or pairs (height, width); `padding`
    may also be "valid" (none) or "same" (y as large as x; stride 1 only), with PyTorch's meaning.
    `groups` cuts C and O into that many groups, convolved separately. `method="auto"` calls
    the fastest implementation; "unfold" is the derivation by matrix products, written to be read.
    Both give the same numbers; under "auto", y may be in channels_last memory format.
    `weight_init` and `bias_init` are initialisers, such as `fn.initializers.Normal(std=0.01)`.

    Shapes: x (N, C, H, W); y (N, O, H′, W′) with H′ = ⌊(H + 2p − d(k−1) − 1)/s⌋ + 1.
    Parameters: {"weight": (O, C/groups, kh, kw), "bias": (O,)}, drawn from U(−√q, √q) with
    q = 1/(C/groups · kh · kw) where no initialiser is given; without "bias" if bias=False. On the
    CPU, `init` lays the weight out in channels_last, which its kernels prefer; call `.contiguous()`
    for tools that need a contiguous weight.

    Raises ValueError or TypeError for hyperparameters, shapes, dtypes and devices that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html

    >>> import funcnet as fn
    >>> import torch
    >>> layer = fn.Conv2d(8, 3, stride=2, padding=1)
    >>> layer
    Conv2d(8, kernel_size=3, stride=2, padding=1)
    >>> params = layer.init(fn.key(0), (3, 32, 32))
    >>> layer.apply(params, torch.zeros(4, 3, 32, 32)).shape
    torch.Size([4, 8, 16, 16])
    """

    _axes = "CHW"


@dataclass(frozen=True)
class Conv3d(Convolution):
    """A convolution of volumes: `Conv2d` with three axes.

    Sizes are ints or triples (depth, height, width).

    Shapes: x (N, C, D, H, W); y (N, O, D′, H′, W′) with D′ = ⌊(D + 2p − d(k−1) − 1)/s⌋ + 1.
    Parameters: {"weight": (O, C/groups, kd, kh, kw), "bias": (O,)}, drawn as for `Conv2d`; on
    the CPU, `init` lays the weight out in channels_last_3d.

    Raises ValueError or TypeError for hyperparameters, shapes, dtypes and devices that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv3d.html

    >>> import funcnet as fn
    >>> import torch
    >>> layer = fn.Conv3d(8, 3, stride=(1, 2, 2), padding=1)
    >>> params = layer.init(fn.key(0), (3, 4, 16, 16))
    >>> layer.apply(params, torch.zeros(2, 3, 4, 16, 16)).shape
    torch.Size([2, 8, 4, 8, 8])
    """

    method: OnlyAuto = field(default="auto", kw_only=True)

    _axes = "CDHW"
