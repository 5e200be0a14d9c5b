"""The gradient of a weight for each example, as the factors of a product.

A layer may multiply L rows of each example by a weight: the steps of a sequence, the windows of an
image. Let left (L, A) be the rows of dy of example number n, and right (L, B) its rows of x. Then

    dWₙ = leftᵀ·right                                      L·A·B multiplications
    ‖dWₙ‖² = Σ (left·leftᵀ) ∘ (right·rightᵀ)               L²·(A + B)

The second formula, by Gram matrices (L, L), never forms dWₙ. Goodfellow, "Efficient per-example
gradient computations", arXiv:1510.01799, 2015; Li et al., "Large language models can be strong
differentially private learners", ICLR 2022. Where terms cancel, rounding leaves an error of
√ε·‖left‖·‖right‖ in the norm, as in any difference of squares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from funcnet.ops.accumulation import widened

ExampleGradients: TypeAlias = "Tensor | Products | Rows"
"""A parameter's gradient for each example: (N, …), or a form from which it follows."""


@dataclass(frozen=True, eq=False)
class Products:
    """dWₙ = finish(leftᵀ·right), where `finish` does no more than move entries."""

    left: Tensor  # (N, …, L, A)
    right: Tensor  # (N, …, L, B)
    finish: Callable[[Tensor], Tensor] = lambda product: product

    def formed(self) -> Tensor:
        return self.finish(self.left.mT @ self.right)

    def squares(self) -> Tensor:
        left, right = widened(self.left), widened(self.right)
        rows, a, b = left.shape[-2], left.shape[-1], right.shape[-1]
        if rows * (a + b) < a * b:
            products = (left @ left.mT) * (right @ right.mT)
            return products.flatten(1).sum(1).clamp(min=0)
        # What is formed at a time takes no more memory than its factors.
        weights = max(1, left.numel() // max(1, rows * a)) * a * b
        at_once = max(1, len(left) * (left.numel() + right.numel()) // max(1, weights))
        parts = zip(torch.split(left, at_once), torch.split(right, at_once), strict=True)
        return torch.cat([_squares(one.mT @ other) for one, other in parts])


@dataclass(frozen=True, eq=False)
class Rows:
    """dWₙ of a table with `count` rows: row i is the sum of rows[n, t] over index[n, t] = i."""

    index: Tensor  # (N, T) of int64
    rows: Tensor  # (N, T, E)
    count: int

    def formed(self) -> Tensor:
        return self._added(self.index, self.count).to(self.rows.dtype)

    def squares(self) -> Tensor:
        if self.count <= self.index.shape[1]:
            return _squares(self._added(self.index, self.count))
        # The k-th smallest index counts as k: T rows hold all sums.
        found, order = self.index.sort(1)
        rank = F.pad((found.diff(dim=1) != 0).cumsum(1), (1, 0))
        return _squares(self._added(torch.zeros_like(rank).scatter(1, order, rank), rank.shape[1]))

    def _added(self, index: Tensor, count: int) -> Tensor:
        """The sums of the rows with one index, (N, count, E)."""
        rows = widened(self.rows)
        sums = rows.new_zeros((len(rows), count, rows.shape[2]))
        return sums.scatter_add(1, index.unsqueeze(2).expand_as(rows), rows)


def formed(each: ExampleGradients) -> Tensor:
    """The gradients themselves, (N, …)."""
    return each if isinstance(each, Tensor) else each.formed()


def squares(each: ExampleGradients) -> Tensor:
    """Σ of the squared entries for each example, (N,), in float32 for half precision."""
    return _squares(each) if isinstance(each, Tensor) else each.squares()


def rows(x: Tensor, axes: int = 1) -> Tensor:
    """x (N, …, D₁, …) with one axis for all between N and the last `axes`: (N, L, D₁, …)."""
    return x.unsqueeze(1).flatten(1, x.ndim - axes)


def product_of_rows(dy: Tensor, x: Tensor) -> Tensor:
    """Σ dyᵀ·x over all axes but the last, the gradient of a weight."""
    return dy.flatten(0, -2).mT @ x.flatten(0, -2)


def over_positions(x: Tensor) -> Tensor:
    """Σ x (N, C, …) over all axes after the channels, (N, C)."""
    return x.unsqueeze(2).flatten(2).sum(2)


def over_examples(function: Callable[..., tuple[Tensor, ...]], *batches: Tensor) -> Any:
    """function(example, …) for each example of the batches (N, …), N ≥ 1, along a new first axis.

    By `torch.func.vmap`; one after the other where torch refuses that.
    """
    try:
        return torch.func.vmap(function)(*batches)
    except Exception:  # a user's layer may raise anything; if vmap is not the cause, it comes again
        each = [function(*examples) for examples in zip(*batches, strict=True)]
        return tuple(map(torch.stack, zip(*each, strict=True)))


def _squares(x: Tensor) -> Tensor:
    return widened(x).unsqueeze(1).flatten(1).square().sum(1)
