"""The effect of rounding on a result.

A sum whose terms cancel is only as exact as its terms, and their size cannot be read off the sum.
But nudging every input by a relative ε moves a result as rounding the inputs would, cancellation
included. Nudging the residuals does the same for what `bwd` computes from them. The largest move
of a few trials, times a constant for the length of the sums, is forgiven as rounding. All of it is
relative, so it holds at any scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from funcnet.compat import TorchDispatchMode, returns_old_memory
from funcnet.testing.check.case import Case, Leaves, scale_of, signed, tried
from funcnet.testing.check.tolerances import GROWING, KINKED, LEAF_SHARE, SAFETY, SMALLEST, TAIL

TRIALS = 12
"""Trials that show both sides of a kink within rounding."""
NOTICED = 2.0**-5
"""A nudge that is far enough for every dtype to notice."""
_NEARER = (1 / 8, 1 / 64)
_SPREAD_TRIALS = 8  # more than the heaps of a kink


Results: TypeAlias = Callable[[Case], Leaves]
"""`Case.value` or `Case.gradients`."""


def moves(case: Case, epsilon: float, trials: int, of: Results) -> Leaves:
    """`value_moves` or `gradient_moves`."""
    if of is Case.value:
        return [value_moves(case, epsilon, trials)]
    return gradient_moves(case, epsilon, trials)


def value_moves(case: Case, epsilon: float, trials: int = 2) -> Tensor:
    """The move of each entry of y when params and x are nudged by a relative `epsilon`."""
    y = case.apply()
    return torch.maximum(_moves_of(y, case, epsilon, trials), epsilon * _finite(y).abs())


def _moves_of(y: Tensor, case: Case, epsilon: float, trials: int) -> Tensor:
    found = (tried(nudge(case, epsilon, trial).value) for trial in range(trials))
    (moves,) = _largest_moves([y], found)
    return moves


def _largest_moves(still: Leaves, found: Iterable[Leaves | None]) -> Leaves:
    """The largest distance of each entry from where it was; None where the layer refuses."""
    moves = [torch.zeros_like(leaf) for leaf in still]
    for leaves in found:
        for move, leaf, was in zip(moves, leaves or (), still, strict=False):
            if leaf.shape == was.shape:  # which may depend on x
                torch.maximum(move, _finite((leaf - was).abs()), out=move)
    return moves


def value_noise(case: Case, epsilon: float, trials: int = 2) -> Tensor:
    """The rounding of each entry of y: its move, or what terms that cancel in its tail leave.

    1 + erf(x) is a staircase at x = −8: no nudge shows its steps. But terms that cancel there are
    about as large as y is nearer to 0, so y is taken there too.
    """
    (largest,) = _nearer_to_zero(case, Case.value)
    noise = torch.maximum(value_moves(case, epsilon, trials), TAIL * epsilon * largest)
    return noise + torch.finfo(noise.dtype).tiny


def staircase_noise(case: Case, epsilon: float, trials: int) -> Tensor:
    """`value_noise`; where no nudge moves y, what the operations on the way leave, if it is more.

    1 − cos(x) is 0 for all small x.
    """
    noise = value_noise(case, epsilon, trials)
    still = _moves_of(case.apply(), case, epsilon, trials) == 0
    if not still.any():
        return noise
    (on_the_way,) = noise_on_the_way(case, epsilon, Case.value, 2 * trials)
    return torch.where(still, torch.maximum(noise, on_the_way), noise)


def gradient_noise(case: Case, epsilon: float) -> Leaves:
    """The rounding of each entry of the gradients, in tails too, as `value_noise`."""
    pairs = zip(gradient_moves(case, epsilon, TRIALS), gradient_tails(case), strict=True)
    return [torch.maximum(move, TAIL * epsilon * tail) for move, tail in pairs]


def noise_in(case: Case, double: Case, of: Results = Case.gradients) -> Leaves:
    """The rounding of y or the gradients in the dtype of a case; `double` is it in float64.

    What cancels whatever the inputs are, as the mean of what was centred, stands still when these
    are nudged in float64. So the results of all operations on the way are nudged as well, and in
    the dtype itself, in which a kernel's own sums then round in other ways.
    """
    epsilon = torch.finfo(case.dtype).eps
    is_value = of is Case.value
    noise = [value_noise(double, epsilon, TRIALS)] if is_value else gradient_noise(double, epsilon)
    own = noise_on_the_way(case, epsilon, of)
    return [torch.maximum(move, other.to(move)) for move, other in zip(noise, own, strict=True)]


def noise_on_the_way(case: Case, epsilon: float, results: Results, trials: int = TRIALS) -> Leaves:
    """The move of each entry of results when inputs, and what all operations return, are nudged."""

    def nudged(seed: int) -> Leaves | None:
        with _Rounding(epsilon, seed):
            return tried(partial(results, nudge(case, epsilon, seed)))

    return _largest_moves(results(case), map(nudged, range(trials)))


class _Rounding(TorchDispatchMode):  # type: ignore[misc]
    """Moves the result of every operation of torch by about a relative `epsilon`.

    Whole numbers below 1/ε stay if they are made of whole numbers, or by `floor` and the like: such
    positions and counts are exact, and one less is another index.
    """

    def __init__(self, epsilon: float, seed: int) -> None:
        super().__init__()
        self.epsilon, self.seed = epsilon, 10_000 * seed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if returns_old_memory(func):  # a view, or memory that somebody else has
            return result
        self.seed += 1
        arguments: Any = (args, kwargs)
        given = [x for x in optree.tree_leaves(arguments) if _is_floating(x)]
        counts = func.overloadpacket in _WHOLE or all(bool(_whole(x).all()) for x in given)

        def rounded(x: Any) -> Any:
            moved = _nudged(x, self.epsilon, self.seed)
            if not (counts and _is_floating(x)):
                return moved
            return torch.where(_whole(x) & (x.abs() < 1 / self.epsilon), x, moved)

        return optree.tree_map(rounded, result)


_WHOLE = {getattr(torch.ops.aten, name) for name in ("floor", "ceil", "round", "trunc", "sign")}
"""The operations that return whole numbers."""


def _whole(x: Tensor) -> Tensor:
    return x == x.round()


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def gradient_tails(case: Case) -> Leaves:
    """The largest size of each entry of the gradients nearer to 0."""
    return _nearer_to_zero(case, Case.gradients)


def _nearer_to_zero(case: Case, results: Results) -> Leaves:
    """The largest size of each entry on the rays from 0 through all leaves, and through x alone.

    What grows on and on to 0, as 1/x, is no sum that cancels here: of that, the size here. It grows
    by about as much from the first point to the second as from here to the first.
    """
    largest = [_finite(leaf).abs() for leaf in results(case)]
    for which in (slice(None), slice(case.first_of_x, None)):
        sizes = [[torch.zeros_like(size) for size in largest] for _ in _NEARER]
        for factor, there in zip(_NEARER, sizes, strict=True):
            leaves = case.leaves
            leaves[which] = [factor * x if x.is_floating_point() else x for x in leaves[which]]
            found = tried(partial(results, case.at(leaves)))
            for size, leaf in zip(there, found or (), strict=False):
                if leaf.shape == size.shape:  # y may have another one there
                    size.copy_(_finite(leaf).abs())
        for size, far, near in zip(largest, *sizes, strict=True):
            grows = near / far > (far / size / GROWING).clamp(min=GROWING)
            torch.maximum(size, torch.maximum(far, near).masked_fill(grows, 0.0), out=size)
    return largest


def gradient_moves(case: Case, epsilon: float, trials: int = 3) -> Leaves:
    """The move of each entry of the gradients when inputs and residuals are nudged."""
    still, *found = _nudged_gradients(case, epsilon, trials, Case.gradients)
    return _larger_of_both(case, _largest_moves(still, found))


def gradient_spread(case: Case, epsilon: float, by: Results = Case.gradients) -> Leaves:
    """The distance between nudged gradients, unless they lie in heaps, as they do at a kink.

    There, and where the gradient is another one at a single number, a nudge moves it by a jump or
    not at all: it is in one of three heaps, here and on either side. Rounding scatters it.
    """
    still, *found = _nudged_gradients(case, epsilon, _SPREAD_TRIALS, by)
    within = []
    for leaves in zip(*(found or [still]), strict=True):
        gaps = torch.stack([_finite(leaf) for leaf in leaves]).sort(0).values.diff(dim=0)
        within.append(gaps.sum(0) - gaps.topk(min(2, len(gaps)), dim=0).values.sum(0))
    return _larger_of_both(case, within)


def _nudged_gradients(case: Case, epsilon: float, trials: int, by: Results) -> list[Leaves]:
    """The gradients, and those of nudged inputs and of nudged residuals, a few times."""
    residuals: Any = case.fwd()[1] if by is Case.gradients else None

    def results(there: Case, kept: Any) -> Leaves:
        return [*by(there), *(case.flat(there.bwd(kept)) if by is Case.gradients else [])]

    found = [results(case, residuals)]
    for trial in range(trials):
        alike = partial(_nudged_alike, epsilon=epsilon, seed=1000 + trial)
        kept = optree.tree_map(alike, residuals)
        there = tried(partial(results, nudge(case, epsilon, trial), kept))
        found += [] if there is None else [there]
    return found


def _larger_of_both(case: Case, numbers: Leaves) -> Leaves:
    """The larger numbers of those for vjp and those for bwd behind them, if there are both."""
    count = len(case.leaves)
    return [torch.maximum(a, b) for a, b in zip(numbers[:count], numbers[-count:], strict=True)]


def is_extreme(case: Case) -> bool:
    """Whether products of three of the case's numbers may overflow in its dtype, or underflow."""
    limit = float(torch.finfo(case.dtype).max) ** (1 / 3)
    for x in [*case.leaves, case.grad, case.apply()]:
        finite = x[x.isfinite()] if x.is_floating_point() else x.new_ones(0)
        if finite.numel() and not (
            1 / limit < scale_of(finite) and float(finite.abs().max()) < limit
        ):
            return True
    return False


def allowance(moves: Tensor, dtype: torch.dtype) -> Tensor:
    """The rounding to forgive each entry, given its moves under a nudge by the dtype's ε."""
    nonzero = moves[moves > 0]
    if not nonzero.numel():
        return torch.full_like(moves, SMALLEST * torch.finfo(dtype).tiny)
    # A nudge across a kink moves an entry by all of it: that is not rounding of the others.
    largest = torch.minimum(nonzero.max(), KINKED * nonzero.median())
    return SAFETY[dtype] * (moves + LEAF_SHARE * largest) + SMALLEST * torch.finfo(dtype).tiny


def nudge(case: Case, epsilon: float, trial: int) -> Case:
    """Move every entry of params, x and grad by about a relative `epsilon`."""
    tensors = [*case.leaves, case.grad]
    *leaves, grad = [_nudged(x, epsilon, 100 * trial + i) for i, x in enumerate(tensors)]
    return case.at(leaves, grad)


def _nudged_alike(x: Any, epsilon: float, seed: int) -> Any:
    """Nudge a residual so that equal numbers stay equal, and whole ones, which may count, whole.

    `x == y` says where a maximum was, a mask of ones what was kept: such jumps are not rounding.
    """
    if not _is_floating(x):
        return x
    exact = x.detach().cpu().double()
    noise = _noise_of(exact, seed).masked_fill(_whole(exact), 0.0)
    return x * (1 + epsilon * noise.to(x))


def _noise_of(x: Tensor, seed: int) -> Tensor:
    """A number in ±√3 for each entry that follows from its bits: of mean 0 and variance 1."""
    bits = x.contiguous().view(torch.int64) + seed
    for factor in (-7046029254386353131, -4658895280553007687):  # SplitMix64, which wraps around
        bits = (bits ^ (bits >> 31)) * factor
    return bits.double() * (math.sqrt(3) / 2.0**63)


def _nudged(x: Any, epsilon: float, seed: int) -> Any:
    if not _is_floating(x):
        return x
    return x * (1 + epsilon * signed(x.shape, seed).to(x))


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, torch.zeros_like(x))
