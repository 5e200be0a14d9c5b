"""Layers made of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import optree
import torch
from torch import Tensor

from funcnet.keys import Key, check_key, fold_in
from funcnet.layer import Layer, Shape, Tree, as_shape, check_grad, check_tensor


@dataclass(frozen=True, init=False, repr=False)
class Sequential(Layer):
    """The composition of layers: y = fₙ(… f₂(f₁(x))), and backwards dx = J₁ᵀ … Jₙᵀ dy.

    Jᵢ is the Jacobian of fᵢ at its input.
    Parameters: a tuple with one entry a layer, so the leaf at path `2.weight` is what
    `torch.nn.Sequential` calls `2.weight`. Without layers it is the identity. Layer i draws from
    `fold_in(key, i)`. Indexing gives a layer, slicing a Sequential.

    Raises TypeError for what is not a layer. What a layer raises starts with its position:
    `layer 2: …`.
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

    def __init__(self, *layers: Layer) -> None:
        for position, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise TypeError(
                    f"Sequential: expected layer {position} to be a Layer, got {layer!r}"
                )
        object.__setattr__(self, "layers", layers)

    def init(
        self,
        key: Key,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tree:
        """A tuple of the layers' parameters."""
        shape = as_shape(self, shape)
        check_key(self, key)
        params = []
        with _Position() as at:
            for at.i, layer in enumerate(self.layers):
                params.append(layer.init(fold_in(key, at.i), shape, dtype=dtype, device=device))
                shape = layer.out_shape(shape)
        return tuple(params)

    def out_shape(self, shape: Sequence[int]) -> Shape:
        """The shape of one example after the last layer."""
        out = as_shape(self, shape)
        with _Position() as at:
            for at.i, layer in enumerate(self.layers):
                out = layer.out_shape(out)
        return out

    def fwd(self, params: Tree, x: Tensor, *, key: Key | None = None) -> tuple[Tensor, list[Any]]:
        """(y, the layers' residuals)."""
        self._check(params, x, key)
        residuals = []
        with _Position() as at:
            for at.i, fwd in enumerate(self._forward("fwd", "_fwd_over")):
                x, kept = fwd(params[at.i], x, key=_layer_key(key, at.i))
                residuals.append(kept)
        if not self.layers:
            return x.clone(), [x.new_zeros(()).expand(x.shape)]  # what takes no memory
        return x, residuals

    def apply(self, params: Tree, x: Tensor, *, key: Key | None = None) -> Tensor:
        """y; no residual outlives its layer."""
        self._check(params, x, key)
        with _Position() as at:
            for at.i, apply in enumerate(self._forward("apply", "_apply_over")):
                x = apply(params[at.i], x, key=_layer_key(key, at.i))
        return x if self.layers else x.clone()

    def bwd(
        self, params: Tree, residuals: list[Any], grad: Tensor, *, input_grad: bool = True
    ) -> tuple[Tree, Tensor | None]:
        """(the tuple of the layers' dparams, dx)."""
        return self._backward("bwd", params, list(residuals), grad, input_grad)

    def _bwd_consuming(
        self, params: Tree, residuals: list[Any], grad: Tensor, *, input_grad: bool = True
    ) -> tuple[Tree, Tensor | None]:
        return self._backward("_bwd_consuming", params, residuals, grad, input_grad)

    def _backward(
        self, method: str, params: Tree, residuals: list[Any], grad: Tensor, input_grad: bool
    ) -> tuple[Tree, Tensor | None]:
        """Empties `residuals` from the end, so that what only they hold is freed as it is used."""
        self._check(params, grad)
        if not self.layers:
            (x,) = residuals
            check_grad(self, grad, x.shape, x)
            return params, grad.clone() if input_grad else None
        if len(residuals) != len(self):
            raise ValueError(
                f"Sequential: expected residuals of {len(self)} layers, got {len(residuals)}"
            )
        dparams = list(params)  # a layer without leaves has the same tree for its gradient
        first = 0 if input_grad else _first_to_learn(params)
        dx: Tensor | None = grad
        owned = False
        with _Position() as at:
            for at.i in reversed(range(first, len(self))):
                layer = self.layers[at.i]
                bwd = getattr(layer, "_bwd_over" if owned and layer._works_in_place else method)
                need = input_grad or at.i > first
                dparams[at.i], dx = bwd(params[at.i], residuals.pop(), dx, input_grad=need)
                owned = layer._owns_results
        return getattr(params, "_make", tuple)(dparams), dx

    def _forward(self, method: str, over: str) -> Iterator[Callable[..., Any]]:
        """This method of each layer, or `over` where the layer before owns what it hands on."""
        owned = False
        for layer in self.layers:
            yield getattr(layer, over if owned and layer._works_in_place else method)
            owned = layer._owns_results

    def _check(self, params: Tree, x: Tensor, key: Key | None = None) -> None:
        if key is not None:
            check_key(self, key)
        if not isinstance(params, tuple):
            raise TypeError(
                f"Sequential: expected params to be a tuple of {len(self)}, "
                f"got {type(params).__name__}"
            )
        if len(params) != len(self):
            raise ValueError(
                f"Sequential: expected params of {len(self)} layers, got {len(params)}"
            )
        if not self.layers:
            check_tensor(self, "x", x)

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

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.layers))})"


class _Position:
    """A block that works on layer i: what is raised in it says so, `layer 2: …`."""

    i: int

    def __enter__(self) -> _Position:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, (ValueError, TypeError)):
            error.args = (f"layer {self.i}: {error}",)


def _layer_key(key: Key | None, i: int) -> Key | None:
    return None if key is None else fold_in(key, i)


def _first_to_learn(params: tuple[Tree, ...]) -> int:
    """The first layer with parameters: below it no gradient is needed but dx. At most the last."""
    for i, tree in enumerate(params[:-1]):
        if optree.tree_leaves(tree):
            return i
    return max(len(params) - 1, 0)
