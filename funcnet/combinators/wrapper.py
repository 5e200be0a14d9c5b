"""The base of combinators of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import torch

from funcnet.checks import name_of
from funcnet.fields import InstanceOf, takes
from funcnet.initializers import Device
from funcnet.keys import Key
from funcnet.layer import Layer, Shape, Spec, Tree
from funcnet.running import check, is_fresh

if TYPE_CHECKING:
    from typing_extensions import Self

Child: TypeAlias = Annotated[Layer, InstanceOf(Layer, "a Layer")]
"""The only layer of a combinator."""


@dataclass(frozen=True)
class Wrapper(Layer):
    """A layer around another, which gets all of its parameters, and the key itself."""

    layer: Child

    def __new__(cls, /, *arguments: Any, **named: Any) -> Self:
        several = len(arguments) > 1 and isinstance(arguments[1], Layer)
        if several and not takes(cls, arguments, named):
            raise TypeError(
                f"{cls.__name__}: expected one layer, such as Sequential(…), got {len(arguments)}"
            )
        return super().__new__(cls, *arguments, **named)

    def _init(self, key: Key, shape: Shape, dtype: torch.dtype | None, device: Device) -> Tree:
        return self.layer.init(key, shape, dtype=dtype, device=device)

    def _out_shape(self, shape: Shape) -> Shape:
        return self.layer.out_shape(shape)

    def _check(self, params: Tree, x: Spec) -> Spec:
        return check(self.layer, params, x)

    def _learns(self, params: Tree) -> bool:
        return self.layer._learns(params)

    @property
    def _fresh(self) -> Any:  # type: ignore[override]
        """Whether the inner layer keeps this promise, since y and dx are made by it."""
        return is_fresh(self.layer)

    def _describe_last(self) -> str:
        return self.layer._describe_last()


@dataclass(frozen=True)
class SameShape(Wrapper):
    """A layer around another whose y has the shape of its x."""

    def _out_shape(self, shape: Shape) -> Shape:
        self._expect(shape, self.layer.out_shape(shape))
        return shape

    def _check(self, params: Tree, x: Spec) -> Spec:
        self._check_x(x)
        y = super()._check(params, x)
        self._expect(x.shape, y.shape)
        return y

    def _expect(self, shape: Shape, out_shape: Shape) -> None:
        if out_shape != shape:
            raise ValueError(
                f"{name_of(self)}: expected a layer that keeps the shape of an example, "
                f"got {shape} before it and {out_shape} after it"
            )

    def _describe_last(self) -> str:
        return name_of(self)
