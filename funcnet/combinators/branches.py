"""The base of Sum, Product and Concat: every layer sees x, and the results are joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from funcnet.checks import name_of
from funcnet.combinators.cropped import Cropped, union, within
from funcnet.combinators.several import Several, key_of
from funcnet.keys import Key
from funcnet.layer import Layer, Part, Shape, Spec, Tree, asks, zeros_like
from funcnet.ops.inplace import add_over
from funcnet.ops.need import Need
from funcnet.running import check, is_fresh, makes_views, run_apply, run_bwd, run_fwd, tile_of


@dataclass(frozen=True, init=False)
class Branches(Several):
    """y is made of y₀ = f₀(x), y₁ = f₁(x), …; dx = Σ Jᵢᵀ dyᵢ, with Jᵢ the Jacobian of fᵢ at x."""

    _joins = "apart"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise TypeError(f"{type(self).__name__}: expected at least 1 layer, got none")

    # --- How a subclass joins the results

    def _joined_shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of one example of y, given those of y₀, y₁, …. Raises ValueError."""
        raise NotImplementedError

    def _joined(self, ys: list[Tensor]) -> tuple[Tensor, Any]:
        """(y, what `_part` needs of y₀, y₁, …)."""
        raise NotImplementedError

    def _part(self, kept: Any, dy: Tensor, i: int) -> Tensor:
        """dyᵢ, given dy and what `_joined` has kept."""
        raise NotImplementedError

    # --- Shared by all of them

    @property
    def _fresh(self) -> Any:  # type: ignore[override]
        """Whether y and dx are new tensors, as they are wherever several results are joined."""
        return len(self) > 1 or is_fresh(self.layers[0])

    def _takes_view(self, i: int) -> bool:
        """Whether yᵢ may be a view of x, and dxᵢ a view of dy: joining several copies them."""
        return len(self) > 1 and makes_views(self.layers[i])

    def _is_new(self, i: int) -> bool:
        """Whether nothing else shares the memory of yᵢ and dxᵢ."""
        return is_fresh(self.layers[i]) and not self._takes_view(i)

    def _out_shape(self, shape: Shape) -> Shape:
        shapes = []
        with self._position() as at:
            for at.i, layer in enumerate(self.layers):
                shapes.append(layer.out_shape(shape))
        return self._joined_shape(shapes)

    def _check(self, params: Tree, x: Spec) -> Spec:
        self._check_tree(params)
        specs = []
        with self._position() as at:
            for at.i, (layer, own) in enumerate(self._pairs(params)):
                specs.append(check(layer, own, x))
        dtypes = {spec.dtype for spec in specs}
        if len(dtypes) > 1:
            raise TypeError(
                f"{name_of(self)}: expected results of one dtype, "
                f"got {', '.join(sorted(map(str, dtypes)))}"
            )
        return specs[0]._replace(shape=self._joined_shape([spec.shape for spec in specs]))

    def _tile(self, shape: Shape, part: Part) -> tuple[Part, Layer] | None:
        shapes = [layer.out_shape(shape) for layer in self.layers]
        if len({own[1:] for own in (*shapes, self._joined_shape(shapes))}) > 1:
            return None  # a part of y is not the same part of each yᵢ
        found = [tile_of(layer, shape, part) for layer in self.layers]
        tiles = [tile for tile in found if tile is not None]
        if len(tiles) < len(found):
            return None
        source = union(own for own, _ in tiles)
        layers = tuple(Cropped(layer, within(own, source)) for own, layer in tiles)
        return source, self._with(layers, self.names)

    def _apply(self, params: Tree, x: Tensor, key: Key | None) -> Tensor:
        ys = []
        with self._position() as at:
            for at.i, (layer, own) in enumerate(self._pairs(params)):
                if self._takes_view(at.i):
                    ys.append(layer._fwd_(own, x, None)[0])
                else:
                    ys.append(run_apply(layer, own, x, key_of(key, at.i)))
        return self._joined(ys)[0]

    def _fwd(self, params: Tree, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        ys, residuals = [], []
        with self._position() as at:
            for at.i, (layer, own) in enumerate(self._pairs(params)):
                if self._takes_view(at.i):
                    y, kept = layer._fwd_(own, x, None)
                else:
                    y, kept = run_fwd(layer, own, x, key_of(key, at.i))
                ys.append(y)
                residuals.append(kept)
        y, kept = self._joined(ys)
        return y, (residuals, kept)

    def _bwd(self, params: Tree, residuals: Any, dy: Tensor, need: Need) -> tuple[Tree, Any]:
        rest, kept = residuals
        rest = rest if need.consume else list(rest)
        dparams: list[Tree] = [()] * len(self)
        dx: Any = None
        is_own = False  # whether nothing else shares dx's memory
        owns = self._child_params(params)
        layer: Any
        with self._position() as at:
            for at.i in range(len(self) - 1, -1, -1):
                layer, own, own_residuals = self.layers[at.i], owns[at.i], rest.pop()
                if not asks(layer, own, need):
                    dparams[at.i] = zeros_like(own)
                    continue
                part = self._part(kept, dy, at.i)
                if self._takes_view(at.i):
                    dparams[at.i], more = layer._bwd_(own, own_residuals, part, need)
                else:
                    dparams[at.i], more = run_bwd(layer, own, own_residuals, part, need)
                if dx is None:
                    dx, is_own = more, self._is_new(at.i)
                elif more is not None:
                    dx, is_own = (add_over(dx, more) if is_own else dx + more), True
        return self._packed(dparams, params), dx
