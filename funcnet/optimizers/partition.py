"""Different optimisers for different leaves of one tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeAlias

from torch import Tensor

from funcnet.checks import is_items, shown
from funcnet.layer import Tree
from funcnet.ops.trees import flatten
from funcnet.optimizers.leaves import flatten_up_to, leaf_names_of
from funcnet.optimizers.optimizer import Optimizer, PreparedStep
from funcnet.position import Position

Label: TypeAlias = Callable[[str, Tensor], str]
"""A function (path, leaf) -> name."""

Named: TypeAlias = dict[str, Any]
"""Leaves by path."""


class PartitionState(NamedTuple):
    """The state of `Partition`: by name, the state of each part's optimiser."""

    parts: dict[str, Any]


class _LabelKind:
    def convert(self, owner: type, name: str, value: Any) -> Any:
        if not callable(value):
            raise TypeError(
                f"{owner.__name__}: expected {name} to be a function (path, leaf) -> name, "
                f"got {shown(value)}"
            )
        return value


class _PartsKind:
    """A dict, kept as a sorted tuple of its items, which can be hashed."""

    def convert(self, owner: type, name: str, value: Any) -> tuple[tuple[str, Any], ...]:
        if not is_items(value):
            raise TypeError(
                f"{owner.__name__}: expected a dict of optimisers by name, got {shown(value)}"
            )
        parts = dict(value)
        for key, optimizer in parts.items():
            if not isinstance(key, str):
                raise TypeError(f"{owner.__name__}: expected names that are str, got {key!r}")
            if not (optimizer is None or isinstance(optimizer, Optimizer)):
                raise TypeError(
                    f"{owner.__name__}: expected an optimiser or None for {key!r}, "
                    f"got {shown(optimizer)}"
                )
        return tuple((key, parts[key]) for key in sorted(parts))


@dataclass(frozen=True, repr=False)
class Partition(Optimizer[PartitionState]):
    """An optimiser for each part of a tree; `label(path, leaf)` names the part that has the leaf.

    A path is a leaf's name in files, such as "2.weight" (`funcnet.tree`). A part whose optimiser is
    None is frozen: its leaves come back as they are, its gradients may be anything, and no time is
    spent on them. Every other part's optimiser is handed dicts of leaves by path. A Partition among
    the parts labels by the same paths.

    Raises TypeError for a part that is neither an optimiser nor None. Before anything is changed,
    raises ValueError for a label that is not a name of a part, and what the parts raise.

    >>> import funcnet as fn, torch
    >>> net = fn.Sequential(fn.Conv2d(4, 3), fn.ReLU(), fn.Conv2d(4, 3))
    >>> params = net.init(fn.key(0), (1, 8, 8))
    >>> def label(path, leaf):
    ...     if path.startswith("0."):
    ...         return "frozen"
    ...     return "decay" if leaf.ndim > 1 else "plain"
    >>> optimizer = fn.Partition(
    ...     label, {"decay": fn.AdamW(), "plain": fn.AdamW(weight_decay=0.0), "frozen": None}
    ... )
    >>> state = optimizer.init(params)
    >>> {name: list(part.first) for name, part in state.parts.items()}
    {'decay': ['2.weight'], 'plain': ['2.bias']}
    """

    label: Annotated[Label, _LabelKind()]
    optimizers: Annotated[Mapping[str, Any] | tuple[tuple[str, Any], ...], _PartsKind()]

    def __repr__(self) -> str:
        return f"Partition({self.label!r}, {dict(self.optimizers)!r})"

    def init(self, params: Tree) -> PartitionState:
        """The parts' states before the first step."""
        leaves, structure = flatten(params)
        return self._init_parts(dict(zip(leaf_names_of(structure), leaves, strict=True)))

    def _init_parts(self, params: Named) -> PartitionState:
        parts, states, active = self._parts(params), {}, self._active()
        with Position(tuple(name for name, _ in active)) as at:
            for at.i, (name, optimizer) in enumerate(active):
                states[name] = _init(optimizer, parts[name])
        return PartitionState(states)

    def _prepare(
        self, params: Tree, grads: Tree, state: Any, write: bool
    ) -> PreparedStep[PartitionState]:
        leaves, structure = flatten(params)
        gs = flatten_up_to("Partition", "grads", grads, structure)
        names = leaf_names_of(structure)
        step_of_parts = self._prepare_parts(
            dict(zip(names, leaves, strict=True)), dict(zip(names, gs, strict=True)), state, write
        )

        def step() -> tuple[Tree, PartitionState]:
            new, new_state = step_of_parts()
            return params if write else structure.unflatten(new.values()), new_state

        return step

    def _prepare_parts(
        self, params: Named, grads: Named, state: Any, write: bool
    ) -> PreparedStep[PartitionState]:
        """The step on a dict of leaves by path; the new dict has the same order."""
        names = [name for name, _ in self._active()]
        if not isinstance(state, PartitionState) or sorted(state.parts) != names:
            is_state = isinstance(state, PartitionState)
            got = f"one of {sorted(state.parts)}" if is_state else shown(state)
            raise TypeError(
                f"Partition: expected a PartitionState of {names}, as init makes it, got {got}"
            )
        parts = self._parts(params)
        steps = {}
        with Position(tuple(names)) as at:
            for at.i, (name, optimizer) in enumerate(self._active()):
                part, own = parts[name], state.parts[name]
                of_part = {path: grads[path] for path in part}
                steps[name] = _prepare(optimizer, part, of_part, own, write)

        def step() -> tuple[Named, PartitionState]:
            new, states = dict(params), {}
            for name, step_of_part in steps.items():
                part, states[name] = step_of_part()
                new.update(part)
            return new, PartitionState(states)

        return step

    def _active(self) -> list[tuple[str, Optimizer[Any]]]:
        """The names and optimisers of the parts that are not frozen."""
        parts: Any = self.optimizers
        return [(name, optimizer) for name, optimizer in parts if optimizer is not None]

    def _parts(self, params: Named) -> dict[str, Named]:
        """The leaves of each part, by name."""
        parts: dict[str, Named] = {name: {} for name in dict(self.optimizers)}
        for path, leaf in params.items():
            name = self.label(path, leaf)
            if not isinstance(name, str) or name not in parts:
                raise ValueError(
                    f"Partition: expected label({path!r}, leaf) to be one of {[*parts]}, "
                    f"got {shown(name)}"
                )
            parts[name][path] = leaf
        return parts


# The keys of a part are paths in the whole tree, so that a Partition inside labels by the same.


def _init(optimizer: Optimizer[Any], part: Named) -> Any:
    if isinstance(optimizer, Partition):
        return optimizer._init_parts(part)
    return optimizer.init(part)


def _prepare(
    optimizer: Optimizer[Any], part: Named, grads: Named, state: Any, write: bool
) -> PreparedStep[Any]:
    if isinstance(optimizer, Partition):
        return optimizer._prepare_parts(part, grads, state, write)
    return optimizer._prepare(part, grads, state, write)
