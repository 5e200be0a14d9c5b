"""The dtype that a float64 case computes in: a layer, or a part of a network, may cast."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.compat import TorchDispatchMode
from funcnet.testing.check.case import Case, tried, tried_y
from funcnet.testing.check.rounding import NOTICED, nudge
from funcnet.testing.layouts import same

NARROWER = (torch.bfloat16, torch.float16, torch.float32)


def computed_in(double: Case, y: Tensor) -> torch.dtype:
    """The narrowest dtype that a float64 case computes in.

    y's numbers tell it of what is computed in one dtype throughout, the operations of torch of the
    rest: a part of a network may be cast, or what is flat.
    """
    dtype = _held_in(double, y)
    return _cast_to(double) if dtype == torch.float64 else dtype


def _held_in(double: Case, y: Tensor) -> torch.dtype:
    """The narrowest dtype that holds y of a float64 case.

    Nudges put inputs, and so y, where no narrower dtype has a number by chance. What they do not
    move, as zeros, and whole numbers tell nothing; where all is so, random inputs tell.
    """
    if not _holds(torch.float32, y[y.isfinite()]):
        return torch.float64
    for beside in (partial(nudge, epsilon=NOTICED), Case.drawn):
        there, other = (tried_y(beside(double, trial=trial)) for trial in range(2))
        if there is None or other is None:
            return torch.float64
        telling = there[(there != other) & (there != there.round()) & there.isfinite()]
        if telling.numel():
            return next((dtype for dtype in NARROWER if _holds(dtype, telling)), torch.float64)
    return torch.float64


def _holds(dtype: torch.dtype, y: Tensor) -> bool:
    return bool((y.to(dtype).to(y) == y).all())


def _cast_to(double: Case) -> torch.dtype:
    """The narrowest dtype that `apply` casts float64 to, of numbers that depend on the inputs."""
    casts, dtypes = casts_of(double), {torch.float64}
    for beside in (partial(nudge, epsilon=NOTICED), Case.drawn) if casts else ():
        pairs = zip(casts, casts_of(beside(double, trial=0)), strict=False)
        dtypes |= {a.dtype for a, b in pairs if not same(a, b)}
    return coarsest(dtypes)


def casts_of(case: Case) -> list[Tensor]:
    """The results of `apply`'s operations on float64 in a narrower dtype, in their order."""
    with _Casts() as casts:
        tried(case.apply)
    return casts.found if isinstance(casts, _Casts) else []


class _Casts(TorchDispatchMode):  # type: ignore[misc]
    """Notes results in a narrower dtype than float64, if an argument was in that."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arguments: Any = (args, kwargs)
        given = [x for x in optree.tree_leaves(arguments) if isinstance(x, Tensor)]
        result = func(*args, **(kwargs or {}))
        if any(x.dtype == torch.float64 for x in given):
            returned = (x for x in optree.tree_leaves(result) if isinstance(x, Tensor))
            self.found += [x.clone() for x in returned if x.dtype in NARROWER]
        return result


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype of least precision."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
