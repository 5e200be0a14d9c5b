"""The composition of layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, overload

import optree
import torch
from torch import Tensor

from funcnet.checks import name_of
from funcnet.combinators.position import Position
from funcnet.keys import Key, fold_in
from funcnet.layer import (
    Layer,
    Shape,
    Spec,
    Tree,
    check,
    is_private,
    run_apply,
    run_bwd,
)
from funcnet.ops.inplace import is_plain
from funcnet.ops.need import Need


@dataclass(frozen=True, init=False)
class Sequential(Layer):
    """The composition of layers: y = fₙ(… f₂(f₁(x))), and backwards dx = J₁ᵀ … Jₙᵀ dy.

    Jᵢ is the Jacobian of fᵢ at its input.
    Parameters: a tuple with one entry a layer, so the leaf at path `2.weight` is what
    `torch.nn.Sequential` calls `2.weight`. Without layers it is the identity. Layer i draws from
    `fold_in(key, i)`. Indexing gives a layer, slicing a Sequential.

    Raises TypeError for an argument that is not a layer. An error of a layer starts with the
    layer's position: `layer 2: …`.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Sequential.html

    >>> import funcnet as fn
    >>> net = fn.Sequential(fn.Conv2d(8, 3, padding="same"), fn.ReLU(), fn.Upsample2d(2))
    >>> net.out_shape((3, 16, 16))
    (8, 32, 32)
    >>> params = net.init(fn.key(0), (3, 16, 16))
    >>> params[0]["weight"].shape
    torch.Size([8, 3, 3, 3])
    """

    layers: tuple[Layer, ...]
    _over_x: tuple[bool, ...] = field(init=False, repr=False, compare=False)
    """Whether each layer may write over its x, which the layer before has made for it alone."""
    _over_grad: tuple[bool, ...] = field(init=False, repr=False, compare=False)
    """Whether each layer may write over its grad, which the layer behind has made for it alone."""

    def __init__(self, *layers: Layer) -> None:
        for position, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise TypeError(
                    f"Sequential: expected layer {position} to be a Layer, got {layer!r}"
                )
        object.__setattr__(self, "layers", layers)
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        fresh = [layer._fresh and is_private(layer) for layer in self.layers]
        over = [hasattr(layer, "_fwd_") and is_private(layer) for layer in self.layers]
        before, behind = [False, *fresh], [*fresh[1:], False]
        object.__setattr__(self, "_over_x", tuple(map(all, zip(over, before, strict=False))))
        object.__setattr__(self, "_over_grad", tuple(map(all, zip(over, behind, strict=False))))

    def _out_shape(self, shape: Shape) -> Shape:
        return (*self._shapes(shape),)[-1]

    def _child_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        return (*self._shapes(shape),)[:-1]

    def _shapes(self, shape: Shape) -> Iterator[Shape]:
        """The shape of one example before each layer, and after the last."""
        yield shape
        with Position() as at:
            for at.i, layer in enumerate(self.layers):
                shape = layer.out_shape(shape)
                yield shape

    def _init(
        self, key: Key, shape: Shape, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> Tree:
        params = []
        shapes = self._child_shapes(shape)
        with Position() as at:
            for at.i, (layer, before) in enumerate(zip(self.layers, shapes, strict=True)):
                own = fold_in(key, at.i)
                params.append(layer.init(own, before, dtype=dtype, device=device))
        return tuple(params)

    def _check(self, params: Tree, x: Spec) -> Spec:
        self._check_tree(params)
        if not self.layers:
            self._check_x(x)
        return self._check_from(0, params, x)

    def _check_from(self, first: int, params: Tree, x: Spec) -> Spec:
        """The spec of y, given that of the x of layer `first`."""
        with Position() as at:
            for at.i in range(first, len(self.layers)):
                x = check(self.layers[at.i], params[at.i], x)
        return x

    def _check_tree(self, params: Tree) -> None:
        if not isinstance(params, tuple):
            raise TypeError(
                f"{name_of(self)}: expected params to be a tuple of {len(self)}, "
                f"got {type(params).__name__}"
            )
        if len(params) != len(self):
            raise ValueError(
                f"{name_of(self)}: expected params of {len(self)} layers, got {len(params)}"
            )

    def _apply(self, params: Tree, x: Tensor, key: Key | None) -> Tensor:
        """y; no residual outlives its layer."""
        in_place = is_plain()
        layer: Any
        with Position() as at:
            for at.i, layer in enumerate(self.layers):
                own = None if key is None else fold_in(key, at.i)
                if in_place and self._over_x[at.i]:
                    x = layer._fwd_(params[at.i], x, own)[0]
                elif is_private(layer):
                    x = run_apply(layer, params[at.i], x, own)
                else:
                    y = layer.apply(params[at.i], x, key=own)
                    x = self._as_promised(at.i, params, x, y)
        return x if self.layers else x.clone()

    def _fwd(self, params: Tree, x: Tensor, key: Key | None) -> tuple[Tensor, list[Any]]:
        in_place = is_plain()
        layer: Any
        residuals = []
        with Position() as at:
            for at.i, layer in enumerate(self.layers):
                own = None if key is None else fold_in(key, at.i)
                if in_place and self._over_x[at.i]:
                    x, kept = layer._fwd_(params[at.i], x, own)
                elif is_private(layer):
                    x, kept = layer._fwd(params[at.i], x, own)
                else:
                    y, kept = layer.fwd(params[at.i], x, key=own)
                    x = self._as_promised(at.i, params, x, y)
                residuals.append(kept)
        return (x if self.layers else x.clone()), residuals

    def _as_promised(self, i: int, params: Tree, x: Tensor, y: Tensor) -> Tensor:
        """y of a layer that checks for itself; if it is not what the layer's `out_shape` says, the
        layers behind it have yet to be checked."""
        expected = (*x.shape[:1], *self.layers[i].out_shape(tuple(x.shape[1:])))
        if (y.shape, y.dtype, y.device) != (expected, x.dtype, x.device):
            spec = Spec(tuple(y.shape[:1]), tuple(y.shape[1:]), y.dtype, y.device)
            self._check_from(i + 1, params, spec)
        return y

    def _bwd(
        self, params: Tree, residuals: list[Any], grad: Tensor, need: Need
    ) -> tuple[Tree, Tensor | None]:
        """Takes residuals from the end, so that what only they hold is freed as it is used."""
        kept = residuals if need.consume else list(residuals)
        if len(kept) != len(self.layers):
            raise ValueError(
                f"{name_of(self)}: expected residuals of {len(self)} layers, got {len(kept)}"
            )
        first = 0 if need.input else self._first_to_learn(params)
        dparams: list[Tree] = [optree.tree_map(torch.zeros_like, own) for own in params[:first]]
        dparams += [()] * (len(self) - first)
        dx: Any = grad if self.layers else grad.clone()
        layer: Any
        in_place, above = is_plain(), need._replace(input=True)
        with Position() as at:
            for at.i in range(len(self) - 1, first - 1, -1):
                layer, own = self.layers[at.i], params[at.i]
                wanted = need if at.i == first else above
                if in_place and self._over_grad[at.i]:
                    dparams[at.i], dx = layer._bwd_(own, kept.pop(), dx, wanted)
                else:
                    dparams[at.i], dx = run_bwd(layer, own, kept.pop(), dx, wanted)
        return getattr(params, "_make", tuple)(dparams), dx

    def _learns(self, params: Tree) -> bool:
        return any(layer._learns(own) for layer, own in zip(self.layers, params, strict=True))

    def _first_to_learn(self, params: Tree) -> int:
        """The first layer that learns: below it no gradient is needed. At most the last."""
        for i, layer in enumerate(self.layers[:-1]):
            if layer._learns(params[i]):
                return i
        return max(len(self.layers) - 1, 0)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequential: ...
    def __getitem__(self, index: int | slice) -> Layer | Sequential:
        if isinstance(index, slice):
            return Sequential(*self.layers[index])
        return self.layers[index]

    def _describe(self) -> str:
        return f"Sequential of {len(self)} layers"

    def _describe_last(self) -> str:
        if not self.layers:
            return repr(self)
        return f"layer {len(self) - 1}: {self.layers[-1]._describe_last()}"
