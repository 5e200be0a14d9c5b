"""The gradient of each example: the gradients, their norms, and the sum of clipped ones.

A network whose layers treat every example alone is, for a batch, as many networks of one example
each. Its backward pass hands every layer dy of all examples at once. From that, the layer finds its
gradient for each, dWₙ, or only ‖dWₙ‖², which takes less (`Layer._bwd_each`, `ops/products.py`). The
squared norms of all parameters add up, and

    Σₙ gₙ·min(1, C/‖gₙ‖)

is one more backward pass, from dyₙ·min(1, C/‖gₙ‖). Lee and Kifer, "Scaling up differentially
private deep learning with fast per-example gradient clipping", PoPETs 2021.

Parameters that are used several times (`Loop`) have a sum of gradients. The squared norm of a sum
is not the sum of squared norms, so these are formed and added up before the norm is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import optree
import torch
from torch import Tensor

from funcnet.gradients import check_batch, check_net_and_loss, check_uncoupled
from funcnet.keys import Key
from funcnet.layer import Layer, Tree, writes
from funcnet.leaves import Ancestors, Watched, declares_none, joins, mapped, nothing_like
from funcnet.losses.loss import Loss
from funcnet.ops import products
from funcnet.ops.accumulation import accumulator_dtype
from funcnet.ops.need import Need
from funcnet.optimizers.norms import check_max_norm, clipping
from funcnet.running import dx_alone, run_bwd, run_fwd


def per_example(net: Layer, loss: Loss) -> PerExample:
    """The function (params, x, target, key=None) ↦ (values (N,), grads): the loss and the gradient
    of each example.

    The gradients are (N, …), in the tree of params. Entry i, of the values too, is what
    `value_and_grad` gives for `x[i:i+1]` and `target[i:i+1]`: with reduction "mean" a mean over
    that example alone. But with a key, dropout masks are those that `value_and_grad` draws for the
    whole batch. A layer of your own without `_bwd_each` runs once for each example, through
    `torch.func.vmap` where it can; with a key, its backward pass runs N times.

    Raises TypeError unless net is a Layer, loss a loss, and x and target are batches; ValueError,
    naming it, for a layer that couples examples (BatchNorm), and for another number of targets.

    >>> import funcnet as fn
    >>> net, loss = fn.Sequential(fn.Linear(8), fn.Tanh(), fn.Linear(3)), fn.CrossEntropy()
    >>> params, x = net.init(fn.key(0), (4,)), fn.normal(fn.key(1), (5, 4))
    >>> values, grads = fn.per_example(net, loss)(params, x, torch.tensor([0, 2, 1, 1, 0]))
    >>> values.shape, grads[0]["weight"].shape
    (torch.Size([5]), torch.Size([5, 8, 4]))
    """
    return PerExample(net, loss)


def gradient_norms(net: Layer, loss: Loss) -> GradientNorms:
    """The function (params, x, target, key=None) ↦ (values, norms) of each example, both (N,).

    Entry i of the norms is √(Σ g²) over all numbers of the gradient of example i, as `per_example`
    gives it; in float32 where that is in half precision. A layer with `_bwd_each` finds the norm of
    its part from factors of the gradient, or forms the gradients of a few examples at a time,
    whichever takes fewer multiplications. The gradients of the whole batch are formed at once for
    scales, biases and positional embeddings, for a `Loop`, whose gradients are sums over its turns,
    and for a layer without `_bwd_each`.

    Raises what `per_example` raises.

    >>> import funcnet as fn
    >>> net, loss = fn.Linear(1, bias=False), fn.MSE("sum")
    >>> params, x = {"weight": torch.tensor([[0.0, 0.0]])}, torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    >>> fn.gradient_norms(net, loss)(params, x, torch.tensor([[1.0], [2.0]]))  # g = −2·target·x
    (tensor([1., 4.]), tensor([10.,  4.]))
    """
    return GradientNorms(net, loss)


def clipped_value_and_grad(net: Layer, loss: Loss, max_norm: float) -> ClippedValueAndGrad:
    """The function (params, x, target, key=None) ↦ (values (N,), Σᵢ gᵢ·min(1, max_norm/‖gᵢ‖)).

    gᵢ is the gradient of example i, as `per_example` gives it, over all parameters together. The
    sum has the tree of params: what DP-SGD adds its noise to (`examples/private.py`). It takes a
    forward pass and two backward passes, one of them for the norms; no gᵢ is kept.

    Raises what `per_example` raises, TypeError unless max_norm is a number, ValueError unless it is
    ≥ 0; it may be infinite.
    Abadi et al., "Deep learning with differential privacy", CCS 2016.

    >>> import funcnet as fn
    >>> net, loss = fn.Linear(1, bias=False), fn.MSE("sum")
    >>> params, x = {"weight": torch.tensor([[0.0, 0.0]])}, torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    >>> _, total = fn.clipped_value_and_grad(net, loss, 5.0)(params, x, torch.tensor([[1.], [2.]]))
    >>> total  # 5/10 of (−6, −8), and (0, −4) as it is
    {'weight': tensor([[-3., -8.]])}
    """
    return ClippedValueAndGrad(net, loss, max_norm)


@dataclass(frozen=True)
class _OfExamples:
    net: Layer
    loss: Any

    _name: ClassVar[str]

    def __post_init__(self) -> None:
        check_net_and_loss(self._name, self.net, self.loss)
        check_uncoupled(self._name, self.net)

    def __repr__(self) -> str:
        arguments = (repr(getattr(self, f.name)) for f in fields(self))
        return f"{self._name}({', '.join(arguments)})"

    def _forward(self, params: Tree, x: Tensor, target: Any, key: Key | None) -> _Passes:
        check_batch(self._name, x, target)
        found = _Found()

        def watched(path: str, layer: Layer, ancestors: Ancestors) -> Layer:
            is_tied = any(joins(around) == "added" for around in ancestors)
            knows_how = writes(layer, "_bwd_each")
            return layer if declares_none(layer) else _Apart(layer, path, knows_how, is_tied, found)

        net = mapped(self.net, watched, lambda layer: joins(layer) is not None)
        y, residuals = net.fwd(params, x, key=key)
        values, dy = _values_and_dy(self.loss, y, target)
        return _Passes(net, params, residuals, values, dy, found)


@dataclass(frozen=True, repr=False)
class PerExample(_OfExamples):
    """A value that `per_example` makes."""

    _name = "per_example"

    def __call__(
        self, params: Tree, x: Tensor, target: Any, key: Key | None = None
    ) -> tuple[Tensor, Tree]:
        """(the loss of each example (N,), its gradients with an axis N in front)."""
        passes = self._forward(params, x, target, key)
        return passes.values, passes.gradients()


@dataclass(frozen=True, repr=False)
class GradientNorms(_OfExamples):
    """A value that `gradient_norms` makes."""

    _name = "gradient_norms"

    def __call__(
        self, params: Tree, x: Tensor, target: Any, key: Key | None = None
    ) -> tuple[Tensor, Tensor]:
        """(the loss of each example (N,), the norm of its gradient (N,))."""
        passes = self._forward(params, x, target, key)
        return passes.values, passes.norms(consume=True)


@dataclass(frozen=True, repr=False)
class ClippedValueAndGrad(_OfExamples):
    """A value that `clipped_value_and_grad` makes."""

    max_norm: float

    _name = "clipped_value_and_grad"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_max_norm(self._name, self.max_norm)

    def __call__(
        self, params: Tree, x: Tensor, target: Any, key: Key | None = None
    ) -> tuple[Tensor, Tree]:
        """(the loss of each example (N,), the sum of their clipped gradients)."""
        passes = self._forward(params, x, target, key)
        norms = passes.norms(consume=False)
        return passes.values, passes.sum(clipping(norms, self.max_norm))


# --- The passes


@dataclass
class _Found:
    """A note of what layers are to find in a backward pass, and of the squared norms they found."""

    wanted: Literal["gradients", "squares"] | None = None  # beyond what `_bwd` finds
    squares: list[Tensor] = field(default_factory=list)


@dataclass
class _Passes:
    """A finished forward pass, and the backward passes that may follow."""

    net: Layer
    params: Tree
    residuals: Any
    values: Tensor
    dy: Tensor
    found: _Found

    def gradients(self) -> Tree:
        """The gradients of each example, with an axis N in front."""
        dparams = self._backward("gradients", self.dy, consume=True)
        count = len(self.dy)

        def in_front(param: Tensor, each: Tensor) -> Tensor:
            if each.ndim == param.ndim:  # nothing depends on it
                return param.new_zeros((count, *param.shape))
            return each.movedim(-1, 0)

        return optree.tree_map(in_front, self.params, dparams)

    def norms(self, consume: bool) -> Tensor:
        """√(Σ g²) of each example, (N,)."""
        dparams = self._backward("squares", self.dy, consume)
        total = self.dy.new_zeros(len(self.dy), dtype=accumulator_dtype(self.dy.dtype))
        for squares in self.found.squares:
            total = total + squares.to(total)
        each = zip(optree.tree_leaves(dparams), optree.tree_leaves(self.params), strict=True)
        for one, param in each:
            if one.ndim > param.ndim and one.numel():  # added up over several runs
                total = total + products.squares(one.movedim(-1, 0)).to(total)
        return total.sqrt()

    def sum(self, weights: Tensor) -> Tree:
        """Σₙ weights[n]·gₙ."""
        dy = self.dy * weights.to(self.dy.dtype).reshape(-1, *(1,) * (self.dy.ndim - 1))
        return self._backward(None, dy, consume=True)

    def _backward(
        self, wanted: Literal["gradients", "squares"] | None, dy: Tensor, consume: bool
    ) -> Tree:
        self.found.wanted = wanted
        need = Need(params=True, input=False, consume=consume)
        return self.net._checked_bwd(self.params, self.residuals, dy, need)[0]


def _values_and_dy(loss: Any, y: Tensor, target: Any) -> tuple[Tensor, Tensor]:
    """The loss of each example, and its gradient with respect to y."""
    loss.fwd(y, target)  # to refuse what does not fit, before vmap hides values
    if not len(y):
        return y.new_zeros(0), torch.zeros_like(y)
    leaves, structure = optree.tree_flatten(target)

    def of_one(y: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        target = structure.unflatten([leaf[None] for leaf in leaves])
        value, residuals = loss.fwd(y[None], target)
        return value, loss.bwd(residuals)[0]

    values, dy = products.over_examples(of_one, y, *leaves)
    return values, dy


# --- A layer


@dataclass(frozen=True)
class _Apart(Watched):
    """A layer whose backward pass finds what is wanted of each example.

    Gradients have the axis N last, where adding and stacking (`Loop`, `Repeat`) do not touch it.
    """

    knows_how: bool
    is_tied: bool
    found: _Found = field(compare=False)

    def _fwd(self, params: Tree, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        y, kept = run_fwd(self.layer, params, x, key)
        return y, kept if self.knows_how else (kept, x, key)

    def _bwd(self, params: Tree, residuals: Any, dy: Tensor, need: Need) -> tuple[Tree, Any]:
        knows, wanted = self.knows_how, self.found.wanted
        kept = residuals if knows else residuals[0]
        if not (wanted and need.params and self.layer._learns(params)):
            return run_bwd(self.layer, params, kept, dy, need)
        if knows:
            dparams, dx = self.layer._bwd_each(params, kept, dy, need)
        else:
            _, x, key = residuals
            dparams = _one_by_one(self.layer, params, kept, x, key, dy)
            dx = dx_alone(self.layer, params, kept, dy, need)  # last, since it may free residuals
        leaves, structure = optree.tree_flatten(params)
        each: list[Any] = structure.flatten_up_to(dparams)
        if wanted == "squares" and not self.is_tied:
            self.found.squares += map(products.squares, each)
            return nothing_like(params), dx
        formed = [
            products.formed(one).to(leaf.dtype).movedim(0, -1)
            for one, leaf in zip(each, leaves, strict=True)
        ]
        return structure.unflatten(formed), dx


def _one_by_one(
    layer: Layer, params: Tree, kept: Any, x: Tensor, key: Key | None, dy: Tensor
) -> Tree:
    """The gradients of each example, from a layer's gradients of a batch."""
    if not len(x):
        return optree.tree_map(lambda leaf: leaf.new_empty((0, *leaf.shape)), params)
    structure = optree.tree_structure(params)

    def of_one(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        dparams = layer.vjp(params, x[None], dy[None], input_grad=False)[0]
        leaves: list[Any] = structure.flatten_up_to(dparams)
        return tuple(leaves)

    if key is None:
        return structure.unflatten(products.over_examples(of_one, x, dy))
    # Masks are those of the batch. The gradient is linear in dy.
    batch = torch.arange(len(x), device=dy.device).reshape(-1, *(1,) * (dy.ndim - 1))
    need, each = Need(params=True, input=False), []
    for i in range(len(x)):
        alone = torch.where(batch == i, dy, 0.0)
        dparams = run_bwd(layer, params, kept, alone, need)[0]
        each.append(structure.flatten_up_to(dparams))
    return structure.unflatten(map(torch.stack, zip(*each, strict=True)))
