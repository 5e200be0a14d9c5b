"""The search for entries where the gradient is not the derivative of `apply`, in float64.

An entry is called wrong only where a numeric derivative refutes it. Autograd is exact, but blind to
what it cannot follow: it says where to look. Where it does not exist, or is itself refuted, numeric
derivatives examine every entry of a small leaf. In a large leaf they go along random directions,
which are halved until an entry is found.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from funcnet.testing.check.case import Case, Leaves, scale_of, signed
from funcnet.testing.check.comparison import Errors, excess, largest_error, unravel
from funcnet.testing.check.oracles import Line, Slope, autograd_gradients, slope, taylor_slope
from funcnet.testing.check.rounding import allowance, gradient_moves, value_moves
from funcnet.testing.check.tolerances import NEGLIGIBLE, SCORED, WRONG_POWER

_EPSILON = torch.finfo(torch.float64).eps
_SUSPECTS = 12
_WITH_AUTOGRAD, _ALONE = 100, 20000  # evaluations of apply that single entries may cost
_WORK = 2**24  # entries that all those evaluations may compute


@dataclass(frozen=True)
class Finding:
    """A wrong entry: its leaf and index, and the numbers to compare it with."""

    case: Case
    leaf: int
    index: tuple[int, ...]
    gradients: Leaves
    numeric: float
    floor: Tensor
    reference: Tensor | None = None
    taylor: float | None = None

    @property
    def analytic(self) -> float:
        return float(self.gradients[self.leaf][self.index])


def find_wrong(case: Case, rtol: float, atol: float, errors: Errors) -> Finding | None:
    """The first wrong entry at a float64 case, or at a point beside it, away from ties."""
    here = _Search(case, rtol, atol, errors).find(thorough=False)
    return here or _Search(moved(case), rtol, atol, errors).find(thorough=True)


def moved(case: Case) -> Case:
    """A point beside the case. Entries keep their sign; zeros move if y stays finite."""
    still = case.apply().isfinite().all()

    def beside(leaf: Tensor, seed: int, zeros: float) -> Tensor:
        if not _movable(leaf):
            return leaf
        noise = signed(leaf.shape, seed).to(leaf).clamp(-3, 3)
        away = zeros * scale_of(leaf) * noise
        return torch.where(leaf == 0, away, leaf * (1 + 0.02 * noise))

    for zeros in (0.02, 0.0):
        leaves = [beside(leaf, 7 + i, zeros) for i, leaf in enumerate(case.leaves)]
        there = case.at(leaves)
        if not still or there.apply().isfinite().all():
            return there
    return case


def _movable(leaf: Tensor) -> bool:
    return leaf.is_floating_point() and bool(leaf.isfinite().all())


class _Search:
    """The search at one float64 point."""

    def __init__(self, case: Case, rtol: float, atol: float, errors: Errors) -> None:
        self.case, self.rtol, self.atol, self.errors = case, rtol, atol, errors
        self.gradients = case.gradients()
        self.evaluations = 0
        self.frozen = case.frozen
        self.autograd = autograd_gradients(case)
        y = case.apply()
        self.finite = bool(y.isfinite().all())
        work = y.numel() + sum(leaf.numel() for leaf in case.leaves)
        self.most = max(_WORK // max(work, 1), 48)

    @cached_property
    def noise(self) -> Tensor:  # of y
        return value_moves(self.case, _EPSILON)

    @cached_property
    def floors(self) -> Leaves:
        """The rounding of our gradients or autograd's, whichever is larger."""
        moves = gradient_moves(self.case, _EPSILON)
        if self.autograd is not None:
            theirs = gradient_moves(
                self.case, _EPSILON, 2, lambda case: autograd_gradients(case) or case.gradients()
            )
            moves = [torch.maximum(a, b) for a, b in zip(moves, theirs, strict=True)]
        return [allowance(move, torch.float64) for move in moves]

    def find(self, thorough: bool) -> Finding | None:
        found = None if self.autograd is None else self._against_autograd(self.autograd)
        if found is None and self.finite and (thorough or self.autograd is None):
            return self._along_directions() or self._entry_by_entry()
        return found

    def _against_autograd(self, references: Leaves) -> Finding | None:
        suspects: list[tuple[float, int, int]] = []
        for i, (ours, theirs) in enumerate(zip(self.gradients, references, strict=True)):
            self.errors.autograd = max(self.errors.autograd, largest_error(ours, theirs, theirs))
            allowed = self.atol + self.rtol * theirs.abs()
            if (excess(ours, theirs, allowed) <= 1).all():
                continue  # the floors, which take more evaluations, are not needed
            off = excess(ours, theirs, allowed + self.floors[i]).flatten()
            top = off.topk(min(_SUSPECTS, off.numel())).indices.tolist()
            suspects += [(float(off[p]), i, p) for p in top if off[p] > 1]
        for _, i, position in sorted(suspects, reverse=True)[: 2 * _SUSPECTS]:
            mine = float(self.gradients[i].flatten()[position])
            other = float(references[i].flatten()[position])
            if not (self.finite and math.isfinite(mine)):
                return self._finding(i, position, other)
            found = self._entry_slope(i, position)
            slack = self.rtol * abs(found.value) + self.atol
            if found.refutes(mine, slack):
                right = not found.refutes(other, slack)
                return self._finding(i, position, other if right else found.value)
            if found.refutes(other, slack):
                self.autograd = None  # it cannot follow apply
                break
        return None

    def _along_directions(self) -> Finding | None:
        for i, leaf in enumerate(self.case.leaves):
            if not _movable(leaf) or self.frozen[i] or not leaf.numel():
                continue
            for trial in range(1 if self.autograd is not None else 3):
                v = self._direction(leaf, 31 * i + trial, relative=trial != 1)
                taylor = self._refuted(i, v, record=True)
                if taylor is not None and (found := self._halve(i, v, taylor)):
                    return found
        return None

    def _direction(self, leaf: Tensor, seed: int, relative: bool) -> Tensor:
        """A signed random direction, in units of each entry, whose sign stays, or of the leaf."""
        scale = torch.full_like(leaf, scale_of(leaf))
        size = torch.where(leaf == 0, scale, leaf.abs()) if relative else scale
        return signed(leaf.shape, seed).to(leaf) * size

    def _refuted(self, i: int, v: Tensor, record: bool = False) -> float | None:
        """The power of Taylor's remainder along v if the gradient is wrong there."""
        line = self._line(i, v)
        terms = self.gradients[i] * v
        derivative, norm = float(terms.sum()), float(terms.norm())
        numeric = slope(line)
        taylor = taylor_slope(line, derivative)
        if record and norm > 0 and not numeric.jump and numeric.error <= SCORED * norm:
            error = abs(derivative - numeric.value) / norm
            self.errors.differences = max(self.errors.differences, error)
        slack = NEGLIGIBLE * self.rtol * norm + self.atol * float(v.norm())
        if numeric.refutes(derivative, slack):
            slack += float((self.floors[i] * v).norm())
        if not numeric.refutes(derivative, slack):
            if record and taylor is not None and not numeric.jump:
                self.errors.taylor = min(self.errors.taylor, taylor)
            return None
        # Away from kinks a wrong derivative shows in Taylor's remainder too.
        return taylor if taylor is not None and taylor < WRONG_POWER else None

    def _halve(self, i: int, v: Tensor, taylor: float) -> Finding | None:
        """Find a wrong entry of a leaf whose gradient is wrong along v."""
        positions = v.flatten().nonzero().flatten()
        while len(positions) > 1:
            for half in positions.tensor_split(2):
                part = torch.zeros_like(v).flatten()
                part[half] = v.flatten()[half]
                if self._refuted(i, part.reshape(v.shape)) is not None:
                    positions = half
                    break
            else:
                break  # neither half is wrong enough alone
        found = (self._refuted_entry(i, p, taylor) for p in positions[:_SUSPECTS].tolist())
        return next(filter(None, found), None)

    def _entry_by_entry(self) -> Finding | None:
        """Examine the full Jacobian if it is small, else some entries of every leaf."""
        budget = min(self.most, _ALONE if self.autograd is None else _WITH_AUTOGRAD)
        self.evaluations = 0
        for i, position in self._some_entries():
            found = self._refuted_entry(i, position)
            if found is not None or self.evaluations >= budget:
                return found
        return None

    def _refuted_entry(self, i: int, position: int, taylor: float | None = None) -> Finding | None:
        """The finding that an entry is wrong, None unless a numeric derivative refutes it."""
        ours = float(self.gradients[i].flatten()[position])
        found = self._entry_slope(i, position)
        slack = self.rtol * abs(found.value) + self.atol
        if found.refutes(ours, slack):
            slack += float(self.floors[i].flatten()[position])
        if not found.refutes(ours, slack):
            return None
        return self._finding(i, position, found.value, taylor)

    def _some_entries(self) -> Iterator[tuple[int, int]]:
        """Yield (leaf, position) of all entries: the leaves in turn, each in random order."""
        orders = []
        for i, leaf in enumerate(self.case.leaves):
            generator = torch.Generator().manual_seed(i)
            count = leaf.numel() if _movable(leaf) and not self.frozen[i] else 0
            shuffled = torch.randperm(count, generator=generator, device="cpu")
            orders.append(shuffled[: self.most].tolist())
        for turn in itertools.zip_longest(*orders):
            yield from ((i, position) for i, position in enumerate(turn) if position is not None)

    def _entry_slope(self, i: int, position: int) -> Slope:
        """The derivative by one entry, from steps of the entry's own size.

        Steps of the leaf's size resolve more if the entry is smaller. They serve where f is affine.
        """
        leaf = self.case.leaves[i].flatten()
        own, others = abs(float(leaf[position])), scale_of(leaf)
        size = own or others
        found = self._slope_by(i, position, size)
        if size < others and not found.error <= NEGLIGIBLE * self.rtol * abs(found.value):
            larger = self._slope_by(i, position, others)
            return larger if larger.affine else found
        return found

    def _slope_by(self, i: int, position: int, size: float) -> Slope:
        v = torch.zeros_like(self.case.leaves[i]).flatten()
        v[position] = size
        line = self._line(i, v.reshape(self.case.leaves[i].shape), size)
        found = slope(line)
        self.evaluations += line.evaluations
        return found

    def _line(self, i: int, v: Tensor, length: float = 1.0) -> Line:
        direction: list[Tensor | None] = [None] * len(self.case.leaves)
        direction[i] = v
        return Line(self.case, direction, self.noise, length)

    def _finding(
        self, i: int, position: int, numeric: float, taylor: float | None = None
    ) -> Finding:
        index = unravel(position, self.gradients[i].shape)
        reference = None if self.autograd is None else self.autograd[i]
        if reference is not None:
            ours, theirs = (float(x.flatten()[position]) for x in (self.gradients[i], reference))
            if not abs(theirs - numeric) < abs(theirs - ours):
                reference = None  # autograd shares the mistake
        floor = self.floors[i]
        return Finding(self.case, i, index, self.gradients, numeric, floor, reference, taylor)
