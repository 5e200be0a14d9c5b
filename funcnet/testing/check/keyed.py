"""The same case with a key and without: evaluation is one function, training another."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from funcnet.keys import Key, fold_in
from funcnet.keys import key as make_key
from funcnet.testing.check.case import Case, tried, tried_y
from funcnet.testing.check.comparison import within
from funcnet.testing.check.rounding import value_moves
from funcnet.testing.check.tolerances import COUPLED
from funcnet.testing.errors import GradientMismatch
from funcnet.testing.layouts import same

_KEYS, _OTHERS = 8, 3
_DRAWS = 3
_EXAMPLES = 8
_ITS_KEY_IS_IGNORED = "the numbers that it draws do not depend on its key"


def beside_key(case: Case) -> list[Case]:
    """The case without its key, or with one drawn; no case where the layer ignores its key.

    Raises GradientMismatch if every key drops the same entries, or tells equal examples apart in
    the same way. A key that every example takes in one way may stand for training alone.
    """
    if case.is_loss:
        return []
    key = make_key(0) if case.key is None else case.key
    evaluating, training = replace(case, key=None), replace(case, key=key)
    without, drawn = tried_y(evaluating), tried_y(training)
    other = training if case.key is None else evaluating
    if without is None or drawn is None:
        return []
    if same(without, drawn):
        return [] if _have_the_same_gradients(case, other) else [other]
    if _is_alike_for_all_keys(case, key, drawn):
        if _drops_the_same(case, key, without, drawn):
            raise GradientMismatch(
                f"apply: {_KEYS} different keys drop the same entries: {_ITS_KEY_IS_IGNORED}"
            )
        _check_equal_examples(case, key)
    return [other]


def _have_the_same_gradients(case: Case, other: Case) -> bool:
    gradients, others = tried(case.gradients), tried(other.gradients)
    if gradients is None or others is None:
        return gradients is others
    return all(same(a, b) for a, b in zip(gradients, others, strict=True))


def _is_alike_for_all_keys(case: Case, key: Key, y: Tensor) -> bool:
    """Whether each of a few other keys gives the y of this one, bit for bit."""
    drawn = (tried_y(replace(case, key=fold_in(key, i))) for i in range(_KEYS))
    return all(other is not None and same(other, y) for other in drawn)


def _check_equal_examples(case: Case, key: Key) -> None:
    """Raise GradientMismatch if a key tells equal examples apart, and every other one likewise.

    Whatever treats examples alone, or as a set, gives equal ones the same y, unless it draws
    numbers for each of them. Numbers that are seldom drawn tell nothing apart.
    """
    if not case.batch or not isinstance(case.x, Tensor) or len(case.grad) != case.batch:
        return
    equal = case.with_x(_repeated, _repeated(case.grad)).double()
    evaluating, training = replace(equal, key=None), replace(equal, key=key)
    without, drawn = tried_y(evaluating), tried_y(training)
    if without is None or drawn is None or not drawn.isfinite().all():
        return
    if (
        not _are_told_apart(evaluating, without)
        and _are_told_apart(training, drawn)
        and _is_alike_for_all_keys(equal, key, drawn)
    ):
        raise GradientMismatch(
            f"apply: {_KEYS} different keys tell equal examples apart in the same way: "
            f"{_ITS_KEY_IS_IGNORED}"
        )


def _repeated(leaf: Tensor) -> Tensor:
    return leaf[:1].repeat_interleave(_EXAMPLES, 0)


def _are_told_apart(case: Case, y: Tensor) -> bool:
    """Whether y of equal examples differs by more than rounding."""
    rounding = COUPLED * value_moves(case, torch.finfo(y.dtype).eps)
    return not within(y, y[:1].expand_as(y), rounding)


def other_keys(case: Case) -> list[Case]:
    """The case with a few other keys, by which a layer draws other numbers.

    A mask that `bwd` draws again may be the right one by chance, of one example half the time.
    """
    if case.is_loss:
        return []
    key = make_key(0) if case.key is None else case.key
    y = tried_y(replace(case, key=key))
    if y is None:
        return []
    drawn = (replace(case, key=fold_in(key, i)) for i in range(_OTHERS))
    return [
        there for there in drawn if (other := tried_y(there)) is not None and not same(y, other)
    ]


def _drops_the_same(case: Case, key: Key, without: Tensor, y: Tensor) -> bool:
    """Whether a key changes some entries of y to 0 and others in another way, as dropout does.

    It drops the same ones at other numbers. The zeros of relu, or of equal numbers that are
    normalised, are others there.
    """
    dropped = (y == 0) & (without != 0)
    if not dropped.any() or not ((y != 0) & (y != without)).any():
        return False
    for trial in range(_DRAWS):
        there = case.drawn(trial)
        others, its_y = tried_y(replace(there, key=None)), tried_y(replace(there, key=key))
        if others is None or its_y is None:
            continue  # it may be undefined there
        told = (without != 0) & (others != 0)
        if ((its_y == 0) != dropped)[told].any():
            return False
    return True
