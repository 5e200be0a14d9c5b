"""The optimiser: pure steps on parameter trees. A subclass writes little but its formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, TypeAlias, TypeVar

import optree
import torch
from torch import Tensor

from funcnet.checks import as_number, shown
from funcnet.fields import Hyperparameters, takes
from funcnet.layer import Tree
from funcnet.ops.accumulation import with_float64
from funcnet.ops.each import Each, Scalar, Tensors
from funcnet.optimizers.leaves import check_writable, flatten, flatten_like

if TYPE_CHECKING:
    from typing_extensions import Self

State = TypeVar("State")
PreparedStep: TypeAlias = Callable[[], "tuple[Tree, State]"]

RateByStep: TypeAlias = Callable[[int], float]
"""The learning rate as a function of the number of steps taken, which starts at 0."""


class _RateKind:
    def convert(self, owner: type, name: str, value: Any) -> Any:
        if callable(value) and not isinstance(value, type):
            return value
        try:
            return as_number(owner.__name__, name, value, 0.0)
        except TypeError:
            advice = f": {_PARAMS}" if isinstance(value, (tuple, list, dict)) else ""
            raise TypeError(
                f"{owner.__name__}: expected {name} to be a number or a function of the step "
                f"count, got {shown(value)}{advice}"
            ) from None


_PARAMS = "params belong to init and step"


Rate: TypeAlias = Annotated[float | RateByStep, _RateKind()]
"""A finite number ≥ 0, or a function of the number of steps taken."""


@dataclass(frozen=True)
class Optimizer(Hyperparameters, Generic[State]):
    """A pure function (params, grads, state) -> (params, state), described by hyperparameters.

    A subclass writes `init`, and `_prepare`, which checks everything that a step needs. A step
    raises what `_prepare` raises, before anything is changed: ValueError or TypeError for trees
    that do not match.

    >>> from dataclasses import dataclass
    >>> import funcnet as fn
    >>> import optree
    >>> import torch
    >>> @dataclass(frozen=True)
    ... class SignDescent(fn.Optimizer[tuple[()]]):
    ...     "p ← p − lr · sign(g), without a state."
    ...
    ...     lr: float
    ...
    ...     def init(self, params):
    ...         return ()
    ...
    ...     def _prepare(self, params, grads, state, write):
    ...         def moved(p, g):
    ...             new = p - self.lr * g.sign()
    ...             return p.copy_(new) if write else new
    ...
    ...         return lambda: (optree.tree_map(moved, params, grads), state)
    >>> SignDescent(0.25).step({"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}, ())
    ({'w': tensor([0.7500])}, ())
    """

    def __new__(cls, /, *arguments: Any, **named: Any) -> Self:
        if arguments and "lr" in named and not takes(cls, arguments, named):
            raise TypeError(f"{cls.__name__}: expected lr once, got it twice: {_PARAMS}")
        return super().__new__(cls, *arguments, **named)

    def init(self, params: Tree) -> State:
        """The state before the first step."""
        raise NotImplementedError(f"{type(self).__name__} writes no init")

    def step(self, params: Tree, grads: Tree, state: State) -> tuple[Tree, State]:
        """(new params, new state); nothing is written to what came in."""
        return self._prepare(params, grads, state, write=False)()

    @torch.no_grad()
    def step_(self, params: Tree, grads: Tree, state: State) -> tuple[Tree, State]:
        """(params, new state): `step`, written into the tensors of params and of the state."""
        return self._prepare(params, grads, state, write=True)()

    def _prepare(self, params: Tree, grads: Tree, state: State, write: bool) -> PreparedStep[State]:
        """The step as a function that raises nothing, and so leaves nothing half-done."""
        raise NotImplementedError(
            f"{type(self).__name__} writes no _prepare, which step and step_ call"
        )


@dataclass(frozen=True)
class Elementwise(Optimizer[State]):
    """An optimiser that treats every number of params alike, by a formula on lists of tensors.

    A subclass declares its field `lr: Rate`, its `_State` and what the state keeps, and writes the
    formula, `_update`. A state is a namedtuple: the number of steps taken, then a tree like params
    for each thing that `_kept` names, or () if these hyperparameters do not need it.
    """

    _State: ClassVar[Any]

    _treats_complex_as_pairs: ClassVar[bool] = False
    """Whether the formula is for real numbers, and is applied to real and imaginary parts."""

    def _kept(self) -> dict[str, bool]:
        """The name of each tree in the state, in order, and whether it is needed."""
        raise NotImplementedError(f"{type(self).__name__} writes no _kept")

    def _update(
        self, each: Each, lr: Scalar, n: Scalar, p: Tensors, g: Tensors, *kept: Tensors
    ) -> tuple[Tensors, ...]:
        """(p, *kept) after step number n: 1 is the first.

        A tree that is not needed is an empty list. n is an int, or a tensor where its value is not
        known.
        """
        raise NotImplementedError(f"{type(self).__name__} writes no _update")

    def init(self, params: Tree) -> State:
        """The state before the first step: no steps taken, and zeros."""
        ps, structure = flatten(self, "params", params)
        kept = [
            structure.unflatten([torch.zeros_like(p) for p in ps]) if needed else ()
            for needed in self._kept().values()
        ]
        state: State = self._State(torch.tensor(0, device="cpu"), *kept)
        return state

    def _prepare(self, params: Tree, grads: Tree, state: Any, write: bool) -> PreparedStep[State]:
        if not isinstance(state, self._State):
            raise TypeError(
                f"{self}: expected an {self._State.__name__}, as init makes it, got {shown(state)}"
            )
        ps, structure = flatten(self, "params", params)
        gs = flatten_like(self, "grads", grads, ps, structure)
        needs = self._kept()
        kept = [
            flatten_like(self, name, tree, ps, structure) if needed else _none(self, name, tree)
            for (name, needed), tree in zip(needs.items(), state[1:], strict=True)
        ]
        if write:
            check_writable(self, sum(kept, ps))
        count = _concrete(self, state.step)
        lr = self._lr(count)
        if isinstance(lr, float) and lr > _HELD_BY_ALL:
            _check_held(self, lr, ps)
        n = count + 1 if isinstance(count, int) else (count + 1).double()

        def step() -> tuple[Tree, State]:
            update = self._update_pairs if self._treats_complex_as_pairs else self._update
            new_ps, *new = update(Each(write), lr, n, ps, gs, *kept)
            trees = [
                structure.unflatten(leaves) if needed else ()
                for leaves, needed in zip(new, needs.values(), strict=True)
            ]
            new_state: State = self._State(state.step + 1, *trees)
            return params if write else structure.unflatten(new_ps), new_state

        return step

    def _update_pairs(
        self, each: Each, lr: Scalar, n: Scalar, ps: Tensors, gs: Tensors, *kept: Tensors
    ) -> tuple[Tensors, ...]:
        """`_update` of the real and imaginary parts of complex numbers."""
        if True not in [p.is_complex() for p in ps]:
            return self._update(each, lr, n, ps, gs, *kept)
        gs = [g.resolve_conj() for g in gs]  # autograd conjugates lazily
        new = self._update(each, lr, n, *([_as_pairs(x) for x in xs] for xs in (ps, gs, *kept)))
        return tuple([*map(_as_complex, xs, ps)] for xs in new)  # [] for a tree that is not needed

    def _lr(self: Any, count: int | Tensor) -> Scalar:  # Any: a subclass declares `lr`
        if not callable(self.lr):
            return float(self.lr)
        lr = self.lr(count)
        if not isinstance(lr, Tensor):
            as_number(type(self).__name__, "lr(step)", lr, 0.0)
            return float(lr)
        if lr.ndim:
            raise ValueError(f"{self}: expected lr(step) to be a scalar, got {tuple(lr.shape)}")
        return lr


def _none(who: object, name: str, tree: Any) -> Tensors:
    """No tensors. Raises ValueError for a tree with leaves, which would be lost."""
    if tree != () and optree.tree_leaves(tree):
        raise ValueError(f"{who}: expected no {name}, (), got {shown(tree)}")
    return []


def _concrete(who: object, step: Any) -> int | Tensor:
    """The number of steps, an int where it is known. Raises TypeError unless it is one number."""
    if not isinstance(step, (int, Tensor)) or (isinstance(step, Tensor) and step.ndim):
        got = f"shape {tuple(step.shape)}" if isinstance(step, Tensor) else type(step).__name__
        raise TypeError(f"{who}: expected state.step to be a scalar tensor, got {got}")
    if not torch.compiler.is_compiling():
        try:
            return int(step)
        except RuntimeError:  # torch.func.vmap over states
            pass
    # A rate that is computed from it may be in float64.
    return step if isinstance(step, int) else with_float64(step)


_HELD_BY_ALL = torch.finfo(torch.float16).max


def _check_held(who: object, lr: float, ps: Tensors) -> None:
    """Raise ValueError for a rate that overflows in the dtype of a parameter."""
    for p in ps:
        most = torch.finfo(p.dtype).max
        if lr > most:
            raise ValueError(f"{who}: expected a rate of at most {most:g} for {p.dtype}, got {lr}")


def _as_pairs(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _as_complex(x: Tensor, like: Tensor) -> Tensor:
    return torch.view_as_complex(x) if like.is_complex() else x
