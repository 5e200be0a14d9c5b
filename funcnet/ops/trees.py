"""Trees by optree, in ways that torch.compile can follow.

It cannot follow a dict without leaves: `{"act": ()}`, the parameters of layers that have none.
While it compiles, a container without leaves counts as a leaf, which is kept as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import optree
import torch


class Compiled:
    """The structure of a tree that is compiled: optree's, and what counts as its leaves."""

    def __init__(self, spec: optree.PyTreeSpec, nodes: list[Any]) -> None:
        self.spec = spec
        self.nodes = nodes

    def unflatten(self, leaves: Iterable[Any]) -> Any:
        rest = iter(leaves)
        return self.spec.unflatten([n if _is_bare(n) else next(rest) for n in self.nodes])

    def flatten_up_to(self, tree: Any) -> list[Any]:
        return self.of_leaves(self.spec.flatten_up_to(tree))

    def accessors(self) -> list[optree.PyTreeAccessor]:
        return self.of_leaves(self.spec.accessors())

    def paths(self) -> list[tuple[Any, ...]]:
        return self.of_leaves(self.spec.paths())

    def of_leaves(self, values: Iterable[Any]) -> list[Any]:
        """The values of the leaves, given one value for each node."""
        pairs = zip(values, self.nodes, strict=True)
        return [value for value, node in pairs if not _is_bare(node)]


def flatten(tree: Any) -> tuple[list[Any], optree.PyTreeSpec]:
    """The leaves of a tree and its structure."""
    if not torch.compiler.is_compiling():
        return optree.tree_flatten(tree)
    nodes, spec = optree.tree_flatten(tree, is_leaf=_is_bare)
    compiled: Any = Compiled(spec, nodes)  # which has the methods that funcnet uses
    return compiled.of_leaves(nodes), compiled


def structure_of(tree: Any) -> optree.PyTreeSpec:
    """The structure of a tree."""
    return flatten(tree)[1]


def _is_bare(node: Any) -> bool:
    """Whether a node has no leaves: None, or a container of nothing else."""
    children = node.values() if isinstance(node, dict) else node
    return children is None or (
        isinstance(node, (dict, tuple, list)) and all(_is_bare(child) for child in children)
    )
