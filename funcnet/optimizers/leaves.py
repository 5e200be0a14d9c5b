"""The leaves of trees that optimisers map over. Bad trees are refused before anything is changed.

A message starts with `who`, an optimiser or a function's name.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.checks import some
from funcnet.layer import Tree
from funcnet.ops import trees
from funcnet.ops.inplace import is_expanded
from funcnet.tree import leaf_names


def flatten(who: object, name: str, tree: Tree) -> tuple[list[Tensor], optree.PyTreeSpec]:
    """The leaves of a tree and its structure. Raises TypeError unless all can be updated."""
    leaves, structure = trees.flatten(tree)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            got = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            place = _place(structure, i, name)
            raise TypeError(f"{who}: expected floating-point tensors, got {got} at {place}")
        if leaf.layout is not torch.strided:
            place = _place(structure, i, name)
            raise TypeError(f"{who}: expected dense tensors, got {leaf.layout} at {place}")
    return leaves, structure


def flatten_up_to(who: object, name: str, tree: Tree, structure: optree.PyTreeSpec) -> list[Any]:
    """The parts of a tree where params have leaves. Raises ValueError for another structure."""
    try:
        return structure.flatten_up_to(tree)
    except ValueError:
        got = _difference(leaf_names_of(structure), leaf_names(optree.tree_structure(tree)))
        raise ValueError(
            f"{who}: expected {name} with the structure of params, got {got}"
        ) from None


def _difference(ours: list[str], theirs: list[str]) -> str:
    """`none at 0.bias, more at 0.scale`: how the leaves of two trees differ."""
    known, given = set(ours), set(theirs)
    missing = [name for name in ours if name not in given]
    more = [name for name in theirs if name not in known]
    parts = [
        f"{what} at {some(map(repr, at))}" for what, at in (("none", missing), ("more", more)) if at
    ]
    return ", ".join(parts) or "other containers"


def leaf_names_of(structure: Any) -> list[str]:
    """The names of the leaves of a structure that `flatten` returned."""
    if isinstance(structure, trees.Compiled):
        return structure.of_leaves(leaf_names(structure.spec))
    try:
        return _remembered_names(structure)
    except TypeError:  # a user's node may hold something without a hash
        return leaf_names(structure)


# Finding the names takes half as long as a step of small tensors.
_remembered_names = lru_cache(maxsize=64)(leaf_names)


def flatten_like(
    who: object,
    name: str,
    tree: Tree,
    ps: list[Tensor],
    structure: optree.PyTreeSpec,
    *,
    any_dtype: bool = False,
) -> list[Tensor]:
    """The leaves of a tree that must match params, whose leaves are ps.

    Raises ValueError or TypeError for another structure, shape, device or dtype.
    """
    leaves = flatten_up_to(who, name, tree, structure)
    for i, leaf, p in zip(range(len(ps)), leaves, ps, strict=True):
        if not isinstance(leaf, Tensor):
            place, got = _place(structure, i, name), type(leaf).__name__
            raise TypeError(f"{who}: expected a tensor at {place}, got {got}")
        if leaf.layout is not p.layout:
            place = _place(structure, i, name)
            raise TypeError(f"{who}: expected a dense tensor at {place}, got {leaf.layout}")
        fits_dtype = leaf.dtype is p.dtype or (any_dtype and leaf.is_complex() == p.is_complex())
        if not (fits_dtype and leaf.shape == p.shape and leaf.device == p.device):
            expected = f"{_place(structure, i, name)} like params, {_describe(p)}"
            raise ValueError(f"{who}: expected {expected}, got {_describe(leaf)}")
    return leaves


def check_writable(who: object, tensors: list[Tensor]) -> None:
    """Raise ValueError for a tensor that is expanded, belongs to inference mode or comes twice."""
    is_eager = not torch.compiler.is_compiling()
    may_ask = is_eager and not torch.is_inference_mode_enabled()
    if is_eager and len({*map(id, tensors)}) < len(tensors):
        ids = [*map(id, tensors)]
        twice = next(tensor for tensor in tensors if ids.count(id(tensor)) > 1)
        raise ValueError(
            f"{who}: expected every tensor once, got one of shape {tuple(twice.shape)} in two "
            f"places, which step_ would write to twice; step makes two tensors of it"
        )
    for tensor in tensors:
        if is_expanded(tensor):
            raise ValueError(
                f"{who}: expected tensors that can be written to, got an expanded one of "
                f"shape {tuple(tensor.shape)} and stride {tensor.stride()}"
            )
        if may_ask and tensor.is_inference():
            raise ValueError(
                f"{who}: expected tensors that can be written to, got one of shape "
                f"{tuple(tensor.shape)} made in inference mode"
            )


def _place(structure: optree.PyTreeSpec, i: int, name: str) -> str:
    """The code of leaf i of a tree that is called `name`: `params['weight']`."""
    return structure.accessors()[i].codify(name)


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"
