"""Pooling: the largest entry, or the mean, of each window of each channel.

A window of k taps along an axis, which are d apart, starts at s·i − p for i = 0, 1, …:

    max      y[n, c, i, j] = max over t, r of x[n, c, s·i + d·t − p, s·j + d·r − p]
    average  y[n, c, i, j] = Σ over t, r of x[n, c, s·i + t − p, s·j + r − p] / count,

where taps outside x count as −∞ for the maximum and as 0 for the average. The largest entry gets
all of its window's gradient, the first in row-major order if several are equal; NaN counts as the
largest. In average pooling, all entries of a window share its gradient equally.

There are ⌊(H + 2p − d(k−1) − 1)/s⌋ + 1 windows on an axis of length H; with ceil_mode, ⌈…⌉ + 1 of
them, but the last one only if it starts in x or in the padding before x.

Adaptive pooling cuts an axis of length H into H′ windows, ⌊i·H/H′⌋ up to ⌈(i+1)·H/H′⌉ for i < H′,
which overlap where H′ does not divide H.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from funcnet.checks import name_of
from funcnet.fields import Flag, Margins, Sizes, SizesOrNone, SizesWithNone
from funcnet.keys import Key
from funcnet.layer import Layer, Part, Shape
from funcnet.layers.kernels import check_entries
from funcnet.ops import pooling, tiles
from funcnet.ops.need import Need
from funcnet.ops.window import Ints, Window, padding_sides
from funcnet.ops.without_entries import without_entries


def _tile_of_windows(layer: Any, shape: Shape, part: Part) -> tuple[Part, Layer] | None:
    """`_tile` where every window lies in x."""
    window: Window = layer._window
    if layer.ceil_mode or any(map(any, window.sides)):
        return None
    return tiles.behind(part, shape[1:], window)[0], layer


@dataclass(frozen=True)
class MaxPool(Layer):
    """The largest entry of each window, along every axis after the channels; see `MaxPool2d`."""

    kernel_size: Sizes
    stride: SizesOrNone = None
    padding: Margins = 0
    dilation: Sizes = 1
    ceil_mode: Flag = False
    _window: Window = field(init=False, repr=False, compare=False)

    _fresh = True
    _tile = _tile_of_windows

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_window", _window_of(self, self.dilation))

    def _out_shape(self, shape: Shape) -> Shape:
        count = _count_windows(self, shape)
        if pooling.some_see_nothing(self._window, shape[1:]):
            raise ValueError(
                f"{self}: expected a size of which every window sees an entry, got {shape[1:]}, "
                f"where the taps of some windows are all in the padding"
            )
        return shape[0], *count

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        y, indices = pooling.maximum(x, self._window, self.ceil_mode)
        return y, (indices, without_entries(x))

    def _bwd(self, params: Any, residuals: Any, dy: Tensor, need: Need) -> Any:
        indices, like = residuals
        shape = like.shape[1:]
        return (), pooling.maximum_backward(dy, indices, self._window, self.ceil_mode, shape)


@dataclass(frozen=True)
class MaxPool1d(MaxPool):
    """The largest entry of each window of a signal: `MaxPool2d` with a single axis.

    Shapes: x (N, C, L); y (N, C, L′), L′ by the rule in `funcnet.layers.pooling`.
    No parameters.
    Raises ValueError or TypeError for hyperparameters and shapes that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.MaxPool1d.html

    >>> import torch
    >>> MaxPool1d(2).apply((), torch.tensor([[[1.0, 3.0, 2.0, 0.0]]]))
    tensor([[[3., 2.]]])
    """

    _axes = "CL"

    def _apply(self, params: Any, x: Tensor, key: Key | None) -> Tensor:
        return pooling.maximum_of_signal(x, self._window, self.ceil_mode)


@dataclass(frozen=True)
class MaxPool2d(MaxPool):
    """The largest entry of each window of an image, by the formulas in `funcnet.layers.pooling`.

    `kernel_size`, `stride`, `padding` and `dilation` are ints or pairs (height, width). A
    stride of None is the kernel's size. `padding` is at most half the kernel's size.

    Shapes: x (N, C, H, W); y (N, C, H′, W′), H′ by the rule in `funcnet.layers.pooling`.
    No parameters.
    Raises ValueError or TypeError for hyperparameters and shapes that do not fit, and for shapes
    where a dilated window would see nothing but padding.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.MaxPool2d.html

    >>> import torch
    >>> MaxPool2d(2).apply((), torch.tensor([[[[1.0, 3.0], [2.0, 0.0]]]]))
    tensor([[[[3.]]]])
    >>> MaxPool2d(3, 2, 1).out_shape((8, 32, 32))
    (8, 16, 16)
    """

    _axes = "CHW"


@dataclass(frozen=True)
class MaxPool3d(MaxPool):
    """The largest entry of each window of a volume: `MaxPool2d` with three axes.

    Shapes: x (N, C, D, H, W); y (N, C, D′, H′, W′), D′ by the rule in `funcnet.layers.pooling`.
    No parameters.
    Raises ValueError or TypeError for hyperparameters and shapes that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.MaxPool3d.html

    >>> MaxPool3d((1, 2, 2)).out_shape((8, 5, 16, 16))
    (8, 5, 8, 8)
    """

    _axes = "CDHW"


@dataclass(frozen=True)
class AvgPool(Layer):
    """The mean of each window, along every axis after the channels; see `AvgPool2d`."""

    kernel_size: Sizes
    stride: SizesOrNone = None
    padding: Margins = 0
    ceil_mode: Flag = False
    count_include_pad: Flag = True
    _window: Window = field(init=False, repr=False, compare=False)

    _fresh = True
    _tile = _tile_of_windows

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_window", _window_of(self, ()))

    def _out_shape(self, shape: Shape) -> Shape:
        return shape[0], *_count_windows(self, shape)

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        y = pooling.average(x, self._window, self.ceil_mode, self.count_include_pad)
        return y, without_entries(x)

    def _bwd(self, params: Any, like: Tensor, dy: Tensor, need: Need) -> Any:
        how = self._window, self.ceil_mode, self.count_include_pad
        return (), pooling.average_backward(dy, *how, like.shape[1:])


@dataclass(frozen=True)
class AvgPool1d(AvgPool):
    """The mean of each window of a signal: `AvgPool2d` with a single axis.

    Shapes: x (N, C, L); y (N, C, L′), L′ by the rule in `funcnet.layers.pooling`.
    No parameters.
    Raises ValueError or TypeError for hyperparameters and shapes that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.AvgPool1d.html

    >>> import torch
    >>> AvgPool1d(2).apply((), torch.tensor([[[1.0, 3.0, 2.0, 0.0]]]))
    tensor([[[2., 1.]]])
    """

    _axes = "CL"


@dataclass(frozen=True)
class AvgPool2d(AvgPool):
    """The mean of each window of an image, by the formulas in `funcnet.layers.pooling`.

    `kernel_size`, `stride` and `padding` are ints or pairs (height, width). A stride of None is the
    kernel's size. `padding` is at most half the kernel's size. A mean divides by the number of the
    window's taps in x and its padding, or in x alone if `count_include_pad` is False. With
    `ceil_mode` a window may reach beyond the padding: taps there never count.

    Shapes: x (N, C, H, W); y (N, C, H′, W′), H′ by the rule in `funcnet.layers.pooling`.
    No parameters.
    Raises ValueError or TypeError for hyperparameters and shapes that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.AvgPool2d.html

    >>> import torch
    >>> AvgPool2d(2).apply((), torch.tensor([[[[1.0, 3.0], [2.0, 0.0]]]]))
    tensor([[[[1.5000]]]])
    """

    _axes = "CHW"


@dataclass(frozen=True)
class AvgPool3d(AvgPool):
    """The mean of each window of a volume: `AvgPool2d` with three axes.

    On the CPU, half precision is computed in float32. x without its padding must be at least as
    large as the kernel, as in PyTorch.

    Shapes: x (N, C, D, H, W); y (N, C, D′, H′, W′), D′ by the rule in `funcnet.layers.pooling`.
    No parameters.
    Raises ValueError or TypeError for hyperparameters and shapes that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.AvgPool3d.html

    >>> AvgPool3d(2).out_shape((8, 5, 16, 16))
    (8, 2, 8, 8)
    """

    _axes = "CDHW"

    def _out_shape(self, shape: Shape) -> Shape:
        if any(n < k for n, k in zip(shape[1:], self._window.kernel_size, strict=True)):
            raise ValueError(
                f"{self}: expected volumes at least as large as the kernel without padding, "
                f"{self.kernel_size}, got size {shape[1:]}"
            )
        return super()._out_shape(shape)


@dataclass(frozen=True)
class Adaptive(Layer):
    """Pooling to a given size; an axis whose size is None keeps its own."""

    output_size: SizesWithNone

    _fresh = True

    def _out_shape(self, shape: Shape) -> Shape:
        check_entries(self, shape)
        return shape[0], *self._size(shape[1:])

    def _size(self, size: Any) -> Ints:
        sizes: Any = self.output_size
        return tuple(n if m is None else m for m, n in zip(sizes, size, strict=True))


@dataclass(frozen=True)
class AdaptiveAvgPool(Adaptive):
    """The means of windows that cut every axis after the channels; see `AdaptiveAvgPool2d`."""

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        return pooling.adaptive_average(x, self._size(x.shape[2:])), without_entries(x)

    def _bwd(self, params: Any, like: Tensor, dy: Tensor, need: Need) -> Any:
        return (), pooling.adaptive_average_backward(dy, like.shape[1:])


@dataclass(frozen=True)
class AdaptiveAvgPool1d(AdaptiveAvgPool):
    """The means of `output_size` windows of a signal, by the rule in `funcnet.layers.pooling`.

    Shapes: x (N, C, L); y (N, C, output_size), or (N, C, L) for None. No parameters.
    Raises ValueError or TypeError for an output size and shapes that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveAvgPool1d.html

    >>> import torch
    >>> AdaptiveAvgPool1d(2).apply((), torch.tensor([[[1.0, 3.0, 2.0]]]))
    tensor([[[2.0000, 2.5000]]])
    """

    _axes = "CL"


@dataclass(frozen=True)
class AdaptiveAvgPool2d(AdaptiveAvgPool):
    """The means of H′×W′ windows of an image, by the rule in `funcnet.layers.pooling`.

    `output_size` is an int or None, or a pair of these (height, width); None keeps the axis.

    Shapes: x (N, C, H, W); y (N, C, H′, W′). No parameters.
    Raises ValueError or TypeError for an output size and shapes that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveAvgPool2d.html

    >>> import torch
    >>> AdaptiveAvgPool2d(1).apply((), torch.tensor([[[[1.0, 3.0], [2.0, 0.0]]]]))
    tensor([[[[1.5000]]]])
    >>> AdaptiveAvgPool2d((None, 2)).out_shape((8, 5, 7))
    (8, 5, 2)
    """

    _axes = "CHW"


@dataclass(frozen=True)
class AdaptiveAvgPool3d(AdaptiveAvgPool):
    """The means of D′×H′×W′ windows of a volume: `AdaptiveAvgPool2d` with three axes.

    Shapes: x (N, C, D, H, W); y (N, C, D′, H′, W′). No parameters.
    Raises ValueError or TypeError for an output size and shapes that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveAvgPool3d.html

    >>> AdaptiveAvgPool3d(2).out_shape((8, 5, 7, 9))
    (8, 2, 2, 2)
    """

    _axes = "CDHW"


@dataclass(frozen=True)
class AdaptiveMaxPool(Adaptive):
    """The largest entries of windows that cut every axis; see `AdaptiveMaxPool2d`."""

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        y, indices = pooling.adaptive_maximum(x, self._size(x.shape[2:]))
        return y, (indices, without_entries(x))

    def _bwd(self, params: Any, residuals: Any, dy: Tensor, need: Need) -> Any:
        indices, like = residuals
        return (), pooling.adaptive_maximum_backward(dy, indices, like.shape[1:])


@dataclass(frozen=True)
class AdaptiveMaxPool1d(AdaptiveMaxPool):
    """The largest entries of a signal's windows, by the rule in `funcnet.layers.pooling`.

    Shapes: x (N, C, L); y (N, C, output_size), or (N, C, L) for None. No parameters.
    Raises ValueError or TypeError for an output size and shapes that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveMaxPool1d.html

    >>> import torch
    >>> AdaptiveMaxPool1d(2).apply((), torch.tensor([[[1.0, 3.0, 2.0]]]))
    tensor([[[3., 3.]]])
    """

    _axes = "CL"


@dataclass(frozen=True)
class AdaptiveMaxPool2d(AdaptiveMaxPool):
    """The largest entries of H′×W′ windows of an image, by the rule in `funcnet.layers.pooling`.

    `output_size` is an int or None, or a pair of these (height, width); None keeps the axis.

    Shapes: x (N, C, H, W); y (N, C, H′, W′). No parameters.
    Raises ValueError or TypeError for an output size and shapes that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveMaxPool2d.html

    >>> import torch
    >>> AdaptiveMaxPool2d(1).apply((), torch.tensor([[[[1.0, 3.0], [2.0, 0.0]]]]))
    tensor([[[[3.]]]])
    """

    _axes = "CHW"


@dataclass(frozen=True)
class AdaptiveMaxPool3d(AdaptiveMaxPool):
    """The largest entries of D′×H′×W′ windows of a volume: `AdaptiveMaxPool2d` with three axes.

    Shapes: x (N, C, D, H, W); y (N, C, D′, H′, W′). No parameters.
    Raises ValueError or TypeError for an output size and shapes that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveMaxPool3d.html

    >>> AdaptiveMaxPool3d((None, 1, 1)).out_shape((8, 5, 7, 9))
    (8, 5, 1, 1)
    """

    _axes = "CDHW"


def _window_of(layer: Any, dilation: Any) -> Window:
    """The window of a layer. Raises ValueError for padding of more than half the kernel."""
    kernel_size, padding = layer.kernel_size, layer.padding
    if any(2 * p > k for p, k in zip(padding, kernel_size, strict=True)):
        raise ValueError(
            f"{type(layer).__name__}: expected padding of at most half of "
            f"kernel_size={kernel_size}, got {padding}"
        )
    stride = layer.stride or kernel_size
    return Window(kernel_size, stride, padding_sides(padding, kernel_size), dilation)


def _count_windows(layer: Any, shape: Shape) -> Ints:
    """The number of windows on each axis. Raises ValueError where there are none."""
    check_entries(layer, shape)
    size, window = shape[1:], layer._window
    count = pooling.count(window, size, layer.ceil_mode)
    if min(count) < 1:
        raise ValueError(
            f"{name_of(layer)}: expected a size of at least the kernel's reach {window.reach}, "
            f"got size {size}, {window.padded(size)} with padding"
        )
    return count
