"""The same case with a key and without: evaluation is one function, training another."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from funcnet.keys import fold_in
from funcnet.keys import key as make_key
from funcnet.testing.check.case import Case, tried_y
from funcnet.testing.errors import GradientMismatch
from funcnet.testing.layouts import same

_KEYS, _OTHERS = 8, 3


def beside_key(case: Case) -> list[Case]:
    """The case without its key, or with one drawn; none where the layer takes no notice of it.

    Raises GradientMismatch if every key drops the same entries.
    """
    if case.is_loss:
        return []
    key = make_key(0) if case.key is None else case.key
    without, drawn = tried_y(replace(case, key=None)), tried_y(replace(case, key=key))
    if without is None or drawn is None or same(without, drawn):
        return []
    if _is_masked(drawn, without) and all(
        (y := tried_y(replace(case, key=fold_in(key, i)))) is not None and same(y, drawn)
        for i in range(_KEYS)
    ):
        raise GradientMismatch(
            f"apply: {_KEYS} different keys drop the same entries: the numbers that it draws do "
            "not depend on its key"
        )
    return [replace(case, key=None if case.key is not None else key)]


def other_keys(case: Case) -> list[Case]:
    """The case with a few other keys, by which a layer draws other numbers.

    A mask that `bwd` draws again may be the right one by chance, of one example half the time.
    """
    if case.is_loss:
        return []
    key = make_key(0) if case.key is None else case.key
    y = tried_y(replace(case, key=key))
    drawn = [replace(case, key=fold_in(key, i)) for i in range(_OTHERS)]
    return [
        there
        for there in drawn
        if y is not None and (other := tried_y(there)) is not None and not same(y, other)
    ]


def _is_masked(y: Tensor, without: Tensor) -> bool:
    """Whether a key changes some entries of y to 0 and others in another way, as dropout does."""
    dropped = (y == 0) & (without != 0)
    return bool(dropped.any()) and bool(((y != 0) & (y != without)).any())
