"""The effect of rounding on a result.

A sum whose terms cancel is only as exact as its terms, and their size cannot be read off the sum.
But nudging every input by a relative ε moves a result as rounding the inputs would, cancellation
included. Nudging the residuals does the same for what `bwd` computes from them. The largest move
of a few trials, times a constant for the length of the sums, is forgiven as rounding. All of it is
relative, so it holds at any scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.testing.check.case import Case, Leaves, flat, signed
from funcnet.testing.check.tolerances import LEAF_SHARE, SAFETY, SMALLEST

TRIALS = 12
"""Trials that show both sides of a kink within rounding."""


def value_moves(case: Case, epsilon: float, trials: int = 2) -> Tensor:
    """The move of each entry of y when params and x are nudged by a relative `epsilon`."""
    y = case.apply()
    moves = torch.zeros_like(y)
    for trial in range(trials):
        moves = torch.maximum(moves, _distance(_nudge(case, epsilon, trial).apply(), y))
    return torch.maximum(moves, epsilon * _finite(y).abs())


def gradient_moves(
    case: Case, epsilon: float, trials: int = 3, by: Callable[[Case], Leaves] = Case.gradients
) -> Leaves:
    """The move of each entry of the gradients when inputs and residuals are nudged."""
    residuals = case.fwd()[1] if by is Case.gradients else None

    def results(there: Case, kept: Any) -> Leaves:
        return [*by(there), *(flat(there.bwd(kept)) if by is Case.gradients else [])]

    still = results(case, residuals)
    moves = [torch.zeros_like(leaf) for leaf in case.leaves]
    for trial in range(trials):
        kept = _nudge_tree(residuals, epsilon, 1000 + trial)
        for i, leaf in enumerate(results(_nudge(case, epsilon, trial), kept)):
            move = moves[i % len(moves)]
            torch.maximum(move, _distance(leaf, still[i]), out=move)
    return moves


def allowance(moves: Tensor, dtype: torch.dtype) -> Tensor:
    """The rounding to forgive each entry, given its moves under a nudge by the dtype's ε."""
    largest = moves.max() if moves.numel() else moves.new_zeros(())
    return SAFETY[dtype] * (moves + LEAF_SHARE * largest) + SMALLEST * torch.finfo(dtype).tiny


def _nudge(case: Case, epsilon: float, trial: int) -> Case:
    """Move every entry of params, x and grad by about a relative `epsilon`."""
    tensors = [*case.leaves, case.grad]
    *leaves, grad = [_nudged(x, epsilon, 100 * trial + i) for i, x in enumerate(tensors)]
    return case.at(leaves, grad)


def _nudge_tree(tree: Any, epsilon: float, seed: int) -> Any:
    leaves, structure = optree.tree_flatten(tree)
    return structure.unflatten([_nudged(x, epsilon, seed + i) for i, x in enumerate(leaves)])


def _nudged(x: Any, epsilon: float, seed: int) -> Any:
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        return x
    return x * (1 + epsilon * signed(x.shape, seed).to(x))


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return _finite((a - b).abs())


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, torch.zeros_like(x))
