"""A case where y is not finite everywhere, as far as it is: no step can resolve the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from funcnet.testing.check.case import Case


@dataclass(frozen=True)
class DefinedCase(Case):
    """The case `whole` with 0 for the entries of y that are not `known`, and grad 0 there."""

    _: KW_ONLY
    whole: Case
    known: Tensor

    @property
    def names(self) -> list[str]:
        return self.whole.names

    def _among_known(self, y: Tensor) -> Tensor:
        # A function's y may have another shape beside the case.
        return torch.where(self.known, y, 0) if y.shape == self.known.shape else y

    def at(self, leaves: Sequence[Tensor], grad: Tensor | None = None) -> DefinedCase:
        there = self.whole.at(leaves, grad)
        return replace(self, params=there.params, x=there.x, grad=there.grad, whole=there)

    def apply(self) -> Tensor:
        return self._among_known(self.whole.apply())

    def reference(self) -> Tensor:
        return self._among_known(self.whole.reference())

    def fwd(self) -> Any:
        return self.whole.fwd()

    def bwd(self, residuals: Any, **need: bool) -> Any:
        return self.whole.bwd(residuals, **need)

    def vjp(self, **need: bool) -> Any:
        return self.whole.vjp(**need)


def where_known(case: Case, known: Tensor) -> DefinedCase:
    """The case as far as entries of y are known."""
    whole = case.at(case.leaves, torch.where(known, case.grad, 0))
    own = {entry.name: getattr(whole, entry.name) for entry in fields(Case)}
    return DefinedCase(**own, whole=whole, known=known)
