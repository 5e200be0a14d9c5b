"""Running a layer inside another, which has checked what it hands on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from funcnet.checks import as_pair, name_of
from funcnet.keys import Key
from funcnet.layer import Layer, Part, Shape, Spec, Tree, checks_itself, public_bwd, writes, y_alone
from funcnet.ops.inplace import add_over
from funcnet.ops.need import Need
from funcnet.param import first_tensor


def check(layer: Layer, params: Tree, x: Spec) -> Spec:
    """The spec of y. Raises unless params and x fit; a layer with its own `fwd` checks itself."""
    if not checks_itself(layer):
        return layer._check(params, x)
    like = x if x.dtype.is_floating_point else first_tensor(params, x)
    return Spec(x.batch, tuple(layer.out_shape(x.shape)), like.dtype, like.device)


def run_apply(layer: Layer, params: Tree, x: Tensor, key: Key | None) -> Tensor:
    """y of a layer whose params and x have been checked by `check`."""
    cls = type(layer)
    if cls.fwd is Layer.fwd and cls.bwd is Layer.bwd and cls.apply is Layer.apply:
        # Most layers end here, without another call: small ones would take longer.
        if cls._apply is Layer._apply:
            made = layer._fwd(params, x, key)
            # By type: a tensor y of two examples would be unpacked like a pair.
            y: Tensor = (made if type(made) is tuple else as_pair(layer, "_fwd", made))[0]
            return y
        return y_alone(layer, params, x, key)
    return _as_promised(layer, x, layer.apply(params, x, key=key))


def run_fwd(layer: Layer, params: Tree, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
    """(y, residuals) of a layer whose params and x have been checked by `check`."""
    cls = type(layer)
    if cls.fwd is Layer.fwd and cls.bwd is Layer.bwd:
        made = layer._fwd(params, x, key)
        is_one = type(made) is tuple and len(made) == 2
        return made if is_one else as_pair(layer, "_fwd", made)
    y, residuals = as_pair(layer, "fwd", layer.fwd(params, x, key=key))
    return _as_promised(layer, x, y), residuals


def _as_promised(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    """y of a layer that checks for itself. Raises ValueError unless it has its `out_shape`."""
    expected = (*x.shape[:1], *layer.out_shape(tuple(x.shape[1:])))
    if y.shape != expected:
        raise ValueError(
            f"{name_of(layer)}: expected y of shape {expected}, as out_shape says, "
            f"got {tuple(y.shape)}"
        )
    return y


def run_bwd(
    layer: Layer, params: Tree, residuals: Any, grad: Tensor, need: Need
) -> tuple[Tree, Tensor | None]:
    """(dparams, dx) from the residuals of `run_fwd`."""
    cls = type(layer)
    if cls.fwd is Layer.fwd and cls.bwd is Layer.bwd:
        made = layer._bwd(params, residuals, grad, need)
        is_one = type(made) is tuple and len(made) == 2
        return made if is_one else as_pair(layer, "_bwd", made)
    return public_bwd(layer, params, residuals, grad, need)


def dx_alone(layer: Layer, params: Tree, residuals: Any, grad: Tensor, need: Need) -> Tensor | None:
    """dx from the residuals of `run_fwd`, if it is needed."""
    need = need._replace(params=False, each=False)
    return run_bwd(layer, params, residuals, grad, need)[1] if need.input else None


def tile_of(layer: Layer, shape: Shape, part: Part) -> tuple[Part, Layer] | None:
    """`layer._tile`, unless a subclass has changed `_fwd` or `_bwd` without it."""
    return layer._tile(shape, part) if writes(layer, "_tile") else None


def is_fresh(layer: Layer) -> bool:
    """Whether a layer makes and keeps the promise `_fresh`."""
    return layer._fresh and not checks_itself(layer)


def works_in_place(layer: Layer) -> bool:
    """Whether a layer's `_fwd_` and `_bwd_` do what its `apply`, `_fwd` and `_bwd` do."""
    is_ours = type(layer).apply is Layer.apply
    return is_ours and writes(layer, "_fwd_") and writes(layer, "_bwd_")


def makes_views(layer: Layer) -> bool:
    """Whether `_fwd_` and `_bwd_` write nothing, as `_views` says."""
    return layer._views and writes(layer, "_views") and works_in_place(layer)


def added(layer: Layer, made: Tensor, given: Tensor) -> Tensor:
    """made + given, written over `made`, a layer's y or dx, if the layer makes new tensors."""
    return add_over(made, given) if is_fresh(layer) else made + given
