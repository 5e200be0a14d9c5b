"""Layers whose x can be computed from y, so that only y is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcnet.checks import name_of
from funcnet.combinators.several import Several, key_of
from funcnet.keys import Key
from funcnet.layer import Layer, Shape, Spec, Tree, zeros_like
from funcnet.ops.need import Need
from funcnet.running import added, check, run_apply, run_bwd, run_fwd


@dataclass(frozen=True, init=False)
class Reversible(Several):
    """With x₁ and x₂ the halves of x along the channels, axis 1, for layers f and g

        y₁ = x₁ + f(x₂)        y₂ = x₂ + g(y₁)        y = [y₁, y₂]
        x₂ = y₂ − g(y₁)        x₁ = y₁ − f(x₂)

    and for further layers pair after pair. y alone is kept, however many pairs there are: the
    backward pass computes the x of each layer, and its residuals, again. It uses the same keys
    again. These x have rounding errors, which add up over the layers.

    Shapes: any with an even number of channels; every layer keeps the shape of a half.
    Parameters: a tuple with one entry a layer. Layer i draws from `fold_in(key, i)`, so
    f has number 0 and g number 1.

    Raises ValueError for an odd number of layers or of channels, and for a layer that does not keep
    the shape of a half; TypeError for layers by name.
    Gomez et al., "The reversible residual network", NeurIPS 2017.

    >>> import funcnet as fn
    >>> f = g = fn.Sequential(fn.Conv2d(4, 3, padding=1), fn.ReLU())
    >>> net = fn.Reversible(f, g, f, g)
    >>> net.out_shape((8, 16, 16))
    (8, 16, 16)
    """

    _joins = "apart"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.names:
            raise TypeError("Reversible: expected layers by position, got names")
        if len(self) < 2 or len(self) % 2:
            raise ValueError(
                f"Reversible: expected an even number of layers, at least 2, got {len(self)}"
            )

    def _out_shape(self, shape: Shape) -> Shape:
        half = self._half(shape)
        with self._position() as at:
            for at.i, layer in enumerate(self.layers):
                _expect_kept(layer, half, layer.out_shape(half))
        return shape

    def _child_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        return (self._half(shape),) * len(self)

    def _half(self, shape: Shape) -> Shape:
        if not shape or shape[0] % 2:
            raise ValueError(
                f"{name_of(self)}: expected an even number of channels, "
                f"got an example of shape {shape}"
            )
        return shape[0] // 2, *shape[1:]

    def _check(self, params: Tree, x: Spec) -> Spec:
        self._check_tree(params)
        self._check_x(x)
        half = x._replace(shape=self._half(x.shape))
        with self._position() as at:
            for at.i, (layer, own) in enumerate(self._pairs(params)):
                _expect_kept(layer, half.shape, check(layer, own, half).shape)
        return x

    def _fwd(self, params: Tree, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        a, b = x.tensor_split(2, 1)
        with self._position() as at:
            for at.i, (layer, own) in enumerate(self._pairs(params)):
                # One layer adds to one half. Then the halves change places.
                a, b = b, added(layer, run_apply(layer, own, b, key_of(key, at.i)), a)
        y = torch.cat([a, b], 1)
        return y, (y, key)

    def _bwd(self, params: Tree, residuals: Any, dy: Tensor, need: Need) -> tuple[Tree, Any]:
        y, key = residuals
        a, b = y.tensor_split(2, 1)
        da, db = dy.tensor_split(2, 1)
        first = 0 if need.input else self._first_to_learn(params)
        dparams: list[Tree] = [zeros_like(own) for own in params[:first]]
        dparams += [()] * (len(self) - first)
        above = need._replace(input=True, consume=True)  # nobody else has seen these residuals
        with self._position() as at:
            for at.i in range(len(self) - 1, first - 1, -1):
                layer, own = self.layers[at.i], params[at.i]
                made, kept = run_fwd(layer, own, a, key_of(key, at.i))
                wanted = above if at.i > first else above._replace(input=need.input)
                dparams[at.i], da_of_layer = run_bwd(layer, own, kept, db, wanted)
                if at.i > first:
                    a, b = b - made, a
                if da_of_layer is not None:
                    da, db = db, added(layer, da_of_layer, da)
        return self._packed(dparams, params), torch.cat([da, db], 1) if need.input else None


def _expect_kept(layer: Layer, half: Shape, out_shape: Shape) -> None:
    if out_shape != half:
        raise ValueError(
            f"{name_of(layer)}: expected a layer that keeps the shape of half the channels, "
            f"got {half} before it and {out_shape} after it"
        )
