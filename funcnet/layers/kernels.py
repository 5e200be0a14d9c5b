"""The base of layers that slide a kernel over x: their parameters, their checks, their tiles."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import Tensor

from funcnet.checks import check_some_channels, name_of
from funcnet.fields import Size, Sizes, takes
from funcnet.initializers import Initializer, Uniform
from funcnet.layer import Layer, Part, Shape
from funcnet.ops import tiles
from funcnet.ops.need import Need
from funcnet.ops.products import ExampleGradients, Products, over_positions
from funcnet.ops.window import Ints, Window, padding_sides
from funcnet.param import Param
from funcnet.running import dx_alone

_Kernels = TypeVar("_Kernels", bound="Kernels")


@dataclass(frozen=True)
class Kernels(Layer):
    """A layer that learns a kernel for each channel of y. Fields of subclasses are keyword-only.

    `self` is `Any` in methods that use fields of the subclasses.
    """

    out_channels: Size
    kernel_size: Sizes

    def __new__(cls: type[_Kernels], /, *arguments: Any, **named: Any) -> _Kernels:
        """Raise TypeError for torch.nn's arguments, which start with x's channels."""
        if len(arguments) > 2:
            raise TypeError(_advice(cls, arguments))
        if _has_channels_of_x(cls, arguments, named):
            raise TypeError(_advice_by_name(cls, arguments, named))
        return super().__new__(cls, *arguments, **named)

    def _set_window(self: Any) -> None:
        """Keep the window of the fields. Raises ValueError unless groups divides out_channels."""
        if self.out_channels % self.groups:
            raise ValueError(
                f"{type(self).__name__}: expected groups to divide "
                f"out_channels={self.out_channels}, got groups={self.groups}"
            )
        sides = padding_sides(self.padding, self.kernel_size, self.dilation)
        window = Window(self.kernel_size, self.stride, sides, self.dilation, self.groups)
        object.__setattr__(self, "_window", window)

    def _kernel_params(self: Any, weight_shape: Shape) -> dict[str, Param]:
        """Weight and bias by the layer's initialisers.

        Without an initialiser they are drawn from U(−√q, √q); 1/q is the number of entries of
        `weight[0]`.
        """
        bound = max(1, math.prod(weight_shape[1:])) ** -0.5
        default: Initializer = Uniform(-bound, bound)
        params = {"weight": Param(weight_shape, self.weight_init or default)}
        if self.bias:
            params["bias"] = Param((self.out_channels,), self.bias_init or default)
        return params

    def _kernel_gradients(
        self: Any, dweight: Tensor | None, grad: Tensor
    ) -> dict[str, Tensor] | None:
        """The gradients of weight and bias, given dweight; None if they are not needed."""
        if dweight is None:
            return None
        if not self.bias:
            return {"weight": dweight}
        return {"weight": dweight, "bias": grad.sum(_ALL_BUT_CHANNELS[grad.ndim])}

    def _kernel_gradients_each(
        self: Any, dweight: Products, params: Any, x: Tensor, grad: Tensor, need: Need
    ) -> tuple[dict[str, ExampleGradients], Tensor | None]:
        """(gradients of weight and bias for each example, dx), given dweight for each example."""
        each: dict[str, ExampleGradients] = {"weight": dweight}
        if self.bias:
            each["bias"] = over_positions(grad)
        return each, dx_alone(self, params, x, grad, need)

    def _windowed_tile(
        self: Any, shape: Shape, part: Part, scale: Ints = ()
    ) -> tuple[Part, Layer] | None:
        """`_tile` of a layer that slides its window over x, or over x upsampled by `scale`."""
        if self.method != "auto":
            return None
        source, window = tiles.behind(part, shape[1:], self._window, scale)
        tile = copy.copy(self)
        object.__setattr__(tile, "_window", window)
        return source, tile


_ALL_BUT_CHANNELS = {3: (0, 2), 4: (0, 2, 3), 5: (0, 2, 3, 4)}
"""By the number of grad's axes."""


def check_size(who: object, size: Any) -> None:
    """Raise ValueError unless every axis has at least one entry."""
    if min(size) < 1:
        raise ValueError(
            f"{name_of(who)}: expected {_EXAMPLES[len(size)]} of at least "
            f"{'×'.join('1' * len(size))}, got size {tuple(size)}"
        )


def check_entries(layer: Layer, shape: Shape) -> None:
    """Raise ValueError unless x has at least one channel, and one entry on each axis."""
    check_some_channels(layer, shape[0])
    check_size(layer, shape[1:])


def count_windows(layer: Any, size: Any, after: str = "") -> Ints:
    """The number of windows that fit on each axis. Raises ValueError where not even one does.

    `after` follows the layer's name in the message, and says what x has gone through before.
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


def _has_channels_of_x(
    cls: type[Kernels], arguments: tuple[Any, ...], named: dict[str, Any]
) -> bool:
    """Whether x's channels are given: as in_channels, or by position with out_channels by name."""
    first = ("out_channels", "kernel_size")[: len(arguments)]
    is_named = any(name in named for name in ("in_channels", *first))
    return is_named and not takes(cls, arguments, named)


def _advice_by_name(cls: type[Kernels], arguments: tuple[Any, ...], named: dict[str, Any]) -> str:
    """The message that refuses x's channels where others come by name, and suggests a remedy."""
    names = ["out_channels", "kernel_size"]
    given = [*map(repr, arguments), *(f"{n}={v!r}" for n, v in named.items())]
    theirs = names if "in_channels" in named else ["in_channels", *names]
    meant = {**dict(zip(theirs, arguments, strict=False)), **named}
    meant.pop("in_channels")
    ours = [repr(meant.pop(n)) for n in names if n in meant]
    ours += [f"{n}={v!r}" for n, v in meant.items()]
    return (
        f"{cls.__name__}: expected out_channels, then kernel_size, "
        f"got {cls.__name__}({', '.join(given)}): {_question(cls, ours)}"
    )


def _question(cls: type[Kernels], meant: list[str]) -> str:
    """The end of a message, which suggests what was meant."""
    return (
        "the input's channels are read off the shape; "
        f"did you mean {cls.__name__}({', '.join(meant)})?"
    )


def _advice(cls: type[Kernels], arguments: tuple[Any, ...]) -> str:
    """The message that refuses too many arguments by position, and suggests what was meant."""
    names = [field.name for field in fields(cls)]
    meant = [repr(value) for value in arguments[1:3]]
    # Behind x's channels, torch.nn has the same order.
    meant += [f"{n}={v!r}" for n, v in zip(names[2:], arguments[3:], strict=False)]
    return (
        f"{cls.__name__}: expected out_channels and kernel_size by position, the rest by keyword, "
        f"got {len(arguments)} positional arguments: {_question(cls, meant)} "
        f"{names[2].capitalize()} is given by name, as in {names[2]}={arguments[2]!r}"
    )
