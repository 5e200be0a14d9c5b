"""Nearest-neighbour upsampling by whole numbers, alone and followed by a convolution."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from torch import Tensor

from funcnet.fields import Flag, OneOf, Padding, Sizes
from funcnet.initializers import InitializerOrNone
from funcnet.keys import Key
from funcnet.layer import Layer, Part, Shape
from funcnet.layers.conv import Conv2d
from funcnet.layers.kernels import Kernels, check_entries, count_windows
from funcnet.ops import karatsuba, kernel_products, low_resolution, two_steps, upsampling
from funcnet.ops.need import Need
from funcnet.ops.window import Pair, Window, padding_sides
from funcnet.ops.without_entries import without_entries
from funcnet.param import Layout, Param

Method: TypeAlias = Annotated[
    Literal["auto", "unfold", "karatsuba"], OneOf(("auto", "unfold", "karatsuba"))
]


@dataclass(frozen=True)
class Upsample2d(Layer):
    """Every pixel becomes a block of s_h × s_w copies:

        y[n, c, i, j]  = x[n, c, ⌊i/s_h⌋, ⌊j/s_w⌋]
        dx[n, c, i, j] = Σ grad over the block of copies of pixel (i, j).

    `scale` is an int or a pair (height, width).

    Shapes: x (N, C, H, W); y (N, C, s_h·H, s_w·W). No parameters.
    Raises ValueError or TypeError for x that is not a batch of images.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Upsample.html

    >>> import torch
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
        return two_steps.upsample(x, _pair(self.scale)), without_entries(x)

    def _bwd(self, params: Any, like: Tensor, grad: Tensor, need: Need) -> Any:
        if not grad.numel():
            return (), grad.new_zeros(like.shape[1:])
        return (), two_steps.sum_blocks(grad, _pair(self.scale))


@dataclass(frozen=True)
class UpsampleConv2d(Kernels):
    """`Upsample2d(scale)`, then `Conv2d(out_channels, kernel_size, padding=padding)`.

    `kernel_size`, `scale` and `padding` are ints or pairs (height, width); `padding` may also be
    "same" (y as large as the upsampled image) or "valid" (none).

    `method="unfold"` does one after the other, by the derivation's matrix products. "auto" is the
    fastest. On the CPU that is a convolution at low resolution, with kh·kw products a source pixel
    whatever the scale, added up in float32 for half precision; or one by the sums of the taps that
    see the same pixel; or, where there are few channels, one step after the other. On other
    devices, where the number of calls counts most, it is a single transposed convolution. Each
    entry of y is as exact as the sum of its own products: off by at most a multiple of
    ε · Σ |weight|·|x|, with ε for the dtype's rounding error. So are the gradients.

    "karatsuba" is "auto" with up to 30 % fewer products on the CPU, where there are many pixels. It
    takes scale 2, 3×3 taps and padding 1 alone. Its errors are a multiple of ε times the largest
    products nearby: a faint entry beside a bright one loses digits, and numbers near the largest of
    their dtype overflow.

    All methods give the same numbers while these are finite. At low resolution no weight is
    multiplied by padding, so one that is NaN or infinite reaches fewer entries of y.

    Shapes: x (N, C, H, W); y (N, O, H′, W′) with O = out_channels, H′ = s_h·H + 2p − kh + 1.
    Parameters: {"weight": (O, C, kh, kw), "bias": (O,)}, as for the convolution; on the CPU,
    `init` lays the weight out tap by tap.

    Raises ValueError or TypeError for hyperparameters, shapes, dtypes and devices that do not fit.
    Upsampling and convolving against checkerboard artefacts: Odena et al., "Deconvolution and
    checkerboard artifacts", Distill, 2016.

    >>> import funcnet as fn
    >>> import torch
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
        conv = Conv2d(
            self.out_channels, kernel_size, padding=padding, bias=self.bias, method="unfold"
        )
        window = Window(kernel_size, sides=padding_sides(padding, kernel_size))
        if self.method == "karatsuba" and not karatsuba.fits(_pair(self.scale), window):
            raise ValueError(
                'UpsampleConv2d: expected scale 2, kernel_size 3 and padding 1 or "same" with '
                f'method="karatsuba", got scale {self.scale}, kernel_size {kernel_size} and '
                f"padding {padding!r}"
            )
        object.__setattr__(self, "_window", window)
        object.__setattr__(self, "_steps", (Upsample2d(self.scale), conv))

    def _params(self, shape: Shape) -> dict[str, Param]:
        weight_shape = (self.out_channels, shape[0], *self._window.kernel_size)
        return self._kernel_params(weight_shape)

    def _layout(self, name: str) -> Layout | None:
        return low_resolution.layout if name == "weight" and self.method != "unfold" else None

    def _out_shape(self, shape: Shape) -> Shape:
        check_entries(self, shape)
        _, *upsampled = self._steps[0]._out_shape(shape)
        return self.out_channels, *count_windows(self, upsampled, ", after upsampling")

    def _tile(self, shape: Shape, part: Part) -> tuple[Part, Layer] | None:
        return self._windowed_tile(shape, part, _pair(self.scale))

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        if self.method == "unfold":
            upsample, conv = self._steps
            return conv._fwd(params, upsample._fwd((), x, None)[0], None)[0], x
        weight, bias = params["weight"], params.get("bias")
        scale, window = _pair(self.scale), self._window
        return upsampling.convolve(x, weight, bias, scale, window, self.method), x

    def _bwd(self, params: Any, x: Tensor, grad: Tensor, need: Need) -> Any:
        if self.method == "unfold":
            upsample, conv = self._steps
            upsampled, kept = upsample._fwd((), x, None)
            dparams, dupsampled = conv._bwd(params, upsampled, grad, need)
            return dparams, upsample._bwd((), kept, dupsampled, need)[1] if need.input else None
        weight, scale, window = params["weight"], _pair(self.scale), self._window
        dweight, dx = upsampling.gradients(x, weight, grad, scale, window, self.method, need)
        return self._kernel_gradients(dweight, grad), dx

    def _bwd_each(self, params: Any, x: Tensor, grad: Tensor, need: Need) -> Any:
        scale = _pair(self.scale)
        dweight = kernel_products.upsampled(x, params["weight"], grad, scale, self._window)
        return self._kernel_gradients_each(dweight, params, x, grad, need)


def _pair(sizes: Any) -> Pair:
    """The pair that `Sizes` has made of a field."""
    pair: Pair = sizes
    return pair
