"""The case under check: layers and losses alike are a function of the leaves of params and x."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor

from funcnet.keys import Key
from funcnet.layer import Layer, Tree
from funcnet.losses import Loss

Leaves = list[Tensor]
"""The leaves of params, then x; or their gradients, in that order."""


@dataclass(frozen=True)
class Case:
    """A layer with the arguments of its functions. Its methods return what the layer returns."""

    layer: Any
    params: Tree
    x: Tensor
    grad: Tensor
    key: Key | None = None
    is_loss: ClassVar[bool] = False

    @property
    def leaves(self) -> Leaves:
        return [*optree.tree_leaves(self.params), self.x]

    @property
    def names(self) -> list[str]:
        """The name of each leaf in messages: `params[0]['weight']`, …, `x`."""
        accessors = optree.tree_accessors(self.params)
        return [*(accessor.codify("params") for accessor in accessors), "x"]

    @property
    def frozen(self) -> list[bool]:
        """Whether each leaf's gradient is 0 by intention, though y depends on it."""
        try:
            frozen = self.layer._frozen_params(self.params)
        except Exception:  # a layer of one's own may keep its params in any way
            frozen = []
        addresses = set(map(id, frozen))
        return [id(leaf) in addresses for leaf in self.leaves]

    @property
    def inputs(self) -> dict[str, Any]:
        """Every tensor among the arguments, by name."""
        return {**dict(zip(self.names, self.leaves, strict=True)), "grad": self.grad}

    def at(self, leaves: Sequence[Tensor], grad: Tensor | None = None) -> Case:
        """The same case with other leaves, and another grad if given."""
        params = optree.tree_unflatten(optree.tree_structure(self.params), leaves[:-1])
        return replace(self, params=params, x=leaves[-1], grad=self.grad if grad is None else grad)

    def double(self) -> Case:
        """A contiguous copy in float64, on the CPU if the device has no float64."""
        return self.at([_double(leaf) for leaf in self.leaves], _double(self.grad))

    def fwd(self) -> Any:
        return self.layer.fwd(self.params, self.x, key=self.key)

    def apply(self) -> Tensor:
        y: Tensor = self.layer.apply(self.params, self.x, key=self.key)
        return y

    def bwd(self, residuals: Any, **need: bool) -> Any:
        """`need` holds `input_grad` and `param_grad`; only the first is passed if not given."""
        need = {"input_grad": True, **need}
        return self.layer.bwd(self.params, residuals, self.grad, **need)

    def vjp(self, **need: bool) -> Any:
        """`need` as for `bwd`."""
        need = {"input_grad": True, **need}
        return self.layer.vjp(self.params, self.x, self.grad, key=self.key, **need)

    def gradients(self) -> Leaves:
        """The gradients of `leaves`, by `vjp`."""
        return flat(self.vjp())

    def out_shape(self) -> tuple[int, ...]:
        """The shape that y should have."""
        return (*self.x.shape[:1], *self.layer.out_shape(tuple(self.x.shape[1:])))


@dataclass(frozen=True)
class LossCase(Case):
    """A loss, as a layer without parameters. Its target, any tree, is never moved."""

    target: Any = None
    is_loss: ClassVar[bool] = True

    @property
    def inputs(self) -> dict[str, Any]:
        accessors = optree.tree_accessors(self.target)
        names = [accessor.codify("target") for accessor in accessors]
        named = zip(names, optree.tree_leaves(self.target), strict=True)
        targets = {name: leaf for name, leaf in named if isinstance(leaf, Tensor)}
        return {"x": self.x, **targets, "grad": self.grad}

    def with_target(self, change: Callable[[Tensor], Tensor]) -> LossCase:
        """The same case with another target: each tensor in it changed."""
        return replace(
            self,
            target=optree.tree_map(
                lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, self.target
            ),
        )

    def double(self) -> Case:
        there = super().double()
        assert isinstance(there, LossCase)
        return there.with_target(_double)

    def fwd(self) -> Any:
        return self.layer.fwd(self.x, self.target)

    def apply(self) -> Tensor:
        y: Tensor = self.layer.apply(self.x, self.target)
        return y

    def bwd(self, residuals: Any, **need: bool) -> Any:
        return (), self.layer.bwd(residuals, self.grad)

    def vjp(self, **need: bool) -> Any:
        return (), self.layer.vjp(self.x, self.target, self.grad)

    def out_shape(self) -> tuple[int, ...]:
        return ()


def make_case(
    layer: Layer | Loss, params: Any, x: Any, grad: Tensor | float | None, key: Key | None
) -> Case:
    """The case of `check_vjp(layer, params, x)` or `check_vjp(loss, x, target)`.

    A missing grad is drawn with both signs, so that transposes and flips cannot cancel.
    """
    if isinstance(layer, Loss):
        x, target = params, x
        drawn = torch.as_tensor(-1.375 if grad is None else grad, device=x.device)
        return LossCase(layer, (), x.detach(), drawn.detach().to(x.dtype), None, target)
    params = optree.tree_map(lambda leaf: leaf.detach(), params)
    x = x.detach()
    if grad is None:
        y = layer.apply(params, x, key=key)
        grad = signed(y.shape, seed=1).to(dtype=x.dtype, device=x.device)
    return Case(layer, params, x, torch.as_tensor(grad, device=x.device).detach(), key)


def flat(gradients: Any) -> Leaves:
    """(dparams, dx) as a list, without those that are None."""
    dparams, dx = gradients
    return [*optree.tree_leaves(dparams), *([] if dx is None else [dx])]


def signed(shape: Sequence[int], seed: int) -> Tensor:
    """Draw from N(0, 1) in float64, by the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")


def scale_of(leaf: Tensor) -> float:
    """The root mean square of a leaf's finite entries; 1 if that is 0."""
    finite = leaf[leaf.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return largest * float((finite / largest).square().mean().sqrt()) if largest else 1.0


def _double(x: Any) -> Any:
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        return x
    x = x.detach().cpu() if x.device.type == "mps" else x.detach()
    return x.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
