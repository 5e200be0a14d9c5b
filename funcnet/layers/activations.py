"""Activations: functions of each entry, y = σ(x), dx = σ'(x) ∘ dy, and softmax along one axis.

They take tensors of any rank, and y has x's shape. Each one is a value and a slope, and says which
of x and y the slope is computed from. Slopes are those of PyTorch's own backward kernels, also at
kinks and where they saturate. All raise TypeError for an x that is not floating-point.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from funcnet.checks import as_axis, name_of
from funcnet.compat import (
    log_softmax_backward,
    plain_prelu,
    plain_prelu_backward,
    prelu,
    prelu_backward,
    softmax_backward,
)
from funcnet.fields import Axis, Finite, NonZero, OneOf, Size
from funcnet.initializers import Constant, InitializerOrNone
from funcnet.keys import Key
from funcnet.layer import Layer, Shape, same_part
from funcnet.ops.accumulation import widened
from funcnet.ops.inplace import TENSORS, in_layout_of, is_eager, is_untracked
from funcnet.ops.need import Need
from funcnet.ops.products import over_positions
from funcnet.param import Param

_elu_backward: Callable[..., Tensor] = torch.ops.aten.elu_backward
_gelu_backward: Callable[..., Tensor] = torch.ops.aten.gelu_backward
_hardsigmoid_backward: Callable[..., Tensor] = torch.ops.aten.hardsigmoid_backward
_hardswish_backward: Callable[..., Tensor] = torch.ops.aten.hardswish_backward
_hardtanh_backward: Callable[..., Tensor] = torch.ops.aten.hardtanh_backward
_leaky_relu_backward: Callable[..., Tensor] = torch.ops.aten.leaky_relu_backward
_mish_backward: Callable[..., Tensor] = torch.ops.aten.mish_backward
_sigmoid_backward: Callable[..., Tensor] = torch.ops.aten.sigmoid_backward
_silu_backward: Callable[..., Tensor] = torch.ops.aten.silu_backward
_softplus_backward: Callable[..., Tensor] = torch.ops.aten.softplus_backward
_tanh_backward: Callable[..., Tensor] = torch.ops.aten.tanh_backward
_threshold_backward: Callable[..., Tensor] = torch.ops.aten.threshold_backward

_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946


@dataclass(frozen=True)
class Activation(Layer):
    """y = σ(x). It keeps x for the slope."""

    _fresh = True
    _tile = same_part

    _keeps_y: ClassVar[bool] = False
    """Whether the slope is computed from y, which the next layer keeps anyway."""

    def _value(self, x: Tensor, /) -> Tensor:
        """σ(x)."""
        raise NotImplementedError

    def _slope(self, kept: Tensor, dy: Tensor, /) -> Tensor:
        """σ'(x) ∘ dy, computed from what is kept of x and y."""
        raise NotImplementedError

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        y = self._value(x)
        return y, y if self._keeps_y else x

    def _bwd(self, params: Any, kept: Tensor, dy: Tensor, need: Need) -> Any:
        return (), self._slope(kept, dy)


@dataclass(frozen=True)
class InPlace(Activation):
    """An activation that keeps y, so that y can be written over x, and dx over dy."""

    _fresh = False
    _keeps_y = True

    def _value_(self, x: Tensor, /) -> Tensor:
        """`_value`, written over x."""
        raise NotImplementedError

    def _slope_(self, y: Tensor, dy: Tensor, /) -> Tensor:
        """`_slope`, written over dy where that saves memory."""
        return self._slope(y, dy)

    def _fwd_(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        if not self._keeps_y:
            return self._fwd(params, x, key)
        y = self._value_(x)
        return y, y

    def _bwd_(self, params: Any, y: Tensor, dy: Tensor, need: Need) -> Any:
        return (), self._slope_(y, dy)


def _over(dy: Tensor, backward: Any, *others: Any) -> Tensor:
    """backward(dy, *others), written over dy unless autograd refuses it."""
    try:
        dx: Tensor = backward.grad_input(dy, *others, grad_input=dy)
    except RuntimeError:
        dx = backward(dy, *others)
    return dx


def _laid_out(dy: Tensor, x: Tensor) -> Tensor:
    """dy, in x's memory layout where a graph is made.

    Where the two differ, some kernels return dx in dy's layout, but a graph expects x's.
    """
    if type(x) in TENSORS and not torch.compiler.is_compiling():
        return dy
    return in_layout_of(x, dy)


# --- Slope from y


@dataclass(frozen=True)
class ReLU(InPlace):
    """The rectifier: y = max(x, 0), dx = dy where y > 0, else 0 (so the derivative at 0 is 0).

    Shapes: any; y has x's shape. NaN stays NaN.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.ReLU.html

    >>> ReLU().apply((), torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0., 0., 2.])
    """

    def _value(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def _value_(self, x: Tensor) -> Tensor:
        return torch.relu_(x)

    def _slope(self, y: Tensor, dy: Tensor) -> Tensor:
        return _threshold_backward(dy, y, 0)

    def _slope_(self, y: Tensor, dy: Tensor) -> Tensor:
        return _over(dy, _threshold_backward, y, 0)


@dataclass(frozen=True)
class Sigmoid(InPlace):
    """The logistic function: y = 1 / (1 + e⁻ˣ), dx = y(1 − y) dy.

    Shapes: any; y has x's shape. Value and gradient are finite for every x that is not NaN, ±∞ too.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Sigmoid.html

    >>> Sigmoid().apply((), torch.tensor([-torch.inf, 0.0, torch.inf]))
    tensor([0.0000, 0.5000, 1.0000])
    """

    def _value(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def _value_(self, x: Tensor) -> Tensor:
        return torch.sigmoid_(x)

    def _slope(self, y: Tensor, dy: Tensor) -> Tensor:
        return _sigmoid_backward(dy, y)


@dataclass(frozen=True)
class Tanh(InPlace):
    """The hyperbolic tangent: y = tanh(x), dx = (1 − y²) dy.

    Shapes: any; y has x's shape.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Tanh.html

    >>> Tanh().apply((), torch.tensor([-torch.inf, 0.0, 0.5]))
    tensor([-1.0000,  0.0000,  0.4621])
    """

    def _value(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def _value_(self, x: Tensor) -> Tensor:
        return torch.tanh_(x)

    def _slope(self, y: Tensor, dy: Tensor) -> Tensor:
        return _tanh_backward(dy, y)


@dataclass(frozen=True)
class LeakyReLU(InPlace):
    """y = x where x > 0, else a·x with a = `negative_slope`; dx = dy where x > 0, else a·dy.

    y is kept for the gradient if a ≥ 0, since it has x's sign; otherwise x is.

    Shapes: any; y has x's shape.
    Raises ValueError or TypeError unless a is a finite number.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.LeakyReLU.html

    >>> LeakyReLU(0.5).apply((), torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.5000,  0.0000,  2.0000])
    """

    negative_slope: Finite = 0.01

    @property
    def _keeps_y(self) -> bool:  # type: ignore[override]
        return self.negative_slope >= 0

    def _value(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.negative_slope)

    def _value_(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.negative_slope, inplace=True)

    def _slope(self, kept: Tensor, dy: Tensor) -> Tensor:
        return _leaky_relu_backward(dy, kept, self.negative_slope, False)

    def _slope_(self, kept: Tensor, dy: Tensor) -> Tensor:
        return _over(dy, _leaky_relu_backward, kept, self.negative_slope, False)


@dataclass(frozen=True)
class Hardtanh(InPlace):
    """y = min(max(x, a), b) with a = `min_val` and b = `max_val`; dx = dy where a < x < b, else 0.

    y is kept for the gradient if 16 bits hold a and b exactly. Otherwise x is, because a rounded
    bound may lie between a and b.

    Shapes: any; y has x's shape.
    Raises ValueError or TypeError unless both are finite numbers and a < b.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Hardtanh.html

    >>> Hardtanh().apply((), torch.tensor([-3.0, 0.5, 2.0]))
    tensor([-1.0000,  0.5000,  1.0000])
    """

    min_val: Finite = -1.0
    max_val: Finite = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.min_val < self.max_val:
            raise ValueError(
                f"Hardtanh: expected min_val < max_val, got {self.min_val} and {self.max_val}"
            )

    @property
    def _keeps_y(self) -> bool:  # type: ignore[override]
        return _fits_16_bits(self.min_val) and _fits_16_bits(self.max_val)

    def _value(self, x: Tensor) -> Tensor:
        return F.hardtanh(x, self.min_val, self.max_val)

    def _value_(self, x: Tensor) -> Tensor:
        return F.hardtanh(x, self.min_val, self.max_val, inplace=True)

    def _slope(self, kept: Tensor, dy: Tensor) -> Tensor:
        return _hardtanh_backward(_laid_out(dy, kept), kept, self.min_val, self.max_val)

    def _slope_(self, kept: Tensor, dy: Tensor) -> Tensor:
        return _over(dy, _hardtanh_backward, kept, self.min_val, self.max_val)


def _fits_16_bits(number: float) -> bool:
    """Whether float16 and bfloat16 hold a number exactly: in 8 bits, and as a normal number."""
    fraction, exponent = math.frexp(number)
    return 256 * fraction % 1 == 0 and -13 <= exponent <= 16


@dataclass(frozen=True)
class ReLU6(InPlace):
    """y = min(max(x, 0), 6), dx = dy where 0 < x < 6, else 0.

    Shapes: any; y has x's shape.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.ReLU6.html

    >>> ReLU6().apply((), torch.tensor([-1.0, 2.0, 7.0]))
    tensor([0., 2., 6.])
    """

    def _value(self, x: Tensor) -> Tensor:
        return F.relu6(x)

    def _value_(self, x: Tensor) -> Tensor:
        return F.relu6(x, inplace=True)

    def _slope(self, y: Tensor, dy: Tensor) -> Tensor:
        return _hardtanh_backward(_laid_out(dy, y), y, 0.0, 6.0)

    def _slope_(self, y: Tensor, dy: Tensor) -> Tensor:
        return _over(dy, _hardtanh_backward, y, 0.0, 6.0)


@dataclass(frozen=True)
class AlongAxis(Activation):
    """An activation along an axis of x other than the batch. It keeps y."""

    dim: Axis

    _tile = Layer._tile

    _keeps_y = True
    _fresh = False

    def _out_shape(self, shape: Shape) -> Shape:
        as_axis(self, "dim", self.dim, shape)
        return shape


@dataclass(frozen=True)
class Softmax(AlongAxis):
    """y = eˣ / Σ eˣ with the sum along `dim`; dx = y ∘ (dy − Σ y ∘ dy).

    `dim` counts the batch: 1 is the axis after it. 0 would mix the batch.

    Shapes: any with that axis; y has x's shape.
    Raises ValueError for a `dim` that is the batch or that x does not have.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Softmax.html

    >>> Softmax(-1).apply((), torch.tensor([[0.0, 0.0], [0.0, 1e4]]))
    tensor([[0.5000, 0.5000],
            [0.0000, 1.0000]])
    """

    def _value(self, x: Tensor) -> Tensor:
        return torch.softmax(x, self.dim)

    def _slope(self, y: Tensor, dy: Tensor) -> Tensor:
        return softmax_backward(dy, y, self.dim, y.dtype)


@dataclass(frozen=True)
class LogSoftmax(AlongAxis):
    """y = x − log Σ eˣ with the sum along `dim`; dx = dy − eʸ ∘ Σ dy.

    `dim` counts the batch: 1 is the axis after it. 0 would mix the batch.

    Shapes: any with that axis; y has x's shape.
    Raises ValueError for a `dim` that is the batch or that x does not have.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.LogSoftmax.html

    >>> LogSoftmax(-1).apply((), torch.tensor([[0.0, 0.0], [0.0, 1e4]]))
    tensor([[-6.9315e-01, -6.9315e-01],
            [-1.0000e+04,  0.0000e+00]])
    """

    def _value(self, x: Tensor) -> Tensor:
        return torch.log_softmax(x, self.dim)

    def _slope(self, y: Tensor, dy: Tensor) -> Tensor:
        return log_softmax_backward(dy, y, self.dim, y.dtype)


# --- Slope from x


@dataclass(frozen=True)
class GELU(Activation):
    """y = x·Φ(x), dx = (Φ(x) + x·φ(x)) dy, with Φ and φ = Φ' of the standard normal distribution.

    `approximate="tanh"` takes Φ(x) ≈ (1 + tanh(√(2/π)·(x + 0.044715 x³))) / 2 and its derivative.

    Shapes: any; y has x's shape.
    Raises ValueError unless `approximate` is "none" or "tanh".
    Hendrycks and Gimpel, "Gaussian error linear units", 2016.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.GELU.html

    >>> GELU().apply((), torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.1587,  0.0000,  1.9545])
    """

    approximate: Annotated[Literal["none", "tanh"], OneOf(("none", "tanh"))] = "none"

    def _value(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate=self.approximate)

    def _slope(self, x: Tensor, dy: Tensor) -> Tensor:
        return _gelu_backward(dy, x, approximate=self.approximate)


@dataclass(frozen=True)
class SiLU(Activation):
    """y = x·σ(x), dx = σ(x)·(1 + x·(1 − σ(x))) dy, with the logistic function σ; also called swish.

    Shapes: any; y has x's shape.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.SiLU.html

    >>> SiLU().apply((), torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.2689,  0.0000,  1.7616])
    """

    def _value(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def _slope(self, x: Tensor, dy: Tensor) -> Tensor:
        if is_untracked(x, dy):
            return _silu_backward(dy, x)
        s = torch.sigmoid(x)  # autograd cannot differentiate the kernel
        return s * (1 + x * (1 - s)) * dy


@dataclass(frozen=True)
class Mish(Activation):
    """y = x·t with t = tanh(log(1 + eˣ)); dx = (t + x·(1 − t²)·σ(x)) dy, σ the logistic function.

    Shapes: any; y has x's shape.
    Misra, "Mish: a self regularized non-monotonic activation function", 2019.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Mish.html

    >>> Mish().apply((), torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.3034,  0.0000,  1.9440])
    """

    def _value(self, x: Tensor) -> Tensor:
        return F.mish(x)

    def _slope(self, x: Tensor, dy: Tensor) -> Tensor:
        if is_untracked(x, dy):
            return _mish_backward(dy, x)
        t = torch.tanh(F.softplus(x))  # neither autograd nor torch.func.vmap takes the kernel
        return (t + x * (1 - t * t) * torch.sigmoid(x)) * dy


@dataclass(frozen=True)
class Softplus(Activation):
    """y = log(1 + e^βx) / β, dx = σ(βx) dy, with σ the logistic function.

    Where βx > `threshold`, y = x and dx = dy.

    Shapes: any; y has x's shape.
    Raises ValueError or TypeError unless β and `threshold` are finite numbers and β is not 0.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Softplus.html

    >>> Softplus().apply((), torch.tensor([-1.0, 0.0, 30.0]))
    tensor([ 0.3133,  0.6931, 30.0000])
    """

    beta: NonZero = 1.0
    threshold: Finite = 20.0

    def _value(self, x: Tensor) -> Tensor:
        return F.softplus(x, self.beta, self.threshold)

    def _slope(self, x: Tensor, dy: Tensor) -> Tensor:
        return _softplus_backward(_laid_out(dy, x), x, self.beta, self.threshold)


@dataclass(frozen=True)
class ELU(Activation):
    """y = x where x > 0, else α(eˣ − 1); dx = dy where x > 0, else α·eˣ dy.

    Shapes: any; y has x's shape.
    Raises ValueError or TypeError unless α is a finite number.
    Clevert et al., "Fast and accurate deep network learning by exponential linear units", 2015.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.ELU.html

    >>> ELU().apply((), torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.6321,  0.0000,  2.0000])
    """

    alpha: Finite = 1.0

    def _value(self, x: Tensor) -> Tensor:
        return F.elu(x, self.alpha)

    def _slope(self, x: Tensor, dy: Tensor) -> Tensor:
        # From y it would be (y + α) dy, which loses the digits of eˣ for large −x.
        return _elu_backward(_laid_out(dy, x), self.alpha, 1.0, 1.0, False, x)


@dataclass(frozen=True)
class SELU(Activation):
    """y = s·x where x > 0, else s·α(eˣ − 1); dx = s·dy where x > 0, else s·α·eˣ dy.

    α = 1.6733 and s = 1.0507 keep mean 0 and variance 1 from layer to layer.

    Shapes: any; y has x's shape.
    Klambauer et al., "Self-normalizing neural networks", 2017.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.SELU.html

    >>> SELU().apply((), torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-1.1113,  0.0000,  2.1014])
    """

    def _value(self, x: Tensor) -> Tensor:
        return F.selu(x)

    def _slope(self, x: Tensor, dy: Tensor) -> Tensor:
        return _elu_backward(_laid_out(dy, x), _SELU_ALPHA, _SELU_SCALE, 1.0, False, x)


@dataclass(frozen=True)
class Hardswish(Activation):
    """y = x·min(max(x + 3, 0), 6) / 6; dx = 0 for x ≤ −3, dy for x ≥ 3, else (x/3 + 1/2) dy.

    Shapes: any; y has x's shape.
    Howard et al., "Searching for MobileNetV3", 2019.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Hardswish.html

    >>> Hardswish().apply((), torch.tensor([-2.0, 1.0, 4.0]))
    tensor([-0.3333,  0.6667,  4.0000])
    """

    def _value(self, x: Tensor) -> Tensor:
        return F.hardswish(x)

    def _slope(self, x: Tensor, dy: Tensor) -> Tensor:
        return _hardswish_backward(_laid_out(dy, x), x)


@dataclass(frozen=True)
class Hardsigmoid(Activation):
    """y = min(max(x + 3, 0), 6) / 6; dx = dy / 6 where −3 < x < 3, else 0.

    Shapes: any; y has x's shape.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Hardsigmoid.html

    >>> Hardsigmoid().apply((), torch.tensor([-4.0, 0.0, 4.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """

    def _value(self, x: Tensor) -> Tensor:
        if is_untracked(x):
            return F.hardsigmoid(x)
        # Autograd cannot differentiate the kernel's gradient.
        y = ((widened(x) + 3) / 6).to(x.dtype)
        return torch.where(x.abs() < 3, y, F.hardsigmoid(x.detach()))

    def _slope(self, x: Tensor, dy: Tensor) -> Tensor:
        # From x, not y: near the kinks, y is rounded to 0 or 1.
        # In float64, the kernel multiplies by 1/6 in float32.
        if is_untracked(x, dy) and x.dtype != torch.float64:
            return _hardsigmoid_backward(_laid_out(dy, x), x)
        return torch.where(x.abs() < 3, dy / 6, 0.0)  # autograd cannot differentiate the kernel


@dataclass(frozen=True)
class LogSigmoid(Activation):
    """y = log(1 / (1 + e⁻ˣ)), dx = dy / (1 + eˣ).

    Shapes: any; y has x's shape.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.LogSigmoid.html

    >>> LogSigmoid().apply((), torch.tensor([-30.0, 0.0, 2.0]))
    tensor([-30.0000,  -0.6931,  -0.1269])
    """

    def _value(self, x: Tensor) -> Tensor:
        # softplus with β = −1: F.logsigmoid would make another tensor, for its gradient.
        return F.softplus(x, -1.0, 40.0)

    def _slope(self, x: Tensor, dy: Tensor) -> Tensor:
        return _softplus_backward(_laid_out(dy, x), x, -1.0, 40.0)


@dataclass(frozen=True)
class Softsign(Activation):
    """y = x / (1 + |x|), dx = dy / (1 + |x|)².

    Shapes: any; y has x's shape.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Softsign.html

    >>> Softsign().apply((), torch.tensor([-1.0, 0.0, 3.0]))
    tensor([-0.5000,  0.0000,  0.7500])
    """

    def _value(self, x: Tensor) -> Tensor:
        return F.softsign(x)

    def _slope(self, x: Tensor, dy: Tensor) -> Tensor:
        size = 1 + x.abs()
        return dy / size / size  # size² may overflow


# --- With parameters


@dataclass(frozen=True)
class PReLU(Layer):
    """y = x where x > 0, else w·x; dx = dy where x > 0, else w·dy; dw = Σ x ∘ dy where x ≤ 0.

    There is one w for each channel, the axis after the batch, or a single one.

    Shapes: any with `num_parameters` channels, or any if num_parameters is 1; y has x's shape.
    Parameters: {"weight": (num_parameters,)}, 0.25 unless `weight_init` draws them.
    Raises ValueError for another number of channels.
    He et al., "Delving deep into rectifiers", 2015.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.PReLU.html

    >>> import funcnet as fn
    >>> layer = PReLU(2)
    >>> params = layer.init(fn.key(0), (2,))
    >>> layer.apply(params, torch.tensor([[-1.0, 2.0]]))
    tensor([[-0.2500,  2.0000]])
    """

    num_parameters: Size = 1
    weight_init: InitializerOrNone = None

    _fresh = True
    _tile = same_part

    def _params(self, shape: Shape) -> dict[str, Param]:
        return {"weight": Param((self.num_parameters,), self.weight_init or Constant(0.25))}

    def _out_shape(self, shape: Shape) -> Shape:
        # By ==: torch.compile takes `in` for identity, where sizes are dynamic.
        if not any(self.num_parameters == channels for channels in (1, *shape[:1])):
            channels = shape[0] if shape else "none"
            raise ValueError(
                f"{name_of(self)}: expected {self.num_parameters} channels, got {channels}"
            )
        return shape

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        weight = _along_channels(params["weight"], x)
        # Under torch.func.vmap over weights alone, the kernel warns of a tensor that it resizes.
        return (prelu if is_eager() else plain_prelu)(x, weight), x

    def _bwd(self, params: Any, x: Tensor, dy: Tensor, need: Need) -> Any:
        weight = _along_channels(params["weight"], x)
        dx, terms = _prelu_gradients(dy, x, weight)
        dweight = terms.sum_to_size(weight.shape).flatten().to(x.dtype) if need.params else None
        return {"weight": dweight}, dx if need.input else None

    def _bwd_each(self, params: Any, x: Tensor, dy: Tensor, need: Need) -> Any:
        dx, terms = _prelu_gradients(dy, x, _along_channels(params["weight"], x))
        channels = terms if self.num_parameters > 1 else terms.unsqueeze(1)
        return {"weight": over_positions(channels)}, dx if need.input else None


def _prelu_gradients(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, the terms of dweight), both in one pass; the terms in float32 for half precision."""
    # Under torch.func.vmap over weights and over x, the kernel confuses their axes.
    kernel = prelu_backward if is_eager() else plain_prelu_backward
    # Terms that 16 bits cannot hold may cancel.
    dx, terms = kernel(widened(dy), widened(x), widened(weight))
    return dx.to(x.dtype), terms


def _along_channels(weight: Tensor, x: Tensor) -> Tensor:
    """A weight for each channel, or one, in a shape that broadcasts to x's."""
    return weight.view([1, -1, *[1] * (x.ndim - 2)] if x.ndim > 1 else [1] * x.ndim)
