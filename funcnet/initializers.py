"""Initialisers: how a parameter is drawn from a key.

An initialiser is a value, and a function (key, shape, dtype=None, device=None) -> tensor. Numbers
are drawn on the CPU, so that a key means the same numbers on every device. Layers refuse a plain
function, which files cannot hold and == cannot compare. One of your own is a subclass of
`Initializer`. All raise TypeError for another dtype than float16, bfloat16, float32 and float64,
and for what is not a key or a shape.

    >>> import funcnet as fn
    >>> layer = fn.Conv2d(8, 3, weight_init=fn.initializers.Orthogonal(gain=2.0))
    >>> layer
    Conv2d(8, kernel_size=3, weight_init=initializers.Orthogonal(gain=2.0))
    >>> layer.init(fn.key(0), (3, 5, 5))["weight"].shape
    torch.Size([8, 3, 3, 3])

Fan in and fan out of a weight (O, I, …) are I and O, times the number of entries of the other axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from funcnet.checks import as_shape, sizes
from funcnet.fields import Finite, Hyperparameters, InstanceOf, NonNegative, OneOf, source
from funcnet.keys import Key, check_draw, normal, uniform

Device: TypeAlias = "torch.device | str | None"
"""A device or its name; None for the CPU."""

__all__ = [
    "Constant",
    "Initializer",
    "KaimingNormal",
    "KaimingUniform",
    "LecunNormal",
    "Normal",
    "Ones",
    "Orthogonal",
    "TruncatedNormal",
    "Uniform",
    "XavierNormal",
    "XavierUniform",
    "Zeros",
]


@dataclass(frozen=True)
class Initializer(Hyperparameters):
    """A function (key, shape, dtype=None, device=None) -> tensor that is a value.

    A subclass writes `_draw`, and the letters of the axes that it needs in `_first_axes`.

    >>> import funcnet as fn
    >>> @dataclass(frozen=True)
    ... class Eye(Initializer):
    ...     _first_axes = "OI"
    ...
    ...     def _draw(self, key, shape, dtype, device):
    ...         return torch.eye(*shape, dtype=dtype, device=device)
    >>> fn.Linear(2, bias=False, weight_init=Eye()).init(fn.key(0), (3,))
    {'weight': tensor([[1., 0., 0.],
            [0., 1., 0.]])}
    """

    _first_axes: ClassVar[str] = ""

    def __repr__(self) -> str:
        """The code that builds it; funcnet's own start with `initializers.`."""
        prefix = "initializers." if type(self).__module__ == __name__ else ""
        return prefix + source(self)

    def __call__(
        self,
        key: Key,
        shape: Sequence[int],
        dtype: torch.dtype | None = None,
        device: Device = None,
    ) -> Tensor:
        """A tensor of `shape`, drawn from the key; float32 on the CPU unless told otherwise."""
        check_draw(self, key, dtype, device)
        shape, dtype = as_shape(self, shape), dtype or torch.float32
        device = "cpu" if device is None else device  # 0 is a device, too
        if len(shape) < len(self._first_axes):
            raise ValueError(
                f"{self}: expected a shape of at least {len(self._first_axes)} axes, "
                f"{sizes((*self._first_axes, '…'))}, got {shape}"
            )
        if torch.device(device).type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return self._draw(key, shape, dtype, device)

    def _draw(self, key: Key, shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Initializer):
    """One number everywhere.

    Raises ValueError or TypeError unless `value` is a finite number, in the range of the dtype.

    >>> import funcnet as fn
    >>> Constant(0.25)(fn.key(0), (2,))
    tensor([0.2500, 0.2500])
    """

    value: Finite

    def _draw(self, key: Key, shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> Tensor:
        if not abs(self.value) <= torch.finfo(dtype).max:
            raise ValueError(f"{self}: expected a value within {dtype}")
        return torch.full(shape, self.value, dtype=dtype, device=device)


@dataclass(frozen=True)
class Zeros(Constant):
    """0 everywhere.

    >>> import funcnet as fn
    >>> Zeros()(fn.key(0), (2,))
    tensor([0., 0.])
    """

    value: Finite = field(default=0.0, init=False)


@dataclass(frozen=True)
class Ones(Constant):
    """1 everywhere.

    >>> import funcnet as fn
    >>> Ones()(fn.key(0), (2,))
    tensor([1., 1.])
    """

    value: Finite = field(default=1.0, init=False)


@dataclass(frozen=True)
class Uniform(Initializer):
    """Numbers drawn uniformly from [low, high).

    Raises ValueError unless both are finite and low ≤ high, and for a range beyond the dtype.

    >>> import funcnet as fn
    >>> bool((Uniform(-1.0, 1.0)(fn.key(0), (1000,)).abs() <= 1).all())
    True
    """

    low: Finite = 0.0
    high: Finite = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low <= self.high:
            raise ValueError(f"Uniform: expected low <= high, got {self.low} and {self.high}")

    def _draw(self, key: Key, shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> Tensor:
        return uniform(key, shape, self.low, self.high, dtype, device)


@dataclass(frozen=True)
class Normal(Initializer):
    """Numbers from the normal distribution N(mean, std²).

    Raises ValueError or TypeError unless both are finite numbers and std ≥ 0, and for numbers
    beyond the dtype.

    >>> import funcnet as fn
    >>> Normal(std=0.02)(fn.key(0), (2, 3)).shape
    torch.Size([2, 3])
    """

    mean: Finite = 0.0
    std: NonNegative = 1.0

    def _draw(self, key: Key, shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> Tensor:
        return normal(key, shape, self.mean, self.std, dtype, device)


# --- Truncated


def _check_range(who: Initializer, most: float, dtype: torch.dtype) -> None:
    """Raise ValueError if numbers of this size would be infinite in the dtype."""
    if not most <= torch.finfo(dtype).max:
        raise ValueError(f"{who}: expected numbers up to {most} to be within {dtype}")


@dataclass(frozen=True)
class TruncatedNormal(Initializer):
    """Numbers from N(0, std²), cut off at ±2·std.

    `std` is the standard deviation before cutting, as in `torch.nn.init.trunc_normal_`; it is
    0.8796·std after.

    Raises ValueError or TypeError unless `std` is a finite number ≥ 0, and 2·std within the range
    of the dtype.

    >>> import funcnet as fn
    >>> bool((TruncatedNormal(0.5)(fn.key(0), (1000,)).abs() <= 1).all())
    True
    """

    std: NonNegative = 1.0

    def _draw(self, key: Key, shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> Tensor:
        _check_range(self, 2 * self.std, dtype)
        return _cut_normal(key, shape, self.std, dtype, device)


_STD_OF_CUT = 0.87962566103423978
"""The standard deviation of N(0, 1) cut off at ±2."""


def _cut_normal(
    key: Key, shape: tuple[int, ...], std: float, dtype: torch.dtype, device: Device
) -> Tensor:
    """N(0, std²) within ±2·std: the inverse of its distribution function at uniform numbers."""
    below = 0.5 * math.erfc(math.sqrt(2))
    level = uniform(key, shape, below, 1 - below, torch.float64)
    x: Tensor = (torch.special.ndtri(level) * std).to(dtype)
    most = torch.tensor(2 * std, dtype=dtype, device="cpu")
    # Not by `if`, which torch.compile cannot decide for an std without a value.
    most = torch.where(most.double() > 2 * std, torch.nextafter(most, torch.zeros_like(most)), most)
    return x.clamp(-most, most).to(device=device)


# --- Scaled to the fan


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(fan in, fan out) of a weight (O, I, …)."""
    field = math.prod(shape[2:])
    return shape[1] * field, shape[0] * field


_GAINS = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "sigmoid"), 1.0),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), 1.0),
    "tanh": 5 / 3,
    "relu": math.sqrt(2),
    "selu": 3 / 4,
}

Mode: TypeAlias = Annotated[Literal["fan_in", "fan_out"], OneOf(("fan_in", "fan_out"))]
Nonlinearity: TypeAlias = Annotated[str, OneOf(("leaky_relu", *_GAINS))]


def _scaled_uniform(
    self: Any, key: Key, shape: Sequence[int], dtype: torch.dtype, device: Device
) -> Tensor:
    """`_draw` of U(−√3·σ, √3·σ), whose standard deviation is σ."""
    bound = math.sqrt(3) * self._std(shape)
    return uniform(key, shape, -bound, bound, dtype, device)


def _scaled_normal(
    self: Any, key: Key, shape: Sequence[int], dtype: torch.dtype, device: Device
) -> Tensor:
    """`_draw` of N(0, σ²)."""
    return normal(key, shape, 0.0, self._std(shape), dtype, device)


@dataclass(frozen=True)
class _Kaiming(Initializer):
    _first_axes = "OI"

    a: Finite = 0.0
    mode: Mode = "fan_in"
    nonlinearity: Nonlinearity = "leaky_relu"

    def _std(self, shape: Sequence[int]) -> float:
        fan = fans(shape)[self.mode == "fan_out"]
        gain = _GAINS.get(self.nonlinearity) or math.sqrt(2 / (1 + self.a * self.a))
        return gain / math.sqrt(max(fan, 1))


@dataclass(frozen=True)
class KaimingUniform(_Kaiming):
    """Numbers from U(−√3·σ, √3·σ), σ = gain / √fan, so that ReLU networks keep their scale.

    The gain follows from the nonlinearity, as `torch.nn.init.calculate_gain` gives it; `a` is the
    slope of "leaky_relu" below 0.

    Raises ValueError for a shape of fewer than two axes.
    He et al., "Delving deep into rectifiers", 2015.
    https://docs.pytorch.org/docs/stable/nn.init.html

    >>> import funcnet as fn
    >>> bool((KaimingUniform()(fn.key(0), (100, 6)).abs() <= 1).all())
    True
    """

    _draw = _scaled_uniform


@dataclass(frozen=True)
class KaimingNormal(_Kaiming):
    """Numbers from N(0, σ²), σ = gain / √fan, so that ReLU networks keep their scale.

    Raises ValueError for a shape of fewer than two axes.
    He et al., "Delving deep into rectifiers", 2015.
    https://docs.pytorch.org/docs/stable/nn.init.html

    >>> import funcnet as fn
    >>> KaimingNormal(nonlinearity="relu")(fn.key(0), (8, 4, 3, 3)).shape
    torch.Size([8, 4, 3, 3])
    """

    _draw = _scaled_normal


@dataclass(frozen=True)
class _Xavier(Initializer):
    _first_axes = "OI"

    gain: NonNegative = 1.0

    def _std(self, shape: Sequence[int]) -> float:
        return self.gain * math.sqrt(2 / max(sum(fans(shape)), 1))


@dataclass(frozen=True)
class XavierUniform(_Xavier):
    """Numbers from U(−√3·σ, √3·σ), σ = gain · √(2 / (fan in + fan out)).

    Raises ValueError for a shape of fewer than two axes, and for a gain beyond the dtype.
    Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks",
    2010. https://docs.pytorch.org/docs/stable/nn.init.html

    >>> import funcnet as fn
    >>> bool((XavierUniform()(fn.key(0), (3, 3)).abs() <= 1).all())
    True
    """

    _draw = _scaled_uniform


@dataclass(frozen=True)
class XavierNormal(_Xavier):
    """Numbers from N(0, σ²), σ = gain · √(2 / (fan in + fan out)).

    Raises ValueError for a shape of fewer than two axes, and for a gain beyond the dtype.
    Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks",
    2010. https://docs.pytorch.org/docs/stable/nn.init.html

    >>> import funcnet as fn
    >>> XavierNormal()(fn.key(0), (3, 5)).shape
    torch.Size([3, 5])
    """

    _draw = _scaled_normal


@dataclass(frozen=True)
class LecunNormal(Initializer):
    """Numbers from N(0, s²) cut off at ±2·s, with s such that their variance is 1 / fan in.

    s = 1 / (0.8796 · √fan in), as in JAX, Flax and Keras, whose `lecun_normal` is cut off too.

    Raises ValueError for a shape of fewer than two axes.
    LeCun et al., "Efficient BackProp", 1998; Klambauer et al., "Self-normalizing neural networks",
    2017. https://docs.jax.dev/en/latest/_autosummary/jax.nn.initializers.lecun_normal.html

    >>> import funcnet as fn
    >>> bool((LecunNormal()(fn.key(0), (50, 4)).abs() < 1.14).all())
    True
    """

    _first_axes = "OI"

    def _draw(self, key: Key, shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> Tensor:
        std = 1 / math.sqrt(max(fans(shape)[0], 1))
        return _cut_normal(key, shape, std / _STD_OF_CUT, dtype, device)


# --- Orthogonal


@dataclass(frozen=True)
class Orthogonal(Initializer):
    """gain times a matrix with orthonormal rows or columns, whichever are fewer.

    A weight (O, I, …) counts as a matrix of O rows. It is the Q of a QR decomposition of normal
    numbers, with the signs that make it uniformly distributed.

    Raises ValueError for a shape of fewer than two axes, and for a gain beyond the dtype.
    Saxe et al., "Exact solutions to the nonlinear dynamics of learning in deep linear neural
    networks", 2013. https://docs.pytorch.org/docs/stable/nn.init.html

    >>> import funcnet as fn
    >>> q = Orthogonal()(fn.key(0), (3, 5))
    >>> torch.allclose(q @ q.T, torch.eye(3), atol=1e-6)
    True
    """

    gain: Finite = 1.0

    _first_axes = "OI"

    def _draw(self, key: Key, shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> Tensor:
        _check_range(self, abs(self.gain), dtype)
        rows, columns = shape[0], math.prod(shape[1:])
        tall = normal(key, (max(rows, columns), min(rows, columns)), dtype=torch.float64)
        drawn, r = torch.linalg.qr(tall)
        q: Tensor = drawn * r.diagonal().sign() * self.gain
        q = (q if rows >= columns else q.t()).contiguous()
        return q.reshape(shape).to(dtype=dtype, device=device)


@dataclass(frozen=True)
class _InitializerKind(InstanceOf):
    """An initialiser or None. The message for a plain function says what to write instead."""

    def convert(self, owner: type, name: str, value: Any) -> Any:
        try:
            return super().convert(owner, name, value)
        except TypeError as error:
            if not callable(value) or (isinstance(value, type) and issubclass(value, Initializer)):
                raise
            advice = "one of your own is a subclass of fn.initializers.Initializer"
            raise TypeError(f"{error}; {advice}") from None


InitializerOrNone: TypeAlias = Annotated[
    Initializer | None,
    _InitializerKind(Initializer, "an initialiser or None", may_be_none=True),
]
"""An initialiser; None where the layer draws as torch.nn does."""
