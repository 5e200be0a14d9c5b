"""What a float64 case casts to a narrower dtype on the way to y, as a part of a network may."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.compat import TorchDispatchMode
from funcnet.testing.check.case import Case, tried

NARROWER = (torch.bfloat16, torch.float16, torch.float32)


def casts_of(case: Case) -> list[Tensor]:
    """What operations of `apply` make of float64 in a narrower dtype, in their order."""
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
