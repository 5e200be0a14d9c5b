"""The search for entries where the gradient is not the derivative of `apply`, in float64.

An entry is called wrong only where a numeric derivative refutes it. Autograd is exact, but blind to
what it cannot follow: it says where to look. Where it does not exist, or is itself refuted, numeric
derivatives examine every entry of a small leaf. In a large leaf they go along random directions,
which are halved until an entry is found.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from funcnet.layer import Layer
from funcnet.leaves import has_children
from funcnet.testing.check.beside import (
    SHORTEST,
    direction,
    for_each,
    movable,
    shared_numbers,
)
from funcnet.testing.check.case import Case, Leaves, scale_of, tried, tried_y
from funcnet.testing.check.comparison import (
    Errors,
    excess,
    largest_error,
    ravel,
    unravel,
    within,
)
from funcnet.testing.check.finding import Finding
from funcnet.testing.check.oracles import Line, Slope, autograd_gradients, slope, taylor_slope
from funcnet.testing.check.rounding import (
    allowance,
    gradient_spread,
    gradient_tails,
    is_extreme,
    noise_on_the_way,
    staircase_noise,
    value_noise,
)
from funcnet.testing.check.tolerances import (
    ALONE,
    ESTIMATE,
    IN_TAILS,
    KINKED,
    NEARLY,
    NEGLIGIBLE,
    SCORED,
    SMALLEST,
    WRONG_POWER,
)
from funcnet.trace import trace

_EPSILON = torch.finfo(torch.float64).eps
_SUSPECTS = 12
_CALM, _SUSPICIOUS = 100, 20000  # evaluations of apply that single entries may cost
_WORK = 2**24  # entries that all those evaluations may compute
_LONGER = 2.0**20  # times an entry's own step
_MANY_HALVINGS = 32  # a derivative that is off by 1e-7 shows by the last
_TOGETHER, _ALIKE = 16, 16.0  # leaves that move at once, and the ratio of their derivatives
_FEW_AROUND, _AROUND, _NEAR = 12, 96, 2.0**-26  # points around a kink, and their distance

LeafDirection: TypeAlias = tuple[int, Tensor]
"""The number of a leaf, and a direction to move it in."""


@dataclass(frozen=True)
class Limits:
    """The tolerances of the search for wrong entries, and its limit: seconds, or evaluations."""

    rtol: float
    atol: float
    seconds: float | None
    start: float = field(default_factory=time.monotonic)

    def slack(self, value: Any) -> Any:
        """The error that is forgiven in a number, or in each entry of a tensor."""
        return self.atol + self.rtol * abs(value)

    @property
    def is_out_of_time(self) -> bool:
        return self.seconds is not None and time.monotonic() - self.start >= self.seconds

    def is_spent(self, evaluations: int, most: int) -> bool:
        return evaluations >= most if self.seconds is None else self.is_out_of_time


def find_wrong(case: Case, beside: Case, limits: Limits, errors: Errors) -> Finding | None:
    """The first wrong entry at a float64 case, or beside it, away from ties and at those left."""
    return (
        find_wrong_at(case, limits, errors, thorough=False)
        or find_wrong_at(beside, limits, errors, thorough=True)
        or _find_wrong_between_leaves(case, limits, errors)
    )


def find_wrong_at(case: Case, limits: Limits, errors: Errors, thorough: bool) -> Finding | None:
    """The first wrong entry at a float64 case; a thorough search is for points away from kinks."""
    search = _Search(case, limits, errors)
    found = search.find(thorough)
    if found is not None and search.learns_more_noise() and not search.confirms(found):
        found = search.find(thorough)
    if (
        found is not None
        and not thorough
        and (_is_at_hidden_kinks(case, limits) or search.is_at_torchs_kinks(found))
    ):
        return None
    return found


def _is_at_hidden_kinks(case: Case, limits: Limits) -> bool:
    """Whether layers inside a network are at kinks, where every layer is right on its own.

    A chain of slopes, each between the one-sided ones, need not be between those of the network:
    relu(x) − relu(−x) is x, and a slope of 0 for both at 0 makes 0 of its 1. That some layer takes
    another slope than autograd tells such kinks from a fault of the network.
    """
    if not (isinstance(case.layer, Layer) and has_children(case.layer)):
        return False
    records = tried(partial(trace, case.layer, case.params, case.x, case.grad, case.key)) or ()
    differs = False
    for layer, params, x, y, grad in (record[1:] for record in records):
        if grad is None:
            return False
        own = Case(layer, params, x, grad).double()
        its_y = tried_y(own)
        # A layer may need the key, which it got a part of.
        if its_y is None or not within(its_y, y, limits.slack(y)):
            return False
        if find_wrong_at(own, limits, Errors(), thorough=False) is not None:
            return False
        pairs = zip(own.gradients(), autograd_gradients(own) or (), strict=False)
        differs = differs or not all(within(a, b, limits.slack(b)) for a, b in pairs)
    return differs


def _find_wrong_between_leaves(case: Case, limits: Limits, errors: Errors) -> Finding | None:
    """Leaves whose gradients are wrong together where entries of one equal entries of another.

    Numbers that are equal stay so beside the case, where the kinks at single numbers are left: two
    of those may be right apart and wrong together, as for relu(a) − relu(−x) at 0.
    """
    shared = shared_numbers([leaf for leaf in case.leaves if movable(leaf)])
    if not len(shared):
        return None
    step = direction(shared, 61, relative=True) / 64
    there = case.along([for_each(x, shared, step) if movable(x) else None for x in case.leaves])
    y = tried_y(there)
    if y is None or not y.isfinite().all() or tried(there.vjp) is None:
        return None
    search = _Search(there, limits, errors)
    numbers = (shared + step).sort().values
    found = search.between_leaves(numbers)
    if found is None or not search.learns_more_noise():
        return found
    return search.between_leaves(numbers)


def _by_autograd(case: Case) -> Leaves:
    return autograd_gradients(case) or case.gradients()


def _without_kinks(floor: Tensor) -> Tensor:
    return floor.clamp(max=float(KINKED * floor.median())) if floor.numel() else floor


class _Search:
    """The search at one float64 point."""

    def __init__(self, case: Case, limits: Limits, errors: Errors) -> None:
        y = case.apply()
        known = y.isfinite()
        self.partly = bool(known.any()) and not bool(known.all())
        self.finite = self.partly or bool(known.all())
        if self.partly:
            case = case.where(known)
            y = case.apply()
        self.y = y
        self.case, self.limits, self.errors = case, limits, errors
        self.gradients = case.gradients()
        self.evaluations = 0
        self.frozen = case.frozen
        self.autograd = autograd_gradients(case)
        work = y.numel() + sum(leaf.numel() for leaf in case.leaves)
        self.most = max(_WORK // max(work, 1), 48)

    @cached_property
    def still(self) -> list[Tensor]:
        """A mask for each leaf: True for entries that no direction moves.

        Where y is not finite everywhere, a gradient that is not may be due to that alone.
        """
        triples = zip(self.frozen, self.case.leaves, self.gradients, strict=True)
        return [
            frozen | ~leaf.isfinite() | (~ours.isfinite() & self.partly)
            for frozen, leaf, ours in triples
        ]

    @cached_property
    def examined(self) -> list[int]:
        """The numbers of the leaves that directions move."""
        return [
            i
            for i, leaf in enumerate(self.case.leaves)
            if leaf.is_floating_point() and not self.still[i].all()
        ]

    @cached_property
    def noise(self) -> Tensor:  # of y
        return value_noise(self.case, _EPSILON)

    @cached_property
    def around(self) -> list[Leaves]:
        """The gradients at points around this one, so near that only kinks tell them apart."""
        found: list[Leaves] = []
        for trial in range(_AROUND):
            if trial == _FEW_AROUND and self._are_alike(found):
                break  # there is no kink
            there = tried(self._beside(trial, _NEAR).gradients)
            found += [] if there is None else [there]
        return found

    def _are_alike(self, found: list[Leaves]) -> bool:
        """Whether gradients are those of this point, but for `rtol` of each leaf's largest."""
        for ours, *leaves in zip(self.gradients, *found, strict=True):
            slack = self.limits.slack(float(ours.abs().max()) if ours.numel() else 0.0)
            if not all(bool(((leaf - ours).abs() <= slack).all()) for leaf in leaves):
                return False
        return bool(found)

    def is_at_torchs_kinks(self, found: Finding) -> bool:
        """Whether the derivatives are torch's own, and at kinks inside, as of relu(W·x) at 0.

        A sum of slopes that are each right at a kink may be none of the whole.
        """
        where = ... if found.index is None else found.index
        is_finite = self.gradients[found.leaf][where].isfinite().all()
        if not (is_finite and self.case.is_autograds and self.around):
            return False
        sides = torch.stack([leaves[found.leaf][where] for leaves in self.around])
        spread = sides.amax(0) - sides.amin(0)
        return bool((spread > self.limits.slack(sides.abs().amax(0))).any())

    def learns_more_noise(self) -> bool:
        """Whether roundings make y a staircase, which the search knows from then on."""
        noise = staircase_noise(self.case, _EPSILON, trials=2)
        if torch.equal(noise, self.noise):
            return False
        self.noise, self.limits = noise, replace(self.limits, start=time.monotonic())
        return True

    @cached_property
    def extreme(self) -> bool:
        return is_extreme(self.case)

    @cached_property
    def floors(self) -> Leaves:
        """The rounding of our gradients or autograd's, whichever is larger."""
        moves = gradient_spread(self.case, _EPSILON)
        if self.autograd is not None:
            theirs = gradient_spread(self.case, _EPSILON, by=_by_autograd)
            moves = [torch.maximum(a, b) for a, b in zip(moves, theirs, strict=True)]
        tails = gradient_tails(self.case)
        return [
            allowance(move, torch.float64) + IN_TAILS * _EPSILON * tail
            for move, tail in zip(moves, tails, strict=True)
        ]

    @cached_property
    def autograds_rounding(self) -> Leaves:
        """The rounding of autograd's operations whose terms cancel, whatever the inputs are."""
        moves = noise_on_the_way(self.case, _EPSILON, _by_autograd, trials=4)
        return [allowance(move, torch.float64) for move in moves]

    def find(self, thorough: bool) -> Finding | None:
        found = self._find(thorough)
        if self.autograd is not None or not self.examined:
            self.errors.resolved = True
        return found

    def _find(self, thorough: bool) -> Finding | None:
        found = self._not_a_number()
        if found is None and self.autograd is not None:
            found = self._against_autograd(self.autograd)
        if found is None and self.finite and (thorough or self.autograd is None):
            is_wrong = self._is_wrong_over_all_leaves()
            suspicious = is_wrong and not self.extreme
            # The first direction of all leaves is that of an only one.
            first = 1 if self.examined == [0] and not is_wrong else 0
            found = self._along_directions(range(first, 3 if suspicious else 1 + thorough))
            if found is None and (suspicious or thorough):
                found = self._entry_by_entry(_SUSPICIOUS if suspicious else _CALM)
            elif found is None:
                found = self._unlike_around()
        return found

    def confirms(self, found: Finding) -> bool:
        """Whether the search still refutes the entry that it has found."""
        if found.index is None:
            return False
        position = ravel(found.index, self.case.leaves[found.leaf].shape)
        return self._refuted_entry(found.leaf, position) is not None

    def _not_a_number(self) -> Finding | None:
        """An entry that is NaN, though y and the entries of the leaf are finite."""
        if self.partly or not (self.finite and self.case.grad.isfinite().all()):
            return None
        for i in self.examined:
            undefined = self.gradients[i].isnan()
            if undefined.any() and not self.extreme:
                position = int(undefined.flatten().int().argmax())
                return self._finding(i, position, self._entry_slope(i, position).value)
        return None

    def _against_autograd(self, references: Leaves) -> Finding | None:
        suspects, differing = self._suspects(references)
        for i, position in suspects:
            mine = float(self.gradients[i].flatten()[position])
            other = float(references[i].flatten()[position])
            if not (self.finite and math.isfinite(mine)):
                if self.extreme or (self.partly and not self._reaches(i, position)):
                    continue
                return self._finding(i, position, other)
            found = self._entry_slope(i, position)
            slack = self.limits.slack(found.value)
            if found.refutes(mine, slack):
                if self._is_a_limit(found, i, position):
                    continue
                right = not found.refutes(other, slack)
                return self._finding(i, position, other if right else found.value)
            if found.refutes(other, slack):
                self.autograd = None  # it cannot follow apply
                return None
            if found.resolves(mine - other) or self.extreme:
                continue
            if abs(mine - other) > float(self.autograds_rounding[i].flatten()[position]):
                return self._finding(i, position, other)  # autograd decides
        return self._along_ties(differing) if self.finite else None

    def _suspects(self, references: Leaves) -> tuple[list[tuple[int, int]], set[int]]:
        """(leaf, position) of the entries that are furthest off, and all leaves that differ."""
        suspects: list[tuple[float, int, int]] = []
        differing = set()
        for i, (ours, theirs) in enumerate(zip(self.gradients, references, strict=True)):
            allowed = self.limits.slack(theirs)
            if ((excess(ours, theirs, allowed) <= 1) | self.frozen[i]).all():
                self._score(ours, theirs)
                continue  # the floors, which take more evaluations, are not needed
            differing.add(i)
            off = excess(ours, theirs, allowed + self.floors[i])
            # A gradient of 0 is nothing but rounding, which may be as large as the leaf's largest.
            self._score(torch.where(off > 1, ours, theirs), theirs)
            off = off.masked_fill(self.frozen[i], 0.0).flatten()
            top = off.topk(min(_SUSPECTS, off.numel())).indices.tolist()
            suspects += [(float(off[p]), i, p) for p in top if off[p] > 1]
        worst_first = sorted(suspects, reverse=True)[: 2 * _SUSPECTS]
        return [(i, position) for _, i, position in worst_first], differing

    def _reaches(self, i: int, position: int) -> bool:
        """Whether a step of an entry shows in y where it is finite."""
        found = self._entry_slope(i, position)
        return found.resolves(found.value)

    def _score(self, ours: Tensor, theirs: Tensor) -> None:
        self.errors.autograd = max(self.errors.autograd, largest_error(ours, theirs, theirs))

    def _is_wrong_over_all_leaves(self) -> bool:
        """Move all leaves at once: most right gradients need no more than this."""
        for trial in range(2):
            seed = 977 * trial
            moving = [(i, self._direction(i, seed + i, relative=not trial)) for i in self.examined]
            if moving and self._refuted(*moving, record=True, by_taylor=False) is not None:
                return True
        return False

    def _along_directions(self, trials: Iterable[int]) -> Finding | None:
        for trial in trials:
            pairs = [
                (i, self._direction(i, 31 * i + trial, relative=trial != 1)) for i in self.examined
            ]
            for group in self._of_one_size(pairs):
                if trial and self.limits.is_out_of_time:
                    break
                if (found := self._wrong_among(group)) is not None:
                    return found
        return None if self.autograd is not None else self._along_ties(set(self.examined))

    def _wrong_among(self, group: list[LeafDirection]) -> Finding | None:
        """A wrong entry of one of the leaves: of all together, of halves, of each alone."""
        if len(group) > 1:
            if self._agree(group):
                return None
            half = len(group) // 2
            return self._wrong_among(group[:half]) or self._wrong_among(group[half:])
        ((i, v),) = group
        taylor = self._refuted((i, v), record=True)
        return None if taylor is None else self._halve(i, v, taylor)

    def _of_one_size(self, pairs: list[LeafDirection]) -> Iterator[list[LeafDirection]]:
        """Groups of leaves whose derivatives along their directions are about as large."""
        sizes = {i: float((self.gradients[i] * v).norm()) for i, v in pairs}
        group: list[LeafDirection] = []
        for i, v in sorted(pairs, key=lambda pair: sizes[pair[0]]):
            if group and not (len(group) < _TOGETHER and sizes[i] <= _ALIKE * sizes[group[0][0]]):
                yield group
                group = []
            group.append((i, v))
        if group:
            yield group

    def _agree(self, group: list[LeafDirection]) -> bool:
        """Whether a step along all directions at once shows that each gradient is right.

        It has to resolve what counts in the smallest of them, or nearly what steps of each alone
        could: all of them have y's rounding.
        """
        line = self._line(*group)
        terms = [self.gradients[i] * v for i, v in group]
        derivative = sum(float(x.sum()) for x in terms)  # fsum refuses what overflows
        numeric = slope(line)
        least = ALONE * self.limits.rtol * min(float(x.norm()) for x in terms)
        resolved = max(least, NEARLY * line.rounding(1.0))
        off = abs(derivative - numeric.value)
        if numeric.jump or not off + ESTIMATE * numeric.error <= resolved:
            return False
        self._note(numeric, derivative, max(float(x.norm()) for x in terms), resolved)
        return True

    def _along_ties(self, leaves: set[int]) -> Finding | None:
        """Move equal entries alike: at a tie, each entry alone may claim the whole slope."""
        for i in sorted(leaves & set(self.examined)):
            leaf = self.case.leaves[i]
            values, which = torch.unique(leaf, return_inverse=True)
            if len(values) == leaf.numel():
                continue
            if len(values) > 1:
                v = direction(values, 57 + i, relative=True)[which]
            else:
                v = torch.full_like(leaf, max(scale_of(leaf), SHORTEST))
            found = self._wrong_along((i, v.masked_fill(self.still[i], 0.0)))
            if found is not None:
                return replace(found, reference=None if self.autograd is None else self.autograd[i])
        return None

    def between_leaves(self, numbers: Tensor) -> Finding | None:
        """Move the entries that are one of these numbers, in ascending order, alike in all leaves.

        There is nothing to find where autograd finds the same gradients.
        """
        if self.autograd is not None:
            pairs = zip(self.gradients, self.autograd, strict=True)
            if all(within(ours, theirs, self.limits.slack(theirs)) for ours, theirs in pairs):
                return None
        values = direction(numbers, 67, relative=True)
        alike = [(i, for_each(self.case.leaves[i], numbers, values)) for i in self.examined]
        moving = [(i, v.masked_fill(self.still[i], 0.0)) for i, v in alike]
        moving = [(i, v) for i, v in moving if v.any()]
        return self._wrong_along(*moving) if moving else None

    def _wrong_along(self, *moving: LeafDirection) -> Finding | None:
        """The finding that leaves are wrong along a direction that moves equal entries alike."""
        taylor = self._refuted(*moving, at_ties=True)
        if taylor is None:
            return None
        (i, *beside), numeric = [i for i, _ in moving], slope(self._line(*moving)).value
        along = sum(float((self.gradients[i] * v).sum()) for i, v in moving)
        found = Finding(self.case, i, None, self.gradients, numeric, self.floors[i])
        return replace(found, taylor=taylor, along=along, beside=tuple(beside))

    def _direction(self, i: int, seed: int, relative: bool) -> Tensor:
        """A random direction of a leaf, in which what is frozen stays."""
        v = direction(self.case.leaves[i], seed, relative)
        return v.masked_fill(self.still[i], 0.0)

    def _refuted(
        self,
        *moving: LeafDirection,
        record: bool = False,
        by_taylor: bool = True,
        at_ties: bool = False,
    ) -> float | None:
        """The power of Taylor's remainder along a direction if the gradient is wrong there.

        It is 0 there without `by_taylor`, which a direction over many right entries may blur.
        `at_ties` says that nudges break ties: what they show is not rounding.
        """
        line = self._line(*moving)
        terms = torch.cat([(self.gradients[i] * v).flatten() for i, v in moving])
        derivative, norm = float(terms.sum()), float(terms.norm())
        if not math.isfinite(derivative) and self.extreme:
            return None
        numeric = slope(line)
        if record and norm > 0 and not numeric.jump and numeric.error <= SCORED * norm:
            error = abs(derivative - numeric.value) / norm
            self.errors.differences = max(self.errors.differences, error)
        length = math.hypot(*(float(v.norm()) for _, v in moving))
        slack = (1 if at_ties else NEGLIGIBLE) * self.limits.rtol * norm + self.limits.atol * length
        slack += SMALLEST * torch.finfo(torch.float64).tiny * length
        if numeric.refutes(derivative, slack) and not at_ties:
            # At a kink, a nudge moves all of an entry: that is not rounding of the sum over others.
            floors = ((_without_kinks(self.floors[i]) * v).norm() for i, v in moving)
            slack += math.hypot(*map(float, floors))
        if not numeric.refutes(derivative, slack):
            self._note(numeric, derivative, norm, slack)
            if record and not numeric.jump:
                taylor = taylor_slope(line, derivative)
                self.errors.taylor = min(self.errors.taylor, math.inf if taylor is None else taylor)
            return None
        if not by_taylor:
            return 0.0
        # Away from kinks a wrong derivative shows in Taylor's remainder too.
        taylor = taylor_slope(line, derivative, _MANY_HALVINGS)
        return taylor if taylor is not None and taylor < WRONG_POWER else None

    def _halve(self, i: int, v: Tensor, taylor: float) -> Finding | None:
        """Find a wrong entry of a leaf whose gradient is wrong along v."""
        positions = v.flatten().nonzero().flatten()
        while len(positions) > 1:
            for half in positions.tensor_split(2):
                part = torch.zeros_like(v).flatten()
                part[half] = v.flatten()[half]
                if self._refuted((i, part.reshape(v.shape))) is not None:
                    positions = half
                    break
            else:
                break  # neither half is wrong enough alone
        found = (self._refuted_entry(i, p, taylor) for p in positions[:_SUSPECTS].tolist())
        return next(filter(None, found), None)

    def _entry_by_entry(self, evaluations: int) -> Finding | None:
        """Examine the full Jacobian if it is small, else some entries of every leaf."""
        most = min(self.most, evaluations)
        self.evaluations = 0
        for i, position in self._some_entries():
            if self.limits.is_spent(self.evaluations, most):
                return None
            found = self._refuted_entry(i, position)
            if found is not None:
                return found
        return None

    def _unlike_around(self) -> Finding | None:
        """A wrong entry among those whose gradient is not between those on two sides of the point.

        Along a direction over many entries, the jumps of all their kinks hide a slope that is wrong
        at one of them.
        """
        sides = [tried(self._beside(0, step).gradients) for step in (_NEAR, -_NEAR)]
        for i in self.examined if None not in sides else ():
            ours, (a, b) = self.gradients[i], (side[i] for side in sides if side is not None)
            middle, half = (a + b) / 2, (a - b).abs() / 2
            off = excess(ours, middle, half + self.limits.slack(middle))
            off = off.masked_fill(self.still[i], 0.0).flatten()
            for position in off.topk(min(_SUSPECTS, off.numel())).indices.tolist():
                if off[position] > 1 and (found := self._refuted_entry(i, position)) is not None:
                    return found
        return None

    def _beside(self, trial: int, step: float) -> Case:
        """A point beside this one, at about this share of each entry."""
        directions = [
            direction(leaf, 100 * trial + i, relative=True) if movable(leaf) else None
            for i, leaf in enumerate(self.case.leaves)
        ]
        return self.case.along(directions, step)

    def _refuted_entry(self, i: int, position: int, taylor: float | None = None) -> Finding | None:
        """The finding that an entry is wrong, None unless a numeric derivative refutes it."""
        ours = float(self.gradients[i].flatten()[position])
        if not math.isfinite(ours) and self.extreme:
            return None
        found = self._entry_slope(i, position)
        slack = self.limits.slack(found.value)
        if found.refutes(ours, slack):
            slack += float(self.floors[i].flatten()[position])
        if not found.refutes(ours, slack):
            self._note(found, ours, abs(ours), slack)
            return None
        if self._is_a_limit(found, i, position):
            return None
        return self._finding(i, position, found.value, taylor)

    def _is_a_limit(self, found: Slope, i: int, position: int) -> bool:
        """Whether a slope at a kink lies between those of points around it.

        Of three equal numbers that are sorted, one goes to the middle. Its gradient is that of the
        middle place, while steps of it alone show those of the outer places. These may be alike, as
        the zeros of a median's: then no kink shows but in the slopes around.
        """
        leaf = self.case.leaves[i]
        is_tied = int((leaf == leaf.flatten()[position]).sum()) > 1
        slack: float = self.limits.slack(float(self.gradients[i].flatten()[position]))
        if not (found.jump > slack or is_tied):
            return False
        ours, *around = (float(g[i].flatten()[position]) for g in (self.gradients, *self.around))
        if not around or max(around) - min(around) <= slack:  # no kink, but for rounding
            return False
        return min(around) - slack <= ours <= max(around) + slack

    def _some_entries(self) -> Iterator[tuple[int, int]]:
        """Yield (leaf, position) of all entries: the leaves in turn, each in random order."""
        orders = []
        for i, leaf in enumerate(self.case.leaves):
            generator = torch.Generator().manual_seed(i)
            count = leaf.numel() if i in self.examined else 0
            shuffled = torch.randperm(count, generator=generator, device="cpu")
            thawed = ~self.still[i].flatten().cpu()[shuffled] if count else shuffled.bool()
            orders.append(shuffled[thawed][: self.most].tolist())
        for turn in itertools.zip_longest(*orders):
            yield from ((i, position) for i, position in enumerate(turn) if position is not None)

    def _entry_slope(self, i: int, position: int) -> Slope:
        """The derivative by one entry, from steps of the entry's own size.

        Steps of the leaf's size resolve more if the entry is smaller. They serve where f is affine,
        unless they are so large that what is not affine about f may drown in rounding.
        """
        leaf = self.case.leaves[i].flatten()
        own, others = abs(float(leaf[position])), scale_of(leaf)
        size = max(own or others, SHORTEST)
        found = self._slope_by(i, position, size)
        is_exact = found.error <= NEGLIGIBLE * self.limits.rtol * abs(found.value)
        if size < others < _LONGER * size and not is_exact:
            larger = self._slope_by(i, position, others)
            return larger if larger.affine else found
        return found

    def _slope_by(self, i: int, position: int, size: float) -> Slope:
        v = torch.zeros_like(self.case.leaves[i]).flatten()
        v[position] = size
        line = self._line((i, v.reshape(self.case.leaves[i].shape)), length=size)
        found = slope(line)
        self.evaluations += line.evaluations
        return found

    def _note(self, numeric: Slope, derivative: float, size: float, slack: float) -> None:
        """Note whether a numeric derivative could have refuted ours, whose terms have this size."""
        if self.autograd is None and not self.errors.resolved:
            self.errors.resolved = numeric.tells(derivative, size, slack)

    def _line(self, *moving: LeafDirection, length: float = 1.0) -> Line:
        """y along the direction that moves these leaves alone."""
        directions: list[Tensor | None] = [None] * len(self.case.leaves)
        for i, v in moving:
            directions[i] = v
        return Line(self.case, directions, self.y, self.noise, length)

    def _finding(
        self, i: int, position: int, numeric: float, taylor: float | None = None
    ) -> Finding:
        index = unravel(position, self.gradients[i].shape)
        reference = None if self.autograd is None else self.autograd[i]
        if reference is not None:
            ours, theirs = (float(x.flatten()[position]) for x in (self.gradients[i], reference))
            if not (math.isnan(ours) or abs(theirs - numeric) < abs(theirs - ours)):
                reference = None  # autograd shares the mistake
        floor = self.floors[i]
        return Finding(self.case, i, index, self.gradients, numeric, floor, reference, taylor)
