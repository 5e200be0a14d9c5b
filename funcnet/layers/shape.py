"""Layers that move entries and change none: y holds x's entries, in memory of its own.

A dimension counts the batch, as in torch: 1 is the first axis of an example. 0 is refused, because
it would move or mix the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from funcnet.checks import as_axis, name_of
from funcnet.fields import Axis, Index, IntTuple
from funcnet.keys import Key
from funcnet.layer import Layer, Shape, same_part
from funcnet.ops import native
from funcnet.ops.need import Need
from funcnet.ops.without_entries import without_entries

_select_backward = torch.ops.aten.select_backward


@dataclass(frozen=True)
class Rearranged(Layer):
    """y is a view of a copy of x, and dx a view of a copy of dy.

    A combinator calls `_fwd_` and `_bwd_`, which make no copy, where x or dy belongs to this layer
    alone, or where it copies the result itself.
    """

    _fresh = True
    _views = True

    def _view(self, x: Tensor) -> Tensor:
        """x's entries as y has them; it may share x's memory."""
        raise NotImplementedError

    def _view_back(self, shape: Shape, dy: Tensor) -> Tensor:
        """dy's entries as dx of `shape` has them; it may share dy's memory."""
        raise NotImplementedError

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        return self._view(x.clone()), without_entries(x)

    def _bwd(self, params: Any, like: Any, dy: Tensor, need: Need) -> Any:
        return (), self._view_back(like.shape[1:], dy.clone())

    def _fwd_(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        return self._view(x), without_entries(x)

    def _bwd_(self, params: Any, like: Any, dy: Tensor, need: Need) -> Any:
        return (), self._view_back(like.shape[1:], dy)


@dataclass(frozen=True)
class Reshaped(Rearranged):
    """y has x's entries in row-major order, so y can be a view of x only if x is in that order.

    dx gets x's memory format, in which the layers before this one compute.
    """

    def _view_back(self, shape: Shape, dy: Tensor) -> Tensor:
        return dy.reshape(shape)

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        y = self._view(x.clone(memory_format=torch.contiguous_format))
        return y, (without_entries(x), native.memory_format(x))

    def _bwd(self, params: Any, residuals: Any, dy: Tensor, need: Need) -> Any:
        like, memory_format = residuals
        return (), self._view_back(like.shape[1:], dy).clone(memory_format=memory_format)

    def _fwd_(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        return self._view(x), (without_entries(x), native.memory_format(x))

    def _bwd_(self, params: Any, residuals: Any, dy: Tensor, need: Need) -> Any:
        like, memory_format = residuals
        return (), self._view_back(like.shape[1:], dy).contiguous(memory_format=memory_format)


@dataclass(frozen=True)
class Identity(Rearranged):
    """y = x, dx = dy.

    Shapes: any; y has x's shape.
    Raises TypeError for an x that is not floating-point.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Identity.html

    >>> Identity().apply((), torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """

    _tile = same_part

    def _view(self, x: Tensor) -> Tensor:
        return x

    def _view_back(self, shape: Shape, dy: Tensor) -> Tensor:
        return dy


@dataclass(frozen=True)
class Flatten(Reshaped):
    """The axes from `start_dim` to `end_dim`, both included, become one, in row-major order.

    Shapes: any that has these axes; by default x (N, C, H, W), y (N, C·H·W).
    Raises ValueError for axes that x does not have, or that include the batch.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Flatten.html

    >>> Flatten().apply((), torch.zeros(2, 3, 4, 5)).shape
    torch.Size([2, 60])
    >>> Flatten(2).out_shape((3, 4, 5))
    (3, 20)
    """

    start_dim: Axis = 1
    end_dim: Axis = -1

    def _out_shape(self, shape: Shape) -> Shape:
        start = as_axis(self, "start_dim", self.start_dim, shape) - 1
        end = as_axis(self, "end_dim", self.end_dim, shape)
        if end <= start:
            raise ValueError(
                f"{name_of(self)}: expected start_dim not to lie after end_dim, got the axes "
                f"{start + 1} and {end}"
            )
        return (*shape[:start], math.prod(shape[start:end]), *shape[end:])

    def _view(self, x: Tensor) -> Tensor:
        return x.flatten(self.start_dim, self.end_dim)


@dataclass(frozen=True, init=False)
class Reshape(Reshaped):
    """Every example gets another shape, with its entries in row-major order.

    `Reshape(*shape)` takes the shape of one example, `Reshape(3, 4)` or `Reshape((3, 4))`; one of
    the sizes may be −1, and follows from the others.

    Shapes: any with as many entries an example; y (N, *shape).
    Raises ValueError for x with another number of entries, for sizes below −1, or two of −1.
    https://docs.pytorch.org/docs/stable/generated/torch.reshape.html

    >>> Reshape(3, -1).apply((), torch.zeros(2, 6, 4)).shape
    torch.Size([2, 3, 8])
    """

    shape: Annotated[tuple[int, ...], IntTuple(-1)]

    def __init__(self, *shape: int | Sequence[int], **field: Any) -> None:
        object.__setattr__(self, "shape", _given("Reshape", "shape", shape, field))
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape.count(-1) > 1:
            raise ValueError(f"Reshape: expected at most one size of -1, got {self.shape}")

    def _out_shape(self, shape: Shape) -> Shape:
        # A list: torch.compile cannot follow a generator into math.prod.
        given = [n for n in self.shape if n != -1]
        size, known = math.prod(shape), math.prod(given)
        if len(given) == len(self.shape):  # not `in`, which misses a symbolic -1 of torch.compile
            expected, fits = f"{known}", size == known
        else:
            expected, fits = f"a multiple of {known}", known > 0 and size % known == 0
        if not fits:
            raise ValueError(
                f"{name_of(self)}: expected the entries of an example to be {expected}, "
                f"got {size} in shape {shape}"
            )
        return tuple(size // known if n == -1 else n for n in self.shape)

    def _view(self, x: Tensor) -> Tensor:
        return x.reshape((*x.shape[:1], *self._out_shape(x.shape[1:])))


@dataclass(frozen=True, init=False)
class Permute(Rearranged):
    """Axis i of y is axis dims[i] of x; `Permute(0, 2, 3, 1)` puts the channels last.

    The dims may also come as one tuple.

    Shapes: any with as many axes, batch included, as there are dims. Negative ones count from the
    last.
    Raises ValueError unless dims are a permutation of 0, 1, … that starts with 0, the batch.
    https://docs.pytorch.org/docs/stable/generated/torch.permute.html

    >>> Permute(0, 2, 3, 1).apply((), torch.zeros(2, 3, 4, 5)).shape
    torch.Size([2, 4, 5, 3])
    """

    dims: Annotated[tuple[int, ...], IntTuple(None)]

    def __init__(self, *dims: int | Sequence[int], **field: Any) -> None:
        object.__setattr__(self, "dims", _given("Permute", "dims", dims, field))
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        dims = tuple(dim + len(self.dims) if dim < 0 else dim for dim in self.dims)
        if dims[:1] != (0,) or sorted(dims) != list(range(len(dims))):
            raise ValueError(
                f"Permute: expected a permutation of dims that starts with 0, the batch, "
                f"got {self.dims}"
            )
        object.__setattr__(self, "dims", dims)

    def _out_shape(self, shape: Shape) -> Shape:
        if len(self.dims) != len(shape) + 1:
            raise ValueError(
                f"{name_of(self)}: expected x with {len(self.dims)} axes, got {len(shape) + 1}"
            )
        return tuple(shape[dim - 1] for dim in self.dims[1:])

    def _view(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)

    def _view_back(self, shape: Shape, dy: Tensor) -> Tensor:
        return dy.permute([self.dims.index(dim) for dim in range(len(self.dims))])


@dataclass(frozen=True)
class Select(Layer):
    """y is entry `index` along axis `dim` of x, which is dropped; dx is 0 at all other entries.

    `Select(1, -1)` takes the last step of a sequence (N, T, C).

    Shapes: any with that axis; y has one axis less.
    Raises ValueError for an axis that x does not have or that is the batch, and for an index that
    the axis does not have.
    https://docs.pytorch.org/docs/stable/generated/torch.select.html

    >>> Select(1, -1).apply((), torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([3.])
    """

    dim: Axis
    index: Index

    _fresh = True

    def _out_shape(self, shape: Shape) -> Shape:
        axis = as_axis(self, "dim", self.dim, shape) - 1
        if not -shape[axis] <= self.index < shape[axis]:
            raise ValueError(
                f"{name_of(self)}: expected an axis that has the index {self.index}, "
                f"got one of size {shape[axis]}"
            )
        return (*shape[:axis], *shape[axis + 1 :])

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Tensor]:
        return x.select(self.dim, self.index).clone(), without_entries(x)

    def _bwd(self, params: Any, like: Tensor, dy: Tensor, need: Need) -> Any:
        return (), _select_backward(dy, like.shape[1:], self.dim, self.index)


def _given(who: str, name: str, given: tuple[Any, ...], field: dict[str, Any]) -> Any:
    """The ints by position or in a tuple, or the field by its name, as dataclasses.replace does."""
    if field and (given or field.keys() != {name}):
        raise TypeError(f"{who}: expected ints by position, got also {', '.join(field)}")
    is_one = len(given) == 1 and isinstance(given[0], (tuple, list))
    return field.get(name, given[0] if is_one else given)
