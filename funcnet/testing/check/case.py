"""The case under check: layers and losses alike are a function of the leaves of params and x."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import optree
import torch
from torch import Tensor

from funcnet.checks import PromiseError, name_of
from funcnet.keys import Key
from funcnet.layer import Layer, Tree
from funcnet.losses import Loss
from funcnet.ops.accumulation import in_float64, with_float64
from funcnet.testing.errors import GradientMismatch

if TYPE_CHECKING:
    from typing_extensions import Self

_Result = TypeVar("_Result")

Leaves = list[Tensor]
"""The leaves of params, then those of x; or their gradients, in that order."""


@dataclass(frozen=True)
class Case:
    """A layer with the arguments of its functions. Its methods return what the layer returns.

    x is a tensor, or a tree of tensors for a layer of several. Leaves of integers and bools are
    never moved, and their gradients are None, here zeros.
    """

    layer: Any
    params: Tree
    x: Any
    grad: Tensor
    key: Key | None = None
    known: Tensor | None = None
    """Where y counts, if not everywhere: elsewhere it is 0."""

    is_loss: ClassVar[bool] = False

    @property
    def is_autograds(self) -> bool:
        """Whether every derivative in it is torch's own."""
        return False

    @property
    def _trees(self) -> Any:
        return self.params, self.x

    @property
    def leaves(self) -> Leaves:
        return optree.tree_leaves(self._trees)

    @property
    def names(self) -> list[str]:
        """The name of each leaf in messages: `params[0]['weight']`, …, `x`."""
        return [*named_leaves(params=self.params, x=self.x)]

    @property
    def first_of_x(self) -> int:
        """The position of x's first leaf among `leaves`."""
        return len(optree.tree_leaves(self.params))

    @property
    def frozen(self) -> list[Tensor]:
        """A mask for each leaf: True where the gradient is 0 on purpose, though y depends on it."""
        leaves = self.leaves
        masks = [torch.zeros(leaf.shape, dtype=torch.bool, device=leaf.device) for leaf in leaves]
        try:
            frozen = self.layer._frozen_params(self.params)
        except Exception:  # a layer of one's own may keep its params in any way
            return masks
        for entry, index in frozen:
            for leaf, mask in zip(leaves, masks, strict=True):
                if leaf is entry:
                    mask[index] = True
        return masks

    @property
    def inputs(self) -> dict[str, Any]:
        """Every tensor among the arguments, by name. A layer may have put other things there."""
        named = dict(zip(self.names, self.leaves, strict=True))
        return {**tensors_of(named), "grad": self.grad}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that is checked: y's, and so grad's."""
        return self.grad.dtype

    @property
    def batch(self) -> int | None:
        """The number of examples; None for a loss, or where x's leaves or y disagree about it."""
        leaves = optree.tree_leaves(self.x)
        if not isinstance(self.x, Tensor):
            leaves.append(self.grad)  # a graph may have as many edges as nodes
        counts = {len(leaf) if leaf.ndim else None for leaf in leaves}
        return counts.pop() if len(counts) == 1 and not self.is_loss else None

    def at(self, leaves: Sequence[Tensor], grad: Tensor | None = None) -> Self:
        """The same case with other leaves, and another grad if given."""
        params, x = optree.tree_structure(self._trees).unflatten(leaves)
        return replace(self, params=params, x=x, grad=self.grad if grad is None else grad)

    def with_leaves(self, change: Callable[[Tensor], Tensor], grad: Tensor | None = None) -> Self:
        """The same case with every leaf changed, and another grad if given."""
        return self.at([change(leaf) for leaf in self.leaves], grad)

    def along(self, direction: Sequence[Tensor | None], h: float = 1.0) -> Self:
        """The same case at a step h along a direction: a tensor for each leaf, None if it stays."""
        pairs = zip(self.leaves, direction, strict=True)
        return self.at([leaf if v is None else leaf + h * v for leaf, v in pairs])

    def drawn(self, trial: int) -> Self:
        """The same case at random numbers."""
        return self.at([unlike(leaf, 100 * trial + i) for i, leaf in enumerate(self.leaves)])

    def with_leaf(self, i: int, leaf: Tensor) -> Self:
        """The same case with another leaf in the place of one."""
        leaves = self.leaves
        return self.at([*leaves[:i], leaf, *leaves[i + 1 :]])

    def with_x(self, change: Callable[[Tensor], Tensor], grad: Tensor | None = None) -> Self:
        """The same case with every leaf of x changed, and another grad if given."""
        x = optree.tree_map(change, self.x)
        return replace(self, x=x, grad=self.grad if grad is None else grad)

    def where(self, known: Tensor) -> Self:
        """The case as far as y is finite: no step can resolve the rest."""
        return replace(self, known=known, grad=torch.where(known, self.grad, 0))

    def double(self) -> Self:
        """A contiguous copy in float64, on the CPU if the device has no float64."""
        return self._changed(_double)

    def to(self, dtype: torch.dtype) -> Self:
        """The case with all floating-point tensors in a dtype."""
        return self._changed(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        return self.with_leaves(change, change(self.grad))

    def fwd(self) -> Any:
        return self.layer.fwd(self.params, self.x, key=self.key)

    def apply(self) -> Tensor:
        return self._among_known(self._apply())

    def reference(self) -> Tensor:
        """y by what autograd is asked to follow."""
        return self._among_known(self._reference())

    def _apply(self) -> Tensor:
        y: Tensor = self.layer.apply(self.params, self.x, key=self.key)
        return y

    def _reference(self) -> Tensor:
        return self._apply()

    def _among_known(self, y: Tensor) -> Tensor:
        # A function's y may have another shape beside the case.
        if self.known is None or y.shape != self.known.shape:
            return y
        return torch.where(self.known, y, 0)

    def bwd(self, residuals: Any, **need: bool) -> Any:
        """`need` holds `input_grad` and `param_grad`; only the first is passed if not given."""
        need = {"input_grad": True, **need}
        return self.layer.bwd(self.params, residuals, self.grad, **need)

    def vjp(self, **need: bool) -> Any:
        """`need` as for `bwd`."""
        need = {"input_grad": True, **need}
        return self.layer.vjp(self.params, self.x, self.grad, key=self.key, **need)

    def value(self) -> Leaves:
        """y, as a list of one."""
        return [self.apply()]

    def gradients(self) -> Leaves:
        """The gradients of `leaves`, by `vjp`."""
        return self.flat(self.vjp())

    def flat(self, gradients: Any) -> Leaves:
        """(dparams, dx) as a list; zeros for None of integers.

        Raises ValueError for a gradient that has another tree than what it is the gradient of.
        """
        dparams, dx = gradients
        return [*leaves_like(self.params, dparams), *leaves_like(self.x, dx)]


def leaves_like(of: Tree, tree: Any) -> Leaves:
    """The leaves of a tree of gradients, in the order of those of `of`; zeros for None of integers.

    Raises ValueError if the trees differ.
    """
    leaves, structure = optree.tree_flatten(of)
    without_gradient = leaves and not any(leaf.is_floating_point() for leaf in leaves)
    found: list[Any] = (
        [None] * len(leaves) if tree is None and without_gradient else structure.flatten_up_to(tree)
    )
    return [
        gradient if leaf.is_floating_point() else _of_integers(leaf, gradient)
        for leaf, gradient in zip(leaves, found, strict=True)
    ]


def _of_integers(leaf: Tensor, gradient: Any) -> Any:
    if gradient is None:
        return with_float64(leaf).new_zeros(leaf.shape, dtype=torch.float64)
    # Bools, as torch.zeros_like(leaf) has them, cannot be subtracted.
    is_bool = isinstance(gradient, Tensor) and gradient.dtype == torch.bool
    return in_float64(gradient) if is_bool else gradient


@dataclass(frozen=True, kw_only=True)
class LossCase(Case):
    """A loss, as a layer without parameters. Its target, any tree, is never moved."""

    target: Any
    is_loss: ClassVar[bool] = True

    @property
    def inputs(self) -> dict[str, Any]:
        return {"x": self.x, **tensors_of(named_leaves(target=self.target)), "grad": self.grad}

    def with_target(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same case with another target: each tensor in it changed."""
        return replace(
            self,
            target=optree.tree_map(
                lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, self.target
            ),
        )

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        return super()._changed(change).with_target(change)

    def fwd(self) -> Any:
        return self.layer.fwd(self.x, self.target)

    def _apply(self) -> Tensor:
        y: Tensor = self.layer.apply(self.x, self.target)
        return y

    def bwd(self, residuals: Any, **need: bool) -> Any:
        return (), self.layer.bwd(residuals, self.grad)

    def vjp(self, **need: bool) -> Any:
        return (), self.layer.vjp(self.x, self.target, self.grad)


def make_case(
    layer: Layer | Loss, params: Any, x: Any, grad: Tensor | float | None, key: Key | None
) -> Case:
    """The case of `check_vjp(layer, params, x)` or `check_vjp(loss, x, target)`.

    A missing grad is drawn with both signs, so that transposes and flips cannot cancel. The first
    call is one at other numbers: what is kept from it must not serve the case. Calls here get
    copies: what a layer writes over its input has to show later.
    """
    if isinstance(layer, Loss):
        x, target = params, x
        tried(lambda: layer.vjp(unlike(x.detach()), _copied(target)))
        drawn = torch.as_tensor(-1.375 if grad is None else grad, device=x.device)
        return LossCase(layer, (), x.detach(), drawn.detach().to(x.dtype), target=target)
    params, x = (optree.tree_map(lambda leaf: leaf.detach(), tree) for tree in (params, x))
    leaves = [*optree.tree_leaves(x), *optree.tree_leaves(params)]
    tried(lambda: _first_call(layer, params, x, key))
    like = next((leaf for leaf in leaves if leaf.is_floating_point()), None)
    if grad is None:
        try:
            y = layer.apply(_copied(params), _copied(x), key=key)
        except PromiseError as error:
            if error.y is None:
                raise GradientMismatch(str(error)) from None
            y = error.y  # the check will say what is wrong with it
        if not isinstance(y, Tensor):
            raise GradientMismatch(
                f"{name_of(layer)}: apply: expected y to be a tensor, got {kind_of(y)}"
            )
        grad = signed(y.shape, seed=1).to(y if like is None else like)
    dtype = None if like is None else like.dtype
    grad = torch.as_tensor(grad, dtype=dtype, device=leaves[0].device).detach()
    return Case(layer, params, x, grad, key)


def _first_call(layer: Layer, params: Any, x: Any, key: Key | None) -> None:
    params, x = (optree.tree_map(unlike, tree) for tree in (params, x))
    y, residuals = layer.fwd(params, x, key=key)
    layer.bwd(params, residuals, torch.ones_like(y))


def expect_real_and_dense(what: str, x: Tensor) -> None:
    """Raise TypeError for numbers and memory that no check is made for. `what` is named."""
    if x.is_complex():
        raise TypeError(f"{what} of real numbers, got {x.dtype}")
    if x.layout != torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else x.layout
        raise TypeError(f"{what} of dense tensors, got {kind}")


def named_leaves(**trees: Any) -> dict[str, Any]:
    """The leaves of trees, each by the code that leads to it: `params[0]['weight']`."""
    named: dict[str, Any] = {}
    for name, tree in trees.items():
        accessors, leaves, _ = optree.tree_flatten_with_accessor(tree)
        named.update(zip((a.codify(name) for a in accessors), leaves, strict=True))
    return named


def tensors_of(named: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def tried(call: Callable[[], _Result]) -> _Result | None:
    """Return `call()`, None where the layer refuses: it may be undefined beside x."""
    try:
        return call()
    except Exception:  # a layer may refuse its input by any exception
        return None


def tried_y(case: Case) -> Tensor | None:
    """y, None where the layer refuses, or where y has another shape than grad."""
    y = tried(case.apply)
    return y if isinstance(y, Tensor) and y.shape == case.grad.shape else None


def kind_of(value: Any) -> str:
    """A value's kind in messages."""
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return "None" if value is None else type(value).__name__


def signed(shape: Sequence[int], seed: int) -> Tensor:
    """Draw from N(0, 1) in float64, by the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")


def scale_of(leaf: Tensor) -> float:
    """The root mean square of a leaf's finite entries; 1 if that is 0."""
    finite = leaf[leaf.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return largest * float((finite / largest).square().mean().sqrt()) if largest else 1.0


def drawn_like(leaf: Tensor, seed: int) -> Tensor:
    """Draw numbers about as large as a leaf's, by the seed alone."""
    return signed(leaf.shape, seed).to(leaf) * scale_of(leaf)


def unlike(leaf: Tensor, seed: int = 11) -> Tensor:
    """Draw other numbers, with other signs. Integers and bools stay."""
    return drawn_like(leaf, seed) if leaf.is_floating_point() else leaf.clone()


def other_numbers(leaf: Tensor) -> Tensor:
    """Change the numbers but not their signs, so that the layer is likely defined there too."""
    if not leaf.is_floating_point():
        return leaf.clone()
    return leaf * (1 + signed(leaf.shape, 5).clamp(-3, 3).to(leaf) / 16)


def of_other_examples(leaf: Tensor) -> Tensor:
    """Hand integers and bools to the next example: others might be out of a layer's range."""
    return leaf if leaf.is_floating_point() or not leaf.ndim else leaf.roll(1, 0)


def other_mask(leaf: Tensor) -> Tensor:
    """Move bools to other places. Other leaves stay: a kernel may index memory by integers."""
    return leaf.roll(1) if leaf.dtype == torch.bool else leaf


def _copied(tree: Any) -> Any:
    return optree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def _double(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    x = with_float64(x.detach())
    return x.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
