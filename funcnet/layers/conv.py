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

import copy
import math
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from torch import Tensor

from funcnet.checks import check_some_channels, name_of
from funcnet.fields import Flag, OneOf, Padding, Size, Sizes
from funcnet.initializers import Initializer, InitializerOrNone, Uniform
from funcnet.keys import Key
from funcnet.layer import Layer, Part, Shape
from funcnet.ops import convolution, kernel_products, tiles
from funcnet.ops.need import Need
from funcnet.ops.products import Each, Products, over_positions
from funcnet.ops.window import Ints, Window, padding_sides
from funcnet.param import Layout, Param
from funcnet.running import dx_alone

Method: TypeAlias = Annotated[Literal["auto", "unfold"], OneOf(("auto", "unfold"))]
OnlyAuto: TypeAlias = Annotated[Literal["auto"], OneOf(("auto",))]

_Kernels = TypeVar("_Kernels", bound="Kernels")


@dataclass(frozen=True)
class Kernels(Layer):
    """A layer that learns a kernel for each channel of y: the other arguments are keyword-only."""

    out_channels: Size
    kernel_size: Sizes

    def __new__(cls: type[_Kernels], *arguments: Any, **_: Any) -> _Kernels:
        """Raise TypeError for arguments in torch.nn's order, which starts with x's channels."""
        if len(arguments) > 2:
            raise TypeError(_advice(cls, arguments))
        return super().__new__(cls)


@dataclass(frozen=True)
class Convolution(Kernels):
    """A convolution along every axis behind the channels; `Conv2d` explains it."""

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
        check_groups(self)
        sizes: Any = self
        if self.padding == "same" and set(sizes.stride) != {1}:
            raise ValueError(
                f'{type(self).__name__}: expected stride 1 with padding="same", got {self.stride}'
            )
        sides = padding_sides(sizes.padding, sizes.kernel_size, sizes.dilation)
        window = Window(sizes.kernel_size, sizes.stride, sides, sizes.dilation, self.groups)
        object.__setattr__(self, "_window", window)

    def _params(self, shape: Shape) -> dict[str, Param]:
        # No weight fits an x that cannot be divided into groups.
        channels = 0 if shape[0] % self.groups else shape[0] // self.groups
        weight_shape = (self.out_channels, channels, *self._window.kernel_size)
        return kernel_params(self, weight_shape)

    def _layout(self, name: str) -> Layout | None:
        return convolution.layout if name == "weight" and self.method == "auto" else None

    def _out_shape(self, shape: Shape) -> Shape:
        channels, *size = shape
        check_channels(self, channels)
        return self.out_channels, *count_windows(self, size)

    def _tile(self, shape: Shape, part: Part) -> tuple[Part, Layer] | None:
        return windowed_tile(self, shape, part)

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        weight, bias = params["weight"], params.get("bias")
        return convolution.convolve(x, weight, bias, self._window, self.method)

    def _bwd(self, params: Any, x: Tensor, grad: Tensor, need: Need) -> Any:
        weight = params["weight"]
        dweight, dx = convolution.gradients(x, weight, grad, self._window, self.method, need)
        return kernel_gradients(dweight, grad, self.bias), dx

    def _bwd_each(self, params: Any, x: Tensor, grad: Tensor, need: Need) -> Any:
        dweight = kernel_products.convolution(x, params["weight"], grad, self._window)
        return kernel_gradients_each(self, dweight, params, x, grad, need)


@dataclass(frozen=True)
class Conv1d(Convolution):
    """A convolution of signals: `Conv2d` with a single axis.

    Sizes are ints or tuples of one.

    Shapes: x (N, C, L); y (N, O, L′) with L′ = ⌊(L + 2p − d(k−1) − 1)/s⌋ + 1.
    Parameters: {"weight": (O, C/groups, k), "bias": (O,)}, drawn as those of `Conv2d`.

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
    """A convolution of images; the formulas stand at the head of this module.

    `kernel_size`, `stride`, `padding` and `dilation` are ints or pairs (height, width); `padding`
    may also be "valid" (none) or "same" (y as large as x; stride 1 only), with PyTorch's meaning.
    `groups` cuts C and O into that many groups, convolved separately. `method="auto"` calls
    the fastest implementation; "unfold" is the derivation by matrix products, written to be read.
    Both give the same numbers; under "auto", y may be in channels_last memory format.
    `weight_init` and `bias_init` are initialisers, such as `fn.initializers.Normal(std=0.01)`.

    Shapes: x (N, C, H, W); y (N, O, H′, W′) with H′ = ⌊(H + 2p − d(k−1) − 1)/s⌋ + 1.
    Parameters: {"weight": (O, C/groups, kh, kw), "bias": (O,)}, drawn from U(−√q, √q) with
    q = 1/(C/groups · kh · kw) where no initialiser is given; without "bias" if bias=False. On the
    CPU, `init` lays the weight out in channels_last, as its kernels want it; `.contiguous()` is for
    tools that want it contiguous.

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
    Parameters: {"weight": (O, C/groups, kd, kh, kw), "bias": (O,)}, drawn as those of `Conv2d`; on
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


def kernel_params(layer: Any, weight_shape: Shape) -> dict[str, Param]:
    """Weight and bias by the layer's initialisers.

    Without one, from U(−√q, √q), q = 1/(entries of the kernel of the weight's first axis).
    """
    bound = max(1, math.prod(weight_shape[1:])) ** -0.5
    default: Initializer = Uniform(-bound, bound)
    params = {"weight": Param(weight_shape, layer.weight_init or default)}
    if layer.bias:
        params["bias"] = Param((layer.out_channels,), layer.bias_init or default)
    return params


def kernel_gradients(dweight: Tensor | None, grad: Tensor, bias: bool) -> dict[str, Tensor] | None:
    """The gradients of weight and bias, given the first; None if they are not needed."""
    if dweight is None:
        return None
    if not bias:
        return {"weight": dweight}
    return {"weight": dweight, "bias": grad.sum((0, *range(2, grad.ndim)))}


def kernel_gradients_each(
    layer: Any, dweight: Products, params: Any, x: Tensor, grad: Tensor, need: Need
) -> tuple[dict[str, Each], Tensor | None]:
    """The gradients of weight and bias for each example, given the first; and dx."""
    each: dict[str, Each] = {"weight": dweight}
    if layer.bias:
        each["bias"] = over_positions(grad)
    return each, dx_alone(layer, params, x, grad, need)


def windowed_tile(
    layer: Any, shape: Shape, part: Part, scale: Ints = ()
) -> tuple[Part, Layer] | None:
    """`_tile` of a layer that slides a window over x, or over x upsampled by `scale`."""
    if layer.method != "auto":
        return None
    source, window = tiles.behind(part, shape[1:], layer._window, scale)
    tile = copy.copy(layer)
    object.__setattr__(tile, "_window", window)
    return source, tile


def check_groups(layer: Any) -> None:
    """Raise ValueError unless groups divides out_channels."""
    if layer.out_channels % layer.groups:
        raise ValueError(
            f"{type(layer).__name__}: expected groups to divide out_channels={layer.out_channels}, "
            f"got groups={layer.groups}"
        )


def check_channels(layer: Any, channels: int) -> None:
    """Raise ValueError unless there are channels, and groups divides them."""
    check_some_channels(layer, channels)
    if channels % layer.groups:
        raise ValueError(
            f"{layer}: expected channels that groups={layer.groups} divides, got {channels}"
        )


def check_size(who: object, size: Any) -> None:
    """Raise ValueError unless every axis has at least one entry."""
    if min(size) < 1:
        raise ValueError(
            f"{name_of(who)}: expected {_EXAMPLES[len(size)]} of at least "
            f"{'×'.join('1' * len(size))}, got size {tuple(size)}"
        )


def check_entries(layer: Layer, channels: int, size: Any) -> None:
    """Raise ValueError unless x has at least one channel, and one entry on each axis."""
    check_some_channels(layer, channels)
    check_size(layer, size)


def count_windows(layer: Any, size: Any, after: str = "") -> Ints:
    """The number of windows that fit on each axis. Raises ValueError where not even one does.

    `after` tells what x has gone through before.
    """
    check_size(layer, size)
    window: Window = layer._window
    count = window.count(size)
    if min(count) < 1:
        raise ValueError(
            f"{name_of(layer)}{after}: expected {_EXAMPLES[len(size)]} at least as large as the "
            f"kernel's reach {window.reach}, got size {tuple(size)}, "
            f"{window.padded(size)} with padding"
        )
    return count


_EXAMPLES = {1: "signals", 2: "images", 3: "volumes"}


def _advice(cls: type[Kernels], arguments: tuple[Any, ...]) -> str:
    """The message that refuses so many arguments by position, and suggests what was meant."""
    names = [field.name for field in fields(cls) if field.init]
    meant = [repr(value) for value in arguments[1:3]]
    # Behind x's channels, torch.nn has the same order.
    meant += [f"{n}={v!r}" for n, v in zip(names[2:], arguments[3:], strict=False)]
    return (
        f"{cls.__name__}: expected out_channels and kernel_size by position, the rest by keyword, "
        f"got {len(arguments)} positional arguments: the input's channels are read off the shape; "
        f"did you mean {cls.__name__}({', '.join(meant)})? "
        f"{names[2].capitalize()} is given by name, as in {names[2]}={arguments[2]!r}"
    )
