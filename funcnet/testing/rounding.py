"""How exact a result can be: what rounding alone does to it.

A sum whose terms cancel is only as exact as its terms, and how large those were cannot be read off
the sum. But nudging every input by a relative ε moves a result by what rounding its inputs would,
cancellation included; nudging the residuals does the same for what `bwd` computes from them. The
largest move of a few trials, times a constant for the length of the sums, is the rounding that
must be forgiven: at any scale, since all of it is relative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.testing.case import Case, Leaves, flat, signed

_SAFETY = {torch.float64: 1000.0, torch.float32: 128.0}
_HALF_SAFETY = 32.0  # sums in half precision are accumulated in float32

TRIALS = 12
"""What lies within rounding of a kink may land on either side: enough to have seen both."""


def value_moves(case: Case, epsilon: float, trials: int = 2) -> Tensor:
    """How far each entry of y moves when params and x are nudged by a relative `epsilon`."""
    y = case.apply()
    moves = torch.zeros_like(y)
    for trial in range(trials):
        moves = torch.maximum(moves, _distance(nudge(case, epsilon, trial).apply(), y))
    return torch.maximum(moves, epsilon * _finite(y).abs())


def gradient_moves(
    case: Case, epsilon: float, trials: int = 3, by: Callable[[Case], Leaves] = Case.gradients
) -> Leaves:
    """How far each entry of the gradients moves when inputs and residuals are nudged."""
    gradients = by(case)
    moves = [torch.zeros_like(leaf) for leaf in gradients]
    residuals, still = None, gradients
    if by is Case.gradients:
        _, residuals = case.fwd()
        still = flat(case.bwd(residuals))
    for trial in range(trials):
        nudged = nudge(case, epsilon, trial)
        pairs = list(zip(by(nudged), gradients, strict=True))
        if by is Case.gradients:
            tree = _nudge_tree(residuals, epsilon, 1000 + trial)
            pairs += zip(flat(nudged.bwd(tree)), still, strict=True)
        for i, (there, here) in enumerate(pairs):
            i %= len(moves)
            moves[i] = torch.maximum(moves[i], _distance(there, here))
    return moves


def allowance(moves: Tensor, dtype: torch.dtype) -> Tensor:
    """The error to forgive each entry whose moves under a nudge by this dtype's ε are known.

    A small share of the leaf's largest is in it, since what happens to stand still in every trial
    is not exact, and algorithms may share sums between entries.
    """
    safety = _SAFETY.get(dtype, _HALF_SAFETY)
    largest = moves.max() if moves.numel() else moves.new_zeros(())
    return safety * (moves + largest / 64) + 64 * torch.finfo(dtype).tiny


def nudge(case: Case, epsilon: float, trial: int) -> Case:
    """The case with every number of params, x and grad moved by a relative `epsilon`, or so."""
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
