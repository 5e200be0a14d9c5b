"""The composition of layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from funcnet.checks import as_pair, name_of
from funcnet.combinators import tiling
from funcnet.combinators.several import Several
from funcnet.keys import Key, fold_in
from funcnet.layer import Layer, Part, Shape, Spec, Tree, checks_itself, public_bwd, zeros_like
from funcnet.ops.inplace import is_eager
from funcnet.ops.need import Need
from funcnet.position import Position
from funcnet.running import check, is_fresh, run_apply, tile_of, works_in_place


@dataclass(frozen=True, init=False)
class Sequential(Several):
    """The composition of layers: y = fₙ(… f₂(f₁(x))), and backwards dx = J₁ᵀ … Jₙᵀ dy.

    Jᵢ is the Jacobian of fᵢ at its input. Layers come by position, `Sequential(conv, relu)`, or by
    name, `Sequential(stem=conv, head=linear)`. Without layers it is the identity.

    Shapes: x as the first layer takes it, y as the last one gives it.
    Parameters: a tuple with one entry a layer, so the leaf at path `2.weight` is what
    `torch.nn.Sequential` calls `2.weight`; a dict for layers with names, so a leaf is
    `stem.weight`. Layer i draws from `fold_in(key, i)`. Indexing gives a layer, slicing a
    Sequential.

    Raises TypeError for an argument that is not a layer, and for positions and names together. An
    error of a layer starts with the layer's position or name: `layer 2: …`, `stem: …`.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Sequential.html

    >>> import funcnet as fn
    >>> net = fn.Sequential(fn.Conv2d(8, 3, padding="same"), fn.ReLU(), fn.Upsample2d(2))
    >>> net.out_shape((3, 16, 16))
    (8, 32, 32)
    >>> params = net.init(fn.key(0), (3, 16, 16))
    >>> params[0]["weight"].shape
    torch.Size([8, 3, 3, 3])
    >>> net = fn.Sequential(stem=fn.Conv2d(8, 3), end=fn.Sigmoid())
    >>> net.init(fn.key(0), (3, 16, 16))["stem"]["bias"].shape, net["end"]
    (torch.Size([8]), Sigmoid())
    """

    _joins = "apart"
    _composes = True

    _over_x: tuple[bool, ...] = field(init=False, repr=False, compare=False)
    """Whether each layer may write over its x, made for it alone by the layer before it."""
    _over_grad: tuple[bool, ...] = field(init=False, repr=False, compare=False)
    """Whether each layer may write over its grad, made for it alone by the layer after it."""
    _checks_itself: tuple[bool, ...] = field(init=False, repr=False, compare=False)
    """Whether each layer checks for itself. The others are called without their checks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fresh = list(map(is_fresh, self.layers))
        over = list(map(works_in_place, self.layers))
        before, behind = [False, *fresh], [*fresh[1:], False]
        object.__setattr__(self, "_over_x", tuple(map(all, zip(over, before, strict=False))))
        object.__setattr__(self, "_over_grad", tuple(map(all, zip(over, behind, strict=False))))
        object.__setattr__(self, "_checks_itself", tuple(map(checks_itself, self.layers)))
        # The last layer makes y, and the first one dx: the promises of these two are enough.
        object.__setattr__(self, "_fresh", all([*fresh[:1], *fresh[-1:]]))

    def _out_shape(self, shape: Shape) -> Shape:
        return (*self._shapes(shape),)[-1]

    def _child_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        return (*self._shapes(shape),)[:-1]

    def _shapes(self, shape: Shape) -> Iterator[Shape]:
        """The shape of one example before each layer, and after the last."""
        yield shape
        with self._position() as at:
            for at.i, layer in enumerate(self.layers):
                shape = layer.out_shape(shape)
                yield shape

    def _check(self, params: Tree, x: Spec) -> Spec:
        self._check_tree(params)
        if not self.layers:
            self._check_x(x)
        with self._position() as at:
            return self._check_from(0, self._child_params(params), x, at)

    def _check_from(self, first: int, params: tuple[Tree, ...], x: Spec, at: Position) -> Spec:
        """The spec of y, given the spec of layer `first`'s x."""
        for at.i in range(first, len(self.layers)):
            x = check(self.layers[at.i], params[at.i], x)
        return x

    def _tile(self, shape: Shape, part: Part) -> tuple[Part, Sequential] | None:
        tiles: list[Layer] = []
        for layer, own in reversed([*zip(self.layers, self._child_shapes(shape), strict=True)]):
            found = tile_of(layer, own, part)
            if found is None:
                return None
            part, tile = found
            tiles.insert(0, tile)
        fields: Any = {"layers": tuple(tiles), "names": self.names}
        return part, _SequentialTile(**fields)

    def _apply(self, params: Tree, x: Tensor, key: Key | None) -> Tensor:
        y = tiling.apply(self, params, x) if tiling.is_large(x) else None
        return self._run(params, x, key) if y is None else y

    def _run(self, params: Tree, x: Tensor, key: Key | None) -> Tensor:
        """y. A layer's residuals are freed before the next layer runs."""
        in_place, params = is_eager(), self._child_params(params)
        layer: Any
        with self._position() as at:
            for at.i, layer in enumerate(self.layers):
                own = None if key is None else fold_in(key, at.i)
                if in_place and self._over_x[at.i]:
                    x = layer._fwd_(params[at.i], x, own)[0]
                elif not self._checks_itself[at.i]:
                    x = run_apply(layer, params[at.i], x, own)
                else:
                    y = layer.apply(params[at.i], x, key=own)
                    x = self._as_promised(at, params, x, y)
        return x if self.layers else x.clone()

    def _fwd(self, params: Tree, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        made = tiling.fwd(self, params, x) if tiling.is_large(x) else None
        return self._run_fwd(params, x, key) if made is None else made

    def _run_fwd(self, params: Tree, x: Tensor, key: Key | None) -> tuple[Tensor, list[Any]]:
        """(y, the residuals of each layer)."""
        in_place, params = is_eager(), self._child_params(params)
        layer: Any
        residuals = []
        with self._position() as at:
            for at.i, layer in enumerate(self.layers):
                own = None if key is None else fold_in(key, at.i)
                if in_place and self._over_x[at.i]:
                    x, kept = layer._fwd_(params[at.i], x, own)
                elif not self._checks_itself[at.i]:
                    made = layer._fwd(params[at.i], x, own)
                    if type(made) is not tuple or len(made) != 2:
                        made = as_pair(layer, "_fwd", made)
                    x, kept = made
                else:
                    y, kept = as_pair(layer, "fwd", layer.fwd(params[at.i], x, key=own))
                    x = self._as_promised(at, params, x, y)
                residuals.append(kept)
        return (x if self.layers else x.clone()), residuals

    def _as_promised(self, at: Position, params: tuple[Tree, ...], x: Tensor, y: Tensor) -> Tensor:
        """Return y of a layer that checks for itself.

        If y is not what the layer's `out_shape` promised, check the layers after it for this y.
        """
        expected = (*x.shape[:1], *self.layers[at.i].out_shape(tuple(x.shape[1:])))
        if (y.shape, y.dtype, y.device) != (expected, x.dtype, x.device):
            spec = Spec(tuple(y.shape[:1]), tuple(y.shape[1:]), y.dtype, y.device)
            self._check_from(at.i + 1, params, spec, at)
        return y

    def _bwd(
        self, params: Tree, residuals: Any, grad: Tensor, need: Need
    ) -> tuple[Tree, Tensor | None]:
        """(dparams, dx). Residuals are taken off the list, so that each is freed after its use."""
        if isinstance(residuals, tiling.Tiles):
            return tiling.bwd(params, residuals, grad, need)
        kept = residuals if need.consume else list(residuals)
        if len(kept) != len(self.layers):
            raise ValueError(
                f"{name_of(self)}: expected residuals of {len(self)} layers, got {len(kept)}"
            )
        owns = self._child_params(params)
        first = 0 if need.input else self._first_to_learn(owns)
        dparams: list[Tree] = [zeros_like(own) for own in owns[:first]]
        dparams += [()] * (len(self) - first)
        dx: Any = grad if self.layers else grad.clone()
        layer: Any
        in_place, above = is_eager(), need._replace(input=True)
        with self._position() as at:
            for at.i in range(len(self) - 1, first - 1, -1):
                layer, own = self.layers[at.i], owns[at.i]
                wanted = need if at.i == first else above
                if in_place and self._over_grad[at.i]:
                    dparams[at.i], dx = layer._bwd_(own, kept.pop(), dx, wanted)
                elif not self._checks_itself[at.i]:
                    made = layer._bwd(own, kept.pop(), dx, wanted)
                    if type(made) is not tuple or len(made) != 2:
                        made = as_pair(layer, "_bwd", made)
                    dparams[at.i], dx = made
                else:
                    dparams[at.i], dx = public_bwd(layer, own, kept.pop(), dx, wanted)
        return self._packed(dparams, params), dx

    def _describe_last(self) -> str:
        if not self.layers:
            return repr(self)
        name, last = self._children()[-1]
        return self._path_step(name) + last._describe_last()


@dataclass(frozen=True, init=False)
class _SequentialTile(Sequential):
    """A composition over one tile, which is not cut again."""

    def _apply(self, params: Tree, x: Tensor, key: Key | None) -> Tensor:
        return self._run(params, x, key)

    def _fwd(self, params: Tree, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        return self._run_fwd(params, x, key)
