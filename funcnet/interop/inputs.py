"""The kind of x that a layer takes."""

from __future__ import annotations

from typing import Any

import optree
import torch

from funcnet.interop.wrap import Wrapped
from funcnet.layer import Layer, Shape, Spec, Tree
from funcnet.layers import Embedding


def takes_integers(layer: Layer) -> bool:
    """Return whether x is of integers. Only embeddings take them, and all results are numbers."""
    if isinstance(layer, Wrapped):
        return layer.traits.takes_integers
    children = (child for _, child in layer._children())
    return isinstance(layer, Embedding) or any(map(takes_integers, children))


def spec_of(layer: Layer, params: Tree, shape: Shape) -> Spec:
    """Return what is known of x, a batch of 2 examples of this shape."""
    leaves: list[Any] = optree.tree_leaves(params)
    like = leaves[0] if leaves else torch.empty(0, dtype=torch.float32)
    return Spec((2,), shape, torch.int64 if takes_integers(layer) else like.dtype, like.device)
