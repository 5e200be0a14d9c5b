"""Transposed convolution, the adjoint of a convolution: each entry of x adds a kernel to y.

For one group, kernel taps (t, r), stride s, dilation d and padding p,

    y[n, o, a, b] = bias[o] + Σ weight[c, o, t, r] · x[n, c, i, j]
                    over c, t, r, i, j with s·i + d·t − p = a and s·j + d·r − p = b

so that, with grad for ∂L/∂y, taken as 0 outside the image,

    dbias[o]            = Σ_{n,a,b} grad[n, o, a, b]
    dweight[c, o, t, r] = Σ_{n,i,j} x[n, c, i, j] · grad[n, o, s·i + d·t − p, s·j + d·r − p]
    dx[n, c, i, j]      = Σ_{o,t,r} weight[c, o, t, r] · grad[n, o, s·i + d·t − p, s·j + d·r − p].

Signals and volumes likewise, along one axis or three. What was y of a convolution is x here.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from torch import Tensor

from funcnet.checks import check_divided
from funcnet.fields import Flag, Margins, Size, Sizes
from funcnet.initializers import InitializerOrNone
from funcnet.keys import Key
from funcnet.layer import Shape
from funcnet.layers.kernels import Kernels, check_size
from funcnet.ops import conv_transpose, convolution, kernel_products
from funcnet.ops.need import Need
from funcnet.ops.window import Window
from funcnet.param import Layout, Param


@dataclass(frozen=True)
class ConvTranspose(Kernels):
    """A transposed convolution along every axis after the channels; see `ConvTranspose2d`."""

    _: KW_ONLY
    stride: Sizes = 1
    padding: Margins = 0
    output_padding: Margins = 0
    groups: Size = 1
    bias: Flag = True
    dilation: Sizes = 1
    weight_init: InitializerOrNone = None
    bias_init: InitializerOrNone = None
    _window: Window = field(init=False, repr=False, compare=False)

    _fresh = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_window()
        steps = zip(self._extra, self._window.stride, self._window.dilation, strict=True)
        if not all(extra < max(stride, dilation) for extra, stride, dilation in steps):
            raise ValueError(
                f"{type(self).__name__}: expected output_padding smaller than stride or dilation, "
                f"got output_padding={self.output_padding}, stride={self.stride}, "
                f"dilation={self.dilation}"
            )

    def _params(self, shape: Shape) -> dict[str, Param]:
        own = self.out_channels // self.groups
        weight_shape = (shape[0], own, *self._window.kernel_size)
        return self._kernel_params(weight_shape)

    def _layout(self, name: str) -> Layout | None:
        return convolution.layout if name == "weight" else None

    def _out_shape(self, shape: Shape) -> Shape:
        channels, *size = shape
        check_divided(self, "groups", channels)
        check_size(self, size)
        window, extra = self._window, self._extra
        steps = zip(size, window.stride, window.sides, window.reach, extra, strict=True)
        y = tuple((n - 1) * s - 2 * p + reach + more for n, s, (p, _), reach, more in steps)
        if min(y) < 1:
            raise ValueError(
                f"{self}: expected a size that leaves y at least one entry on each axis, "
                f"got size {tuple(size)}, for which y has size {y}"
            )
        return self.out_channels, *y

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        weight, bias = params["weight"], params.get("bias")
        return conv_transpose.convolve(x, weight, bias, self._window, self._extra)

    def _bwd(self, params: Any, x: Tensor, grad: Tensor, need: Need) -> Any:
        dweight, dx = conv_transpose.gradients(x, params["weight"], grad, self._window, need)
        return self._kernel_gradients(dweight, grad), dx

    def _bwd_each(self, params: Any, x: Tensor, grad: Tensor, need: Need) -> Any:
        dweight = kernel_products.convolution(grad, params["weight"], x, self._window)
        return self._kernel_gradients_each(dweight, params, x, grad, need)

    @property
    def _extra(self) -> Any:
        return self.output_padding


@dataclass(frozen=True)
class ConvTranspose1d(ConvTranspose):
    """A transposed convolution of signals: `ConvTranspose2d` with a single axis.

    Sizes are ints or tuples of one.

    Shapes: x (N, C, L); y (N, O, L′) with L′ = (L − 1)s − 2p + d(k−1) + output_padding + 1.
    Parameters: {"weight": (C, O/groups, k), "bias": (O,)}, drawn as for `ConvTranspose2d`.

    Raises ValueError or TypeError for hyperparameters, shapes, dtypes and devices that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.ConvTranspose1d.html

    >>> import funcnet as fn
    >>> import torch
    >>> layer = fn.ConvTranspose1d(8, 4, stride=2, padding=1)
    >>> params = layer.init(fn.key(0), (3, 50))
    >>> layer.apply(params, torch.zeros(4, 3, 50)).shape
    torch.Size([4, 8, 100])
    """

    _axes = "CL"


@dataclass(frozen=True)
class ConvTranspose2d(ConvTranspose):
    """A transposed convolution of images, by the formulas in `funcnet.layers.conv_transpose`.

    `kernel_size`, `stride`, `padding`, `output_padding` and `dilation` are ints or pairs (height,
    width). `padding` takes entries away on both sides of y, as many as a convolution from y to x
    would add. `output_padding` adds entries at the end of each axis of y. `groups` cuts C and O
    into that many groups. `weight_init` and `bias_init` are initialisers. y may be in channels_last
    memory format.

    Shapes: x (N, C, H, W); y (N, O, H′, W′) with H′ = (H − 1)s − 2p + d(k−1) + output_padding + 1.
    Parameters: {"weight": (C, O/groups, kh, kw), "bias": (O,)}, drawn from U(−√q, √q) with
    q = 1/(O/groups · kh · kw) where no initialiser is given; without "bias" if bias=False. On the
    CPU, `init` lays the weight out in channels_last.

    Raises ValueError or TypeError for hyperparameters, shapes, dtypes and devices that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.ConvTranspose2d.html

    >>> import funcnet as fn
    >>> import torch
    >>> layer = fn.ConvTranspose2d(8, 3, stride=2, padding=1, output_padding=1)
    >>> layer
    ConvTranspose2d(8, kernel_size=3, stride=2, padding=1, output_padding=1)
    >>> params = layer.init(fn.key(0), (3, 16, 16))
    >>> layer.apply(params, torch.zeros(4, 3, 16, 16)).shape
    torch.Size([4, 8, 32, 32])
    """

    _axes = "CHW"


@dataclass(frozen=True)
class ConvTranspose3d(ConvTranspose):
    """A transposed convolution of volumes: `ConvTranspose2d` with three axes.

    Sizes are ints or triples (depth, height, width).

    Shapes: x (N, C, D, H, W); y (N, O, D′, H′, W′) with
    D′ = (D − 1)s − 2p + d(k−1) + output_padding + 1.
    Parameters: {"weight": (C, O/groups, kd, kh, kw), "bias": (O,)}, drawn as for
    `ConvTranspose2d`; on the CPU, `init` lays the weight out in channels_last_3d.

    Raises ValueError or TypeError for hyperparameters, shapes, dtypes and devices that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.ConvTranspose3d.html

    >>> import funcnet as fn
    >>> import torch
    >>> layer = fn.ConvTranspose3d(8, 2, stride=2)
    >>> params = layer.init(fn.key(0), (3, 4, 8, 8))
    >>> layer.apply(params, torch.zeros(2, 3, 4, 8, 8)).shape
    torch.Size([2, 8, 8, 16, 16])
    """

    _axes = "CDHW"
