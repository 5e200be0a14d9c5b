"""What is checked, in one form for layers and losses: a function of the leaves of params and x."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.keys import Key
from funcnet.layer import Layer, Tree
from funcnet.losses import Loss

Leaves = list[Tensor]
"""The leaves of params, then x; or the gradients with respect to them, in that order."""


@dataclass(frozen=True)
class Case:
    """A layer with everything that its functions take."""

    layer: Any
    params: Tree
    x: Tensor
    grad: Tensor
    key: Key | None = None

    @property
    def is_loss(self) -> bool:
        return False

    @property
    def leaves(self) -> Leaves:
        return [*optree.tree_leaves(self.params), self.x]

    @property
    def names(self) -> list[str]:
        """What each leaf is called in messages: `params[0]['weight']`, …, `x`."""
        accessors = optree.tree_accessors(self.params)
        return [*(accessor.codify("params") for accessor in accessors), "x"]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Every tensor that is handed in, by name."""
        return {**dict(zip(self.names, self.leaves, strict=True)), "grad": self.grad}

    def at(self, leaves: Sequence[Tensor], grad: Tensor | None = None) -> Case:
        """The same with other leaves, and another grad if one is given."""
        params = optree.tree_unflatten(optree.tree_structure(self.params), leaves[:-1])
        return replace(self, params=params, x=leaves[-1], grad=self.grad if grad is None else grad)

    def of(self, layer: Any) -> Case:
        """The same of another layer."""
        return replace(self, layer=layer)

    def double(self) -> Case:
        """A contiguous copy in float64, on the CPU where the device knows no float64."""
        return self.at([_double(leaf) for leaf in self.leaves], _double(self.grad))

    def fwd(self) -> tuple[Any, Any]:
        """(y, residuals)."""
        pair: tuple[Any, Any] = self.layer.fwd(self.params, self.x, key=self.key)
        return pair

    def apply(self) -> Tensor:
        y: Tensor = self.layer.apply(self.params, self.x, key=self.key)
        return y

    def bwd(self, residuals: Any, grad: Tensor | None = None, input_grad: bool = True) -> Any:
        """(dparams, dx), as the layer returns it."""
        grad = self.grad if grad is None else grad
        return self.layer.bwd(self.params, residuals, grad, input_grad=input_grad)

    def vjp(self, input_grad: bool = True) -> Any:
        """(dparams, dx), as the layer returns it."""
        return self.layer.vjp(self.params, self.x, self.grad, key=self.key, input_grad=input_grad)

    def gradients(self) -> Leaves:
        """The gradients with respect to `leaves`, by `vjp`."""
        return flat(self.vjp())

    def out_shape(self) -> tuple[int, ...]:
        """The shape that y should have."""
        return (*self.x.shape[:1], *self.layer.out_shape(tuple(self.x.shape[1:])))


@dataclass(frozen=True)
class LossCase(Case):
    """A loss, as a layer without parameters."""

    target: Any = None

    @property
    def is_loss(self) -> bool:
        return True

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"x": self.x, "target": self.target, "grad": self.grad}

    def double(self) -> Case:
        return replace(super().double(), target=_double(self.target))  # type: ignore[call-arg]

    def fwd(self) -> tuple[Any, Any]:
        pair: tuple[Any, Any] = self.layer.fwd(self.x, self.target)
        return pair

    def apply(self) -> Tensor:
        y: Tensor = self.layer.apply(self.x, self.target)
        return y

    def bwd(self, residuals: Any, grad: Tensor | None = None, input_grad: bool = True) -> Any:
        dx = self.layer.bwd(residuals, self.grad if grad is None else grad)
        return (), dx if input_grad else None

    def vjp(self, input_grad: bool = True) -> Any:
        dx = self.layer.vjp(self.x, self.target, self.grad)
        return (), dx if input_grad else None

    def out_shape(self) -> tuple[int, ...]:
        return ()


def make_case(
    layer: Layer | Loss, params: Any, x: Any, grad: Tensor | float | None, key: Key | None
) -> Case:
    """The case of `check_vjp(layer, params, x)` or `check_vjp(loss, x, target)`.

    Without a grad, one is drawn: signed, so that transposes and flips cannot cancel.
    """
    if isinstance(layer, Loss):
        x, target = params, x
        drawn = torch.as_tensor(-1.375 if grad is None else grad, device=x.device)
        drawn = drawn.detach().to(x.dtype)
        return LossCase(layer, (), x.detach(), drawn, None, target)
    params = optree.tree_map(lambda leaf: leaf.detach(), params)
    x = x.detach()
    if grad is None:
        y = layer.apply(params, x, key=key)
        grad = signed(y.shape, seed=1).to(dtype=x.dtype, device=x.device)
    return Case(layer, params, x, torch.as_tensor(grad, device=x.device).detach(), key)


def flat(gradients: Any) -> Leaves:
    """(dparams, dx) as a list."""
    dparams, dx = gradients
    return [*optree.tree_leaves(dparams), *([] if dx is None else [dx])]


def signed(shape: Sequence[int], seed: int) -> Tensor:
    """Numbers from N(0, 1) in float64 that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")


def scale_of(leaf: Tensor) -> float:
    """The root of the mean square of a leaf's finite entries; 1 if that is 0."""
    finite = leaf[leaf.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return largest * float((finite / largest).square().mean().sqrt()) if largest else 1.0


def _double(x: Any) -> Any:
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        return x
    x = x.detach().cpu() if x.device.type == "mps" else x.detach()
    return x.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
