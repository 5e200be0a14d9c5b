"""Optimisers: steps that map over parameter trees, any that `optree` accepts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor

from funcnet.checks import as_number
from funcnet.fields import Finite, Flag, Hyperparameters, NonNegative
from funcnet.layer import Tree
from funcnet.ops import inplace

Schedule: TypeAlias = Callable[[int], float]
"""The learning rate as a function of the number of steps taken, which starts at 0."""


class SGDState(NamedTuple):
    """What `SGD` carries from step to step: the number of steps taken, and the velocities."""

    step: Tensor
    momentum: Tree


@dataclass(frozen=True)
class SGD(Hyperparameters):
    """Stochastic gradient descent, step for step the numbers of `torch.optim.SGD`:

        g ← −g if maximize;  g ← g + weight_decay · p
        v ← g at the first step, then momentum · v + (1 − dampening) · g
        p ← p − lr · (g + momentum · v if nesterov, v if momentum ≠ 0, else g)

    `lr` is a number or a function of the number of steps taken, an int that starts at 0 (a
    0-dimensional tensor where it is not known: under torch.func.vmap over states, and under
    torch.compile). The step is pure and differentiable; `step_` writes into the tensors of params
    and of the velocities instead, and returns them.

    Raises ValueError or TypeError for numbers out of range (NaN is), and, before anything is
    changed, for trees that do not match.
    https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html

    >>> sgd = SGD(0.1, momentum=0.9)
    >>> params = {"weight": torch.tensor([1.0])}
    >>> state = sgd.init(params)
    >>> params, state = sgd.step(params, {"weight": torch.tensor([2.0])}, state)
    >>> params, int(state.step)
    ({'weight': tensor([0.8000])}, 1)
    """

    lr: float | Schedule
    momentum: NonNegative = 0.0
    dampening: Finite = 0.0
    weight_decay: NonNegative = 0.0
    nesterov: Flag = False
    maximize: Flag = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.lr):
            as_number("SGD", "lr", self.lr, 0.0)
        if self.nesterov and not (self.momentum > 0 and self.dampening == 0):
            raise ValueError(
                "SGD: expected momentum > 0 and dampening 0 with nesterov=True, "
                f"got momentum={self.momentum}, dampening={self.dampening}"
            )

    def init(self, params: Tree) -> SGDState:
        """No steps taken, all velocities 0 (none are kept without momentum)."""
        self._flatten(params)
        velocities = optree.tree_map(torch.zeros_like, params) if self.momentum else ()
        return SGDState(torch.zeros((), dtype=torch.int64, device="cpu"), velocities)

    def step(self, params: Tree, grads: Tree, state: SGDState) -> tuple[Tree, SGDState]:
        """(new params, new state); nothing is written to what came in."""
        return self._step(params, grads, state, write=False)

    @torch.no_grad()
    def step_(self, params: Tree, grads: Tree, state: SGDState) -> tuple[Tree, SGDState]:
        """(params, new state): `step`, written into the tensors of params and of the velocities."""
        return self._step(params, grads, state, write=True)

    def _step(
        self, params: Tree, grads: Tree, state: SGDState, write: bool
    ) -> tuple[Tree, SGDState]:
        if not isinstance(state, SGDState):
            raise TypeError(f"{self}: expected an SGDState, as init makes it, got {state!r:.80}")
        ps, structure = self._flatten(params)
        gs = self._leaves("grads", grads, ps, structure)
        vs = self._leaves("velocities", state.momentum, ps, structure) if self.momentum else ps
        if write:
            self._check_writable(ps + vs if self.momentum else ps)
        count = _concrete(state.step)
        ps, vs = self._update(ps, gs, vs, self._lr(count), count, write)
        velocities = structure.unflatten(vs) if self.momentum else ()
        return params if write else structure.unflatten(ps), SGDState(state.step + 1, velocities)

    def _update(
        self,
        ps: list[Tensor],
        gs: list[Tensor],
        vs: list[Tensor],
        lr: float | Tensor,
        count: int | Tensor,
        write: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(ps, vs) after the step."""
        if self.maximize:
            gs = [-g for g in gs]
        if self.weight_decay:
            gs = _add(gs, ps, self.weight_decay, write=False)
        if self.momentum:
            vs = [v.mul_(self.momentum) if write else v * self.momentum for v in vs]
            vs = _add(vs, gs, self._share_of_gradient(count), write)
            gs = _add(gs, vs, self.momentum, write=False) if self.nesterov else vs
        return _add(ps, gs, -lr, write), vs

    def _share_of_gradient(self, count: int | Tensor) -> float | Tensor:
        """1 − dampening, but 1 at the first step."""
        if not self.dampening:
            return 1.0
        if isinstance(count, int):
            return 1.0 if count == 0 else 1.0 - self.dampening
        return 1.0 - self.dampening * (count > 0).double()

    def _lr(self, count: int | Tensor) -> float | Tensor:
        lr = self.lr(count) if callable(self.lr) else self.lr  # type: ignore[arg-type]
        if not isinstance(lr, Tensor):
            as_number("SGD", "lr(step)", lr, 0.0)
            return float(lr)
        if lr.ndim:
            raise ValueError(f"{self}: expected lr(step) to be a scalar, got {tuple(lr.shape)}")
        return lr

    def _flatten(self, params: Tree) -> tuple[list[Tensor], optree.PyTreeSpec]:
        """The leaves of params, which must be what has a gradient, and their structure."""
        ps, structure = optree.tree_flatten(params)
        for i, p in enumerate(ps):
            if not isinstance(p, Tensor) or not (p.is_floating_point() or p.is_complex()):
                raise TypeError(
                    f"{self}: expected floating-point tensors, got "
                    f"{p.dtype if isinstance(p, Tensor) else type(p).__name__} at "
                    f"{structure.accessors()[i].codify('params')}"
                )
        return ps, structure

    def _leaves(
        self, name: str, tree: Tree, ps: list[Tensor], structure: optree.PyTreeSpec
    ) -> list[Tensor]:
        """The leaves of a tree that must match params."""
        try:
            leaves: list[Any] = structure.flatten_up_to(tree)
        except ValueError:
            other = optree.tree_structure(tree)
            raise ValueError(
                f"{self}: expected {name} with the structure of params, {structure}, got {other}"
            ) from None
        for i, (leaf, p) in enumerate(zip(leaves, ps, strict=True)):
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"{self}: expected a tensor at {structure.accessors()[i].codify(name)}, "
                    f"got {type(leaf).__name__}"
                )
            if leaf.shape != p.shape or leaf.dtype != p.dtype or leaf.device != p.device:
                raise ValueError(
                    f"{self}: expected {structure.accessors()[i].codify(name)} like params, "
                    f"{_describe(p)}, got {_describe(leaf)}"
                )
        return leaves

    def _check_writable(self, tensors: list[Tensor]) -> None:
        may_ask = not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled()
        for tensor in tensors:
            if _overlaps_itself(tensor):
                raise ValueError(
                    f"{self}: expected tensors that can be written to, got an expanded one of "
                    f"shape {tuple(tensor.shape)} and stride {tensor.stride()}"
                )
            if may_ask and tensor.is_inference():
                raise ValueError(
                    f"{self}: expected tensors that can be written to, got one of shape "
                    f"{tuple(tensor.shape)} made in inference mode"
                )


def _add(xs: list[Tensor], ys: list[Tensor], alpha: float | Tensor, write: bool) -> list[Tensor]:
    """x + alpha · y of each x and y, into x if `write`."""
    if isinstance(alpha, Tensor):
        ys, alpha = [alpha.to(y.dtype) * y for y in ys], 1.0
    if not (xs and inplace.is_plain()):  # torch.func.vmap has no rule for lists of tensors
        pairs = zip(xs, ys, strict=True)
        return [x.add_(y, alpha=alpha) if write else x.add(y, alpha=alpha) for x, y in pairs]
    if not write:
        return list(torch._foreach_add(xs, ys, alpha=alpha))
    torch._foreach_add_(xs, ys, alpha=alpha)
    return xs


def _overlaps_itself(x: Tensor) -> bool:
    """Whether x is expanded. The stride of an axis of size 1 may be anything."""
    if 0 not in x.stride() or x.numel() < 2:
        return False
    return any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True))


def _concrete(step: Tensor) -> int | Tensor:
    """The number of steps as an int, if it is one number that is known."""
    if torch.compiler.is_compiling():
        return step
    try:
        return int(step)
    except RuntimeError:  # torch.func.vmap over states
        return step


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"
