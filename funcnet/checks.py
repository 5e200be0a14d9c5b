"""Checks that refuse bad input. A message names who refuses, what was expected and what came."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import is_dataclass
from itertools import islice
from numbers import Integral, Real
from typing import Any, TypeGuard

from torch import SymFloat, Tensor, nn


def name_of(who: Any) -> str:
    """The name of a layer in a message: its code, or a combinator's kind and size."""
    describe = getattr(who, "_describe", None)
    return str(who) if describe is None else str(describe())


class PromiseError(ValueError):
    """A layer has returned something else than it declares: `what`, and `y` if y is wrong."""

    what: str = ""
    y: Any = None


def broken_promise(who: object, what: str, y: Any = None) -> PromiseError:
    """The error that says what a layer has made."""
    error = PromiseError(f"{name_of(who)}: {what}")
    error.what, error.y = what, y
    return error


def is_pair(made: Any) -> TypeGuard[tuple[Any, Any]]:
    """Whether an author's function has returned a pair. A Tensor of two rows is not one."""
    return isinstance(made, (tuple, list)) and len(made) == 2


def as_pair(who: object, name: str, made: Any) -> tuple[Any, Any]:
    """The pair that an author's function, such as `_fwd`, has returned. Raises unless it is one."""
    if not is_pair(made):
        raise broken_promise(who, f"expected {name} to return {returned(name)}, got {shown(made)}")
    return made


def returned(name: str) -> str:
    """What a layer's function has to return, as messages say it."""
    return "(y, residuals)" if name.endswith("fwd") else "(dparams, dx)"


def shown(value: Any) -> str:
    """A refused value in a message: its code, or its kind and size where the code is long."""
    if isinstance(value, nn.Module):  # torch.nn's ReLU() prints as ours
        return f"{type(value).__name__}, a torch.nn.Module"
    if isinstance(value, type) and is_dataclass(value):
        return f"the class {value.__name__}; did you mean {value.__name__}(…)?"
    code = repr(value)
    if len(code) <= _MOST_CHARACTERS and "\n" not in code:
        return code
    if isinstance(value, Tensor):
        return f"a Tensor of shape {tuple(value.shape)}"
    if hasattr(value, "_describe"):
        return name_of(value)
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, Sized) else code


_MOST_CHARACTERS = 80


def count_of(layers: Sized) -> str:
    """`48 layers`, as a message names the size of a combinator."""
    return f"{len(layers)} layer{'s' if len(layers) != 1 else ''}"


def some(names: Iterable[str]) -> str:
    """The first few of the names, for a message."""
    first = [*islice(names, _MOST_NAMED + 1)]
    return ", ".join([*first[:_MOST_NAMED], *["…"] * (len(first) > _MOST_NAMED)])


_MOST_NAMED = 4


def as_index(who: object, name: str, value: Any) -> int:
    """`value` as an int. Raises TypeError for anything that is not one, bools included."""
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor that torch.func maps over
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name_of(who)}: expected {name} to be an int, got {shown(value)}")
    return number


def as_int(who: object, name: str, value: Any, least: int | None) -> int:
    """`value` as an int. Raises ValueError if it is less than `least`, unless that is None."""
    number = as_index(who, name, value)
    if least is not None and number < least:
        raise ValueError(f"{name_of(who)}: expected {name} >= {least}, got {number}")
    return number


def is_items(value: Any) -> bool:
    """Whether this is a dict, or a tuple of the items of one."""
    if isinstance(value, tuple):
        return all(isinstance(item, tuple) and len(item) == 2 for item in value)
    return isinstance(value, Mapping)


_INF = float("inf")


def as_number(
    who: object, name: str, value: Any, least: float = -_INF, most: float = _INF
) -> float:
    """`value` as an int or a float: files cannot hold the numbers of NumPy and of graphs.

    Raises unless it is a finite number in [least, most].
    """
    if isinstance(value, bool) or not isinstance(value, (Real, SymFloat)):
        raise TypeError(f"{name_of(who)}: expected {name} to be a number, got {shown(value)}")
    number = int(value) if isinstance(value, Integral) else float(value)
    if not (-_INF < number < _INF and least <= number <= most):
        expected = "to be finite" if least == -_INF else f"to be finite and >= {least:g}"
        expected = expected if most == _INF else f"in [{least:g}, {most:g}]"
        raise ValueError(f"{name_of(who)}: expected {name} {expected}, got {value}")
    return number


def as_shape(who: object, shape: Any) -> tuple[int, ...]:
    """The shape of one example as a tuple of ints. Raises unless every size is at least 0."""
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"{name_of(who)}: expected shape to be a tuple of ints, got {shown(shape)}")
    first = shape[0] if shape else 0
    if first is None or (isinstance(first, int) and first == -1):  # as stax and Keras write it
        raise ValueError(
            f"{name_of(who)}: expected the shape of one example, without the batch, "
            f"got {tuple(shape)}"
        )
    return tuple(as_int(who, "every size in shape", size, 0) for size in shape)


def as_axis(who: object, name: str, dim: int, shape: tuple[int, ...]) -> int:
    """The axis ≥ 1 that `dim` means in a batch of examples of `shape`; -1 is the last.

    Raises ValueError where there is none, or where it is the batch.
    """
    axis = dim + len(shape) + 1 if dim < 0 else dim
    if not 1 <= axis <= len(shape):
        raise ValueError(
            f"{name_of(who)}: expected {name} to be an axis after the batch of x of shape "
            f"{sizes(('N', *shape))}, got {dim}"
        )
    return axis


def check_some_channels(who: object, channels: int) -> None:
    """Raise ValueError unless there is at least one channel."""
    if channels < 1:
        raise ValueError(f"{name_of(who)}: expected at least 1 channel, got {channels}")


def check_divided(who: object, name: str, channels: int, what: str = "channels") -> None:
    """Raise ValueError unless there are channels, and a layer's field of this name divides them."""
    check_some_channels(who, channels)
    number = getattr(who, name)
    if channels % number:
        raise ValueError(
            f"{name_of(who)}: expected {what} that {name}={number} divides, got {channels}"
        )


def check_tensor(who: object, name: str, x: Any) -> None:
    """Raise TypeError unless x is a floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name_of(who)}: expected {name} to be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name_of(who)}: expected {name} to be floating-point, got {x.dtype}")


def check_like(who: object, name: str, tensor: Any, x: Any, of: str = "x") -> None:
    """Raise TypeError unless a tensor has the dtype and device of x, which messages call `of`."""
    if not isinstance(tensor, Tensor):
        check_tensor(who, name, tensor)
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise TypeError(
            f"{name_of(who)}: expected {name} to have the dtype and device of {of}, "
            f"{x.dtype} on {x.device}, got {tensor.dtype} on {tensor.device}"
        )


def unwrapped(who: object, residuals: Any) -> tuple[Tensor, Any]:
    """(a tensor without entries for x, residuals), which `fwd` has wrapped up."""
    if isinstance(residuals, tuple) and len(residuals) == 2 and isinstance(residuals[0], Tensor):
        like, kept = residuals
        if isinstance(kept, tuple) and kept and isinstance(kept[0], Tensor) and like.numel():
            expected = "expected residuals, the second of what fwd returns"
            raise TypeError(f"{name_of(who)}: {expected}, got both")
        return residuals
    got = type(residuals).__name__
    raise TypeError(f"{name_of(who)}: expected residuals as fwd returns them, got {got}")


def sizes(shape: Sequence[object]) -> str:
    """A shape as a message shows it, letters for sizes that are not known: `(N, 3, H, W)`."""
    shown = [f"{size}" for size in shape]  # torch.compile has no str of an open size
    return f"({', '.join(shown)}{',' if len(shape) == 1 else ''})"


def listed(shapes: Sequence[object]) -> str:
    """Shapes as a message lists them: `(3, 8), (4, 8)`. torch.compile cannot join open ones."""
    text = f"{shapes[0]}"
    for shape in shapes[1:]:
        text = f"{text}, {shape}"
    return text
