"""Parameters as layers declare them: drawn, and compared with those that came."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from funcnet.checks import check_like, name_of, shown, sizes
from funcnet.initializers import Device, Initializer
from funcnet.keys import Key, split

Layout: TypeAlias = Callable[[Tensor], Tensor]
"""A function that returns a tensor with the same values in another memory format."""


@dataclass(frozen=True)
class Param:
    """A parameter as a layer declares it: its shape, and how it is drawn.

    `initializer` is an `Initializer`, or another function (key, shape, dtype, device) -> tensor.
    Raises TypeError for a shape that is not a tuple or a list. The layer's `init` raises TypeError
    for an initialiser that cannot be called so, and ValueError if it returns another shape.

    >>> import funcnet as fn
    >>> {"weight": fn.Param((8, 3), fn.initializers.Ones())}  # what a layer's `_params` returns
    {'weight': Param(shape=(8, 3), initializer=initializers.Ones())}
    """

    shape: tuple[int, ...]
    initializer: Initializer

    def __post_init__(self) -> None:
        if not isinstance(self.shape, (tuple, list)):
            raise TypeError(f"Param: expected shape to be a tuple of ints, got {shown(self.shape)}")
        object.__setattr__(self, "shape", tuple(self.shape))


Declared: TypeAlias = Mapping[str, Any]
"""What a layer declares by name: each a `Param`, or a dict of `Param`s."""


def check_declared(who: object, declared: Any, prefix: str = "") -> None:
    """Raise TypeError unless a layer's author declares a dict of `Param`s, or of such dicts."""
    if not isinstance(declared, Mapping):
        raise TypeError(
            f"{name_of(who)}: expected _params to return a dict of fn.Param by name, "
            f"got {shown(declared)}{_remedy(declared, prefix)}"
        )
    for name, param in declared.items():
        if isinstance(name, str) and isinstance(param, Mapping):
            check_declared(who, param, f"{prefix}{name}.")
        elif not (isinstance(name, str) and _can_be_drawn(param)):
            raise TypeError(
                f"{name_of(who)}: expected _params to return fn.Param(shape, initializer) "
                f"for {prefix}{name}, got {shown(param)}{_remedy(param, prefix)}"
            )


def _remedy(declared: Any, prefix: str) -> str:
    """The end of a message, which says what to write for a layer whose `init` draws these."""
    leaves = optree.tree_leaves(declared)
    is_tree = bool(prefix) or not isinstance(declared, Tensor)
    if not (leaves and is_tree and all(isinstance(leaf, Tensor) for leaf in leaves)):
        return ""
    return "; a layer made of layers writes init, out_shape, fwd and bwd"


def draw(
    who: object,
    declared: Declared,
    key: Key,
    dtype: torch.dtype | None,
    device: Device,
    layout_of: Callable[[str], Layout | None],
) -> dict[str, Any]:
    """The parameters, each from a key of its own and in the memory format that its name wants.

    Raises TypeError for an initialiser with other arguments, ValueError for another result.
    """
    keys = iter(split(key, max(1, len(_flat(declared, declared)))))
    return _drawn(who, declared, "", keys, (dtype, device), layout_of)


# Not a function in `draw`: one that calls itself holds the layer until garbage is collected.
def _drawn(
    who: object,
    declared: Declared,
    prefix: str,
    keys: Iterator[Key],
    kind: tuple[torch.dtype | None, Device],
    layout_of: Callable[[str], Layout | None],
) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for name, param in declared.items():
        path = prefix + name
        if isinstance(param, Mapping):
            params[name] = _drawn(who, param, f"{path}.", keys, kind, layout_of)
            continue
        value = _drawn_by(who, path, param, (next(keys), param.shape, *kind))
        layout = layout_of(path)
        params[name] = value if layout is None else layout(value)
    return params


def _drawn_by(who: object, name: str, param: Param, arguments: tuple[Any, ...]) -> Any:
    """The tensor that an initialiser returns, of the declared shape."""
    try:
        value = param.initializer(*arguments)
    except TypeError as error:
        if error.__traceback__ is None or error.__traceback__.tb_next is not None:
            raise  # raised inside the function, not by the call
        raise TypeError(
            f"{name_of(who)}: expected the initializer of {name} to be a function "
            f"(key, shape, dtype, device) -> tensor, got {shown(param.initializer)}: {error}"
        ) from None
    if isinstance(value, Tensor) and value.shape == param.shape:
        return value
    got = tuple(value.shape) if isinstance(value, Tensor) else shown(value)
    raise ValueError(
        f"{name_of(who)}: expected the initializer of {name} to return a tensor of shape "
        f"{sizes(param.shape)}, got {got}"
    )


def misshapen(
    who: object, declared: Declared, params: Any, like: Any, of: str, prefix: str = ""
) -> tuple[str, Param, tuple[int, ...]] | None:
    """(name, what was declared, the shape that came) of the first parameter of another shape.

    Raises for another structure, and for another dtype or device than `like` has. Messages call
    `like` by the name `of`.
    """
    where = f"{prefix.rstrip('.')} " if prefix else "params "
    if not isinstance(params, dict):
        raise TypeError(
            f"{name_of(who)}: expected {where}to be a dict with {_names(declared)}, "
            f"got {type(params).__name__}"
        )
    if params.keys() != declared.keys():
        raise ValueError(
            f"{name_of(who)}: expected {where}with {_names(declared)}, got {_names(params)}"
        )
    wrong = None
    for name, param in declared.items():
        if isinstance(param, Mapping):
            wrong = wrong or misshapen(who, param, params[name], like, of, f"{prefix}{name}.")
            continue
        check_like(who, prefix + name, params[name], like, of)
        if params[name].shape != param.shape:
            wrong = wrong or (prefix + name, param, tuple(params[name].shape))
    return wrong


def size_that_fits(
    declare: Callable[[tuple[int, ...]], Declared],
    params: Any,
    shape: tuple[int, ...],
    factors: Sequence[int],
) -> tuple[int, int] | None:
    """(axis, size): the shape of an example with this one size changed fits all of params.

    None if there is no such size among those of params, and those times each of `factors`.
    """
    got = [value.shape for value in _flat(declare(shape), params)]
    candidates = sorted({n * factor for shape in got for n in shape for factor in (1, *factors)})
    for axis in range(len(shape)):
        for other in candidates:
            tried = declare((*shape[:axis], other, *shape[axis + 1 :]))
            if [param.shape for param in _flat(tried, tried)] == got:
                return axis, other
    return None


def check_no_params(who: object, params: Any) -> None:
    """Raise ValueError unless params are ()."""
    if not (isinstance(params, tuple) and not params):
        got = f"a tuple of {len(params)}" if isinstance(params, tuple) else type(params).__name__
        raise ValueError(f"{name_of(who)}: expected no parameters, (), got {got}")


def first_tensor(params: Any, default: Any) -> Any:
    """The first leaf of params that is a tensor, or the default."""
    leaves = optree.tree_leaves(params)
    return next((leaf for leaf in leaves if isinstance(leaf, Tensor)), default)


def _can_be_drawn(param: Any) -> bool:
    """Whether this is a `Param` with an initialiser, not with the class of one."""
    draws = param.initializer if isinstance(param, Param) else None
    return callable(draws) and not isinstance(draws, type)


def _flat(declared: Declared, tree: Any) -> list[Any]:
    """The leaves of a tree like what is declared, in that order."""
    leaves = []
    for name, param in declared.items():
        value = tree[name]
        leaves.extend(_flat(param, value) if isinstance(param, Mapping) else [value])
    return leaves


def _names(params: Mapping[str, Any]) -> str:
    return "keys " + ", ".join(map(repr, sorted(map(str, params)))) if params else "no keys"
