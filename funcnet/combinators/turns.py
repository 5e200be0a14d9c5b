"""The base of Repeat and Loop: one layer applied n times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from funcnet.checks import name_of
from funcnet.combinators.several import key_of
from funcnet.combinators.wrapper import SameShape
from funcnet.fields import Size
from funcnet.keys import Key
from funcnet.layer import Tree
from funcnet.ops.need import Need
from funcnet.running import run_apply, run_bwd, run_fwd


@dataclass(frozen=True)
class Turns(SameShape):
    """y = f(… f(f(x))), n times. Turn i draws from `fold_in(key, i)`."""

    n: Size

    def _params_of_turns(self, params: Tree) -> list[Tree]:
        """The parameters of f in each turn."""
        raise NotImplementedError

    def _apply(self, params: Tree, x: Tensor, key: Key | None) -> Tensor:
        for i, own in enumerate(self._params_of_turns(params)):
            x = run_apply(self.layer, own, x, key_of(key, i))
        return x

    def _fwd(self, params: Tree, x: Tensor, key: Key | None) -> tuple[Tensor, list[Any]]:
        residuals = []
        for i, own in enumerate(self._params_of_turns(params)):
            x, kept = run_fwd(self.layer, own, x, key_of(key, i))
            residuals.append(kept)
        return x, residuals

    def _bwd(
        self, params: Tree, residuals: list[Any], dy: Tensor, need: Need
    ) -> tuple[Tree, Tensor | None]:
        rest = residuals if need.consume else list(residuals)
        dparams: Any = None
        dx: Any = dy
        owns, above = self._params_of_turns(params), need._replace(input=True)
        for i in range(self.n - 1, -1, -1):
            found, dx = run_bwd(self.layer, owns[i], rest.pop(), dx, above if i else need)
            if need.params:
                dparams = self._gathered(params, dparams, found, i)
        return dparams, dx

    def _gathered(self, params: Tree, so_far: Any, dparams: Tree, i: int) -> Any:
        """Add the gradient of turn i, `dparams`, to `so_far`, the gradient of all later turns."""
        raise NotImplementedError

    def _describe(self) -> str:
        return f"{type(self).__name__}({name_of(self.layer)}, {self.n})"
