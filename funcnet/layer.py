"""What a layer is: a frozen dataclass of hyperparameters with pure functions on parameter trees.

A layer of one's own is one class with `init`, `out_shape`, `fwd` and `bwd`:

    >>> from dataclasses import dataclass
    >>> import funcnet as fn
    >>> import torch
    >>> @dataclass(frozen=True)
    ... class Scale(fn.Layer):
    ...     "y = w ∘ x, a weight for each channel; dx = w ∘ dy, dw = Σ x ∘ dy over N, H and W."
    ...
    ...     def init(self, key, shape, *, dtype=None, device=None):
    ...         return {"weight": fn.normal(key, (shape[0], 1, 1), dtype=dtype, device=device)}
    ...
    ...     def out_shape(self, shape):
    ...         return shape
    ...
    ...     def fwd(self, params, x, *, key=None):
    ...         return params["weight"] * x, x
    ...
    ...     def bwd(self, params, residuals, grad, *, input_grad=True):
    ...         dweight = (residuals * grad).sum((0, 2, 3)).reshape(-1, 1, 1)
    ...         return {"weight": dweight}, params["weight"] * grad if input_grad else None
    >>> layer = Scale()
    >>> params = layer.init(fn.key(0), (3, 4, 4))
    >>> layer.apply(params, torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor

from funcnet.keys import Key, as_index

Tree: TypeAlias = Any
"""Nested containers of tensors, as `optree` understands them."""

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Layer(ABC):
    """A pure function y = f(params, x) with its gradient, described by hyperparameters alone.

    Shapes: `shape` is that of one example, (C, H, W); x and y put the batch first, (N, C, H, W).

    `fwd` returns y and the residuals, the least that `bwd` needs; `bwd` returns the gradients of
    Σ grad ∘ y with respect to params (a tree like params) and to x. Both are pure: nothing is
    written to a tensor that was handed in, and no state is kept between them.
    """

    _owns_results = False
    """Whether y of `fwd` and dx of `bwd` are new memory, shared with nothing, the residuals and
    dparams included. What follows such a layer may work in place."""

    _works_in_place = False
    """Whether there are `_fwd_over`, `_bwd_over` and `_apply_over`, which write over what the layer
    before or behind owns."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class with passes of its own, or a mixin's, inherits none of these promises."""
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        layers: list[Any] = [base for base in cls.__mro__[1:] if Layer in base.__mro__]
        parent = next((base for base in layers if base.fwd is not Layer.fwd), Layer)
        passes = ("fwd", "bwd", "apply")
        if any(getattr(cls, name) is not getattr(parent, name) for name in passes):
            cls._owns_results = own.get("_owns_results", False)
            cls._works_in_place = own.get("_works_in_place", False)
            if "_bwd_consuming" not in own:
                cls._bwd_consuming = Layer._bwd_consuming  # type: ignore[method-assign]

    @abstractmethod
    def init(
        self,
        key: Key,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tree:
        """Parameters for examples of `shape`, drawn from `key`; () if there is nothing to learn."""

    @abstractmethod
    def out_shape(self, shape: Sequence[int]) -> Shape:
        """The shape of one example of y, given that of x. No tensor is made."""

    @abstractmethod
    def fwd(self, params: Tree, x: Tensor, *, key: Key | None = None) -> tuple[Tensor, Any]:
        """(y, residuals). `key` is for layers that draw numbers; without one they evaluate."""

    @abstractmethod
    def bwd(
        self, params: Tree, residuals: Any, grad: Tensor, *, input_grad: bool = True
    ) -> tuple[Tree, Tensor | None]:
        """(dparams, dx), where grad has the shape of y; dx is None if `input_grad` is False."""

    def apply(self, params: Tree, x: Tensor, *, key: Key | None = None) -> Tensor:
        """y = f(params, x)."""
        return self.fwd(params, x, key=key)[0]

    def vjp(
        self,
        params: Tree,
        x: Tensor,
        grad: Tensor,
        *,
        key: Key | None = None,
        input_grad: bool = True,
    ) -> tuple[Tree, Tensor | None]:
        """(dparams, dx): the vector-Jacobian product of `apply` with grad, which has y's shape."""
        _, residuals = self.fwd(params, x, key=key)
        return self.bwd(params, residuals, grad, input_grad=input_grad)

    def _bwd_consuming(
        self, params: Tree, residuals: Any, grad: Tensor, *, input_grad: bool = True
    ) -> tuple[Tree, Tensor | None]:
        """`bwd` for a caller that gives the residuals up: they may be freed as they are used."""
        return self.bwd(params, residuals, grad, input_grad=input_grad)


def source(value: Any) -> str:
    """The code that builds a dataclass of ours, without defaults: `Conv2d(8, kernel_size=3)`."""
    arguments = []
    for position, field in enumerate(field for field in fields(value) if field.init):
        argument = _collapse(getattr(value, field.name))
        if position == 0 and field.default is MISSING:
            arguments.append(repr(argument))
        elif argument != _collapse(field.default):
            arguments.append(f"{field.name}={argument!r}")
    return f"{type(value).__name__}({', '.join(arguments)})"


def _collapse(value: Any) -> Any:
    """3 for (3, 3), which means the same."""
    is_square = isinstance(value, tuple) and len(value) == 2 and value[0] == value[1]
    return value[0] if is_square else value


# --- Refusing bad input. Every message names who refuses, what was expected and what came.


def as_int(who: str, name: str, value: Any, least: int) -> int:
    """`value` as an int that is at least `least`."""
    number = as_index(who, name, value)
    if number < least:
        raise ValueError(f"{who}: expected {name} >= {least}, got {number}")
    return number


def as_pair(who: str, name: str, value: Any, least: int) -> tuple[int, int]:
    """`value`, an int or a pair (height, width), as a pair of ints that are at least `least`."""
    if not isinstance(value, (tuple, list)):
        value = (value, value)
    if len(value) != 2:
        raise ValueError(f"{who}: expected {name} to be an int or a pair of ints, got {value!r}")
    return as_int(who, name, value[0], least), as_int(who, name, value[1], least)


def as_shape(layer: object, shape: Sequence[int], rank: int | None = None) -> Shape:
    """`shape` of one example as a tuple of ints, of the given rank."""
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"{layer}: expected shape to be a tuple of ints, got {shape!r}")
    if rank is not None and len(shape) != rank:
        raise ValueError(
            f"{layer}: expected the shape of one example, (C, H, W), got {tuple(shape)}"
        )
    return tuple(as_int(str(layer), "every size in shape", size, 0) for size in shape)


def check_tensor(layer: object, name: str, x: Any) -> None:
    """Refuse what is not a floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{layer}: expected {name} to be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{layer}: expected {name} to be floating-point, got {x.dtype}")


def check_like(layer: object, name: str, tensor: Any, like_name: str, like: Tensor) -> None:
    """Refuse a tensor whose dtype or device is not that of another."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{layer}: expected {name} to be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise TypeError(
            f"{layer}: expected {name} to have the dtype and device of {like_name}, "
            f"{like.dtype} on {like.device}, got {tensor.dtype} on {tensor.device}"
        )


def check_grad(layer: object, grad: Any, y_shape: Sequence[int], like: Tensor) -> None:
    """Refuse a grad that has not the shape of y, or the dtype and device of x."""
    check_like(layer, "grad", grad, "x", like)
    if grad.shape != y_shape:
        raise ValueError(
            f"{layer}: expected grad of shape {tuple(y_shape)}, got {tuple(grad.shape)}"
        )


def check_no_params(layer: object, params: Tree) -> None:
    """Refuse parameters for a layer that has none."""
    if not (isinstance(params, tuple) and not params):
        got = f"a tuple of {len(params)}" if isinstance(params, tuple) else type(params).__name__
        raise ValueError(f"{layer}: expected no parameters, (), got {got}")


def check_params(
    layer: object,
    params: Tree,
    shapes: dict[str, tuple[int | str, ...]],
    like_name: str,
    like: Tensor,
) -> None:
    """Refuse params that are not a dict of tensors with these names and shapes, like `like`.

    A letter in a shape stands for a size that is not known: no tensor has that shape.
    """
    if not isinstance(params, dict):
        raise TypeError(
            f"{layer}: expected params to be a dict with {_names(shapes)}, "
            f"got {type(params).__name__}"
        )
    if params.keys() != shapes.keys():
        raise ValueError(f"{layer}: expected params with {_names(shapes)}, got {_names(params)}")
    for name, shape in shapes.items():
        check_like(layer, name, params[name], like_name, like)
        if params[name].shape != shape:
            expected = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
            raise ValueError(
                f"{layer}: expected {name} of shape ({expected}), got {tuple(params[name].shape)}"
            )


def _names(params: dict[str, Any]) -> str:
    return "keys " + ", ".join(map(repr, sorted(map(str, params)))) if params else "no keys"
