"""Points beside a case, and directions to move its leaves in."""

from __future__ import annotations

from dataclasses import replace

import optree
import torch
from torch import Tensor

from funcnet.testing.check.case import Case, Leaves, LossCase, scale_of, signed, tried, tried_y

SHORTEST = 2.0**-960
"""Parts of a shorter step would drown in the smallest numbers."""


def movable(leaf: Tensor) -> bool:
    return leaf.is_floating_point() and bool(leaf.isfinite().all())


def direction(leaf: Tensor, seed: int, relative: bool) -> Tensor:
    """A signed random direction, in units of each entry, whose sign stays, or of the leaf."""
    scale = torch.full_like(leaf, scale_of(leaf))
    size = torch.where(leaf == 0, scale, leaf.abs()) if relative else scale
    return signed(leaf.shape, seed).to(leaf) * size.clamp(min=SHORTEST)


def moved(case: Case) -> Case:
    """A point beside the case. Entries keep their sign; zeros move if y stays finite.

    It is nearer where the layer refuses one that is further off, and the case itself at last.
    """
    still = case.apply().isfinite().all()

    def beside(leaf: Tensor, seed: int, step: float, zeros: float) -> Tensor:
        if not movable(leaf):
            return leaf
        noise = signed(leaf.shape, seed).to(leaf).clamp(-3, 3)
        away = zeros * scale_of(leaf) * noise
        near = leaf * (1 + step * noise)
        return torch.where(leaf == 0, away, torch.where(near.isfinite(), near, leaf))

    for step, zeros in ((0.02, 0.02), (0.02, 0.0), (0.001, 0.0)):
        there = case.at([beside(leaf, 7 + i, step, zeros) for i, leaf in enumerate(case.leaves)])
        y = tried_y(there)
        defined = y is not None and bool(not still or y.isfinite().all())
        if defined and tried(there.vjp) is not None:
            return there
    return case


def one_example(case: Case) -> list[Case]:
    """A loss of the first example alone, where x and target are batches of more and it takes one.

    Layers are held to the sum of their examples.
    """
    if not isinstance(case, LossCase) or not case.x.ndim or len(case.x) < 2:
        return []
    target = [leaf for leaf in optree.tree_leaves(case.target) if isinstance(leaf, Tensor)]
    if not all(leaf.ndim and len(leaf) == len(case.x) for leaf in target):
        return []
    alone = replace(case, x=case.x[:1]).with_target(lambda leaf: leaf[:1])
    y = tried_y(alone)
    return [alone] if y is not None and y.isfinite().all() else []


def shared_numbers(leaves: Leaves) -> Tensor:
    """The numbers that are in two leaves or more, in ascending order."""
    if len(leaves) < 2:
        return torch.empty(0)
    in_leaves = torch.cat([torch.unique(leaf) for leaf in leaves])
    numbers, counts = torch.unique(in_leaves, return_counts=True)
    return torch.masked_select(numbers, counts > 1)


def for_each(leaf: Tensor, numbers: Tensor, values: Tensor) -> Tensor:
    """The value for each entry of a leaf that is among numbers, in ascending order; else 0."""
    places = torch.searchsorted(numbers, leaf).clamp(max=len(numbers) - 1)
    return torch.where(numbers[places] == leaf, values[places], 0.0)
