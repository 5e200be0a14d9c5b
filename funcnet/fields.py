"""Hyperparameters: frozen dataclasses whose fields convert and refuse what they are given.

The type of a field says what it takes. `kernel_size: Sizes` turns 3 into (3, 3) for a layer of two
axes and refuses 0, and the layer itself writes no check for that:

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Blur(Hyperparameters):
    ...     kernel_size: Sizes
    ...     bias: Flag = True
    ...
    ...     _axes = "CHW"
    >>> Blur(3) == Blur((3, 3)), Blur((3, 5), bias=False)
    (True, Blur((3, 5), bias=False))
    >>> Blur(0)
    Traceback (most recent call last):
    ValueError: Blur: expected kernel_size >= 1, got 0
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from textwrap import indent
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, TypeAlias, get_type_hints

import torch

from funcnet.checks import as_index, as_int, as_number, shown

if TYPE_CHECKING:
    from typing_extensions import Self

if sys.version_info >= (3, 14):
    # Annotations are evaluated when asked for. They may name what exists for the type checker
    # alone, or what a module defines further down.
    from annotationlib import Format

    signature_of = partial(inspect.signature, annotation_format=Format.FORWARDREF)
    _annotations_of = partial(inspect.get_annotations, format=Format.FORWARDREF)
else:
    signature_of = inspect.signature
    _annotations_of = inspect.get_annotations


class Kind(Protocol):
    """A kind of hyperparameter: what it converts to, and what it refuses."""

    def convert(self, owner: type, name: str, value: Any) -> Any:
        """`value` in canonical form. Raises ValueError or TypeError, naming the owner and field."""


class _OfInit:
    """The signature of a class's `__init__`, which takes the fields, and not of its `__new__`.

    Until Python 3.10, help and inspect ask `__new__` first.
    """

    def __get__(self, value: object | None, cls: type) -> inspect.Signature:
        if value is not None:
            raise AttributeError("__signature__")  # the value may be callable itself
        signature = signature_of(cls.__init__)  # type: ignore[misc]
        _, *parameters = signature.parameters.values()
        return signature.replace(parameters=parameters)


@dataclass(frozen=True)
class Hyperparameters:
    """A value made of hyperparameters: comparable, hashable, picklable, with code for its repr."""

    _axes: ClassVar[str | None] = None
    """A letter for each axis of one example, `CHW`; None for any rank. `…` stands for any axes."""

    __signature__ = _OfInit()

    def __new__(cls, /, *arguments: Any, **named: Any) -> Self:
        """Raise TypeError for torch.nn's arguments that the class does not take, with advice, and
        for arguments of a class that declares fields but is not a dataclass."""
        if not _TORCH_NAMES.isdisjoint(named):
            _refuse_torch_names(cls, arguments, named)
        if (arguments or named) and "__dataclass_fields__" not in vars(cls):
            _expect_dataclass(cls, arguments, named)
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep `@dataclass` from writing a repr of its own."""
        super().__init_subclass__(**kwargs)
        # As the class's own attribute, which the decorator leaves alone.
        cls.__repr__ = cls.__repr__  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        for name, kind in kinds(type(self)).items():
            object.__setattr__(self, name, kind.convert(type(self), name, getattr(self, name)))

    def __repr__(self) -> str:
        return source(self)

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: whatever else is kept is derived from them."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.init}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            # A user's class may keep a field in __slots__, outside of __dict__.
            object.__setattr__(self, name, value)
        self.__post_init__()


def _expect_dataclass(cls: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Raise TypeError for arguments of a class that declares fields but is not a dataclass."""
    declared = _annotations_of(cls)
    if declared and not takes(cls, arguments, named):
        raise TypeError(
            f"{cls.__name__}: expected @dataclass(frozen=True) above the class, which makes "
            f"fields of {', '.join(declared)}"
        )


def takes(cls: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether a constructor takes these arguments; a user's class may give them any names."""
    try:
        signature_of(cls).bind(*arguments, **named)
    except TypeError:
        return False
    return True


def kinds(cls: Any) -> dict[str, Kind]:
    """The kinds of a dataclass's fields, by name. A field of any other type is left alone."""
    if torch.compiler.is_compiling():  # which cannot look into annotations
        from funcnet.compiling import constant

        # Also where all is found: a function that is compiled twice has to make the same calls.
        constant(_find_kinds, cls)
    else:
        _find_kinds(cls)
    found: dict[str, Kind] = cls._kinds
    return found


def _find_kinds(cls: Any) -> None:
    if "_kinds" in vars(cls):
        return
    given = [field for field in fields(cls) if field.init]
    hints = {field.name: _hint(cls, field.name) for field in given}
    parameters = signature_of(cls).parameters.values()
    # The name of the constructor's `*arguments`, if it has any.
    cls._various = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    # torch.compile cannot handle MISSING.
    cls._defaults = {field.name: field.default for field in given if field.default is not MISSING}
    cls._kinds = {
        name: extra
        for name, hint in hints.items()
        for extra in getattr(hint, "__metadata__", ())
        if hasattr(extra, "convert")
    }


def _hint(cls: type, name: str) -> Any:
    """The annotation of a field, evaluated where its class was defined; None where it cannot be."""
    owner = next(base for base in cls.__mro__ if name in _annotations_of(base))
    annotated: Any = SimpleNamespace(__annotations__={name: _annotations_of(owner)[name]})
    # A module that was loaded from a file need not be registered.
    module = sys.modules.get(owner.__module__)
    try:
        namespace = {} if module is None else vars(module)
        return get_type_hints(annotated, namespace, include_extras=True)[name]
    except (NameError, TypeError, AttributeError, SyntaxError):
        return None  # a user's annotation may name what exists for the type checker alone


# --- The code of a value


def source(value: Any, in_lines: bool = False) -> str:
    """The code that builds a value of hyperparameters, defaults left out.

    With `in_lines`, which is for layers made of layers, long code gets a line for each argument.

    A first argument without a default has no name, `Conv2d(8, kernel_size=3)`. A constructor with a
    variable number of arguments gets them all: `Sequential(ReLU(), Sigmoid())`.
    """
    arguments: list[str] = []
    kind_of, defaults, various = kinds(type(value)), type(value)._defaults, type(value)._various
    for position, field in enumerate(field for field in fields(value) if field.init):
        argument = getattr(value, field.name)
        if field.name == various:
            arguments.extend(map(repr, argument))
            continue
        kind, has_default = kind_of.get(field.name), field.name in defaults
        shown = _short(kind, argument)
        code = call("", [*map(repr, shown)]) if in_lines and type(shown) is tuple else repr(shown)
        if position == 0 and not has_default and not field.kw_only:
            arguments.append(code)
        elif not has_default or shown != _short(kind, defaults[field.name]):
            arguments.append(f"{field.name}={code}")
    return call(type(value).__name__, arguments, in_lines)


def call(name: str, arguments: Sequence[str], in_lines: bool = True, brackets: str = "()") -> str:
    """The code of a call, or of a tuple without a name: on one line if it fits, else a line an
    argument. Arguments that have lines themselves are indented.
    """
    left, right = tuple(brackets)
    is_single = not name and brackets == "()" and len(arguments) == 1
    code = f"{name}{left}{', '.join(arguments)}{',' * is_single}{right}"
    if not in_lines or (len(code) <= _MOST_CHARACTERS and "\n" not in code):
        return code
    lines = "".join(f"{indent(argument, '    ')},\n" for argument in arguments)
    return f"{name}{left}\n{lines}{right}"


_MOST_CHARACTERS = 100


def _short(kind: Kind | None, value: Any) -> Any:
    """3 for (3, 3), where that means the same."""
    is_alike = isinstance(kind, PerAxis) and isinstance(value, tuple) and len(set(value)) == 1
    return value[0] if is_alike else value


# --- Kinds


@dataclass(frozen=True)
class Whole:
    """An int that is at least `least`, any int if that is None; some also take None."""

    least: int | None = None
    may_be_none: bool = False

    def convert(self, owner: type, name: str, value: Any) -> int | None:
        if value is None and self.may_be_none:
            return None
        return as_int(owner.__name__, name, value, self.least)


@dataclass(frozen=True)
class AfterBatch:
    """A dimension of x, counted as in torch: any int but 0, which is the batch."""

    def convert(self, owner: type, name: str, value: Any) -> int:
        dim = as_index(owner.__name__, name, value)
        if dim == 0:
            raise ValueError(f"{owner.__name__}: expected {name} not to be 0, the batch, got 0")
        return dim


@dataclass(frozen=True)
class IntTuple:
    """A tuple of ints that are at least `least`, any ints if that is None."""

    least: int | None

    def convert(self, owner: type, name: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{owner.__name__}: expected {name} to be a tuple, got {shown(value)}")
        return tuple(as_int(owner.__name__, f"every entry of {name}", v, self.least) for v in value)


@dataclass(frozen=True)
class PerAxis:
    """An int, or one for each axis after the channels; some also take None, or a word.

    With `entries_may_be_none`, any of the ints may be None.
    """

    least: int
    words: tuple[str, ...] = ()
    may_be_none: bool = False
    entries_may_be_none: bool = False

    def convert(self, owner: Any, name: str, value: Any) -> Any:
        who = owner.__name__
        if owner._axes is None:
            raise TypeError(f"{who}: expected the class to declare _axes, for {name} by axis")
        count = len(owner._axes) - 1
        if value is None and self.may_be_none:
            return value
        if isinstance(value, str) and self.words:
            if value in self.words:
                # Files hold no str of NumPy's.
                return self.words[self.words.index(value)]
            words = " or ".join(f'"{word}"' for word in self.words)
            raise ValueError(
                f"{who}: expected {name} to be an int, {_tuple_of(count)}, {words}, "
                f"got {shown(value)}"
            )
        entries = value if isinstance(value, (tuple, list)) else (value,) * count
        if len(entries) != count:
            raise ValueError(
                f"{who}: expected {name} to be an int or {_tuple_of(count)} of ints, "
                f"got {shown(value)}"
            )
        return tuple(
            entry
            if entry is None and self.entries_may_be_none
            else as_int(who, name, entry, self.least)
            for entry in entries
        )


def _tuple_of(count: int) -> str:
    return {1: "a tuple of one", 2: "a pair", 3: "a triple"}.get(count, f"a tuple of {count}")


@dataclass(frozen=True)
class OneOf:
    """One of some values, by type and value: 1 is not True."""

    choices: tuple[Any, ...]

    def convert(self, owner: type, name: str, value: Any) -> Any:
        for choice in self.choices:
            if type(value) is type(choice) and value == choice:
                return choice
        expected = " or ".join(f'"{c}"' if isinstance(c, str) else repr(c) for c in self.choices)
        error = TypeError if isinstance(self.choices[0], bool) else ValueError
        raise error(f"{owner.__name__}: expected {name} to be {expected}, got {shown(value)}")


READ_OFF = "sizes of x are read off the shape that init is given"
"""What messages say where one of torch.nn's sizes of x came instead of another argument."""


_SIZES_OF_X = (
    "in_features", "num_features", "num_channels", "normalized_shape", "embed_dim", "input_size",
)  # fmt: skip

_ADVICE = {
    **dict.fromkeys(_SIZES_OF_X, READ_OFF),
    **dict.fromkeys(("device", "dtype"), "init takes device and dtype"),
    "inplace": "a Sequential works in place by itself, where nobody else holds the tensor",
    "batch_first": "sequences are (N, T, C)",
    "padding_mode": "padding is zeros",
    "track_running_stats": "fn.moments measures statistics, for fn.for_inference",
    "scale_factor": "it is called scale",
    "activation": "it is a layer of its own, as in Sequential(Linear(8), ReLU())",
    "use_bias": "it is called bias",
    "key": "init, apply, vjp and fwd take the key",
}
"""What messages say, by name, to arguments of torch.nn and others that our layers lack."""

_TORCH_NAMES = frozenset(_ADVICE)  # torch.compile cannot call keys() of a global


def _refuse_torch_names(cls: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Raise TypeError for an argument of torch.nn's that a constructor does not take."""
    known = getattr(cls, "__dataclass_fields__", {})
    theirs = [name for name in named if name in _ADVICE and name not in known]
    if theirs and not takes(cls, arguments, named):
        advice = _ADVICE[theirs[0]]
        alike = ", ".join(name for name in theirs if _ADVICE[name] == advice)
        raise TypeError(f"{cls.__name__}: expected no {alike}: {advice}")


@dataclass(frozen=True)
class BehindSizes(OneOf):
    """A bool at a position where torch.nn has a size: the message for an int says so."""

    choices: tuple[bool, ...] = (True, False)

    def convert(self, owner: type, name: str, value: Any) -> Any:
        if type(value) is int:
            raise TypeError(
                f"{owner.__name__}: expected {name} to be True or False, got {value}: {READ_OFF}"
            )
        return super().convert(owner, name, value)


@dataclass(frozen=True)
class Number:
    """A finite number in [least, most]; or None, if `may_be_none`."""

    least: float = float("-inf")
    most: float = float("inf")
    may_be_none: bool = False

    def convert(self, owner: type, name: str, value: Any) -> Any:
        if value is None and self.may_be_none:
            return None
        return as_number(owner.__name__, name, value, self.least, self.most)


@dataclass(frozen=True)
class BelowOne:
    """A tuple of `count` numbers in [0, 1)."""

    count: int

    def convert(self, owner: type, name: str, value: Any) -> tuple[float, ...]:
        if not isinstance(value, (tuple, list)) or len(value) != self.count:
            raise ValueError(
                f"{owner.__name__}: expected {name} to be {_tuple_of(self.count)} of numbers, "
                f"got {shown(value)}"
            )
        numbers = [as_number(owner.__name__, f"every number in {name}", v, 0.0) for v in value]
        for number in numbers:
            if not number < 1:
                raise ValueError(
                    f"{owner.__name__}: expected every number in {name} < 1, got {number}"
                )
        return tuple(numbers)


@dataclass(frozen=True)
class NumberButZero(Number):
    """A `Number` other than 0."""

    def convert(self, owner: type, name: str, value: Any) -> Any:
        number = super().convert(owner, name, value)
        if number == 0:
            expected = "> 0" if self.least == 0 else "not to be 0"
            raise ValueError(f"{owner.__name__}: expected {name} {expected}, got {value}")
        return number


@dataclass(frozen=True)
class InstanceOf:
    """An instance of a class; or None, if `may_be_none`."""

    cls: type
    expected: str
    may_be_none: bool = False

    def convert(self, owner: type, name: str, value: Any) -> Any:
        if isinstance(value, self.cls) or (value is None and self.may_be_none):
            return value
        raise TypeError(
            f"{owner.__name__}: expected {name} to be {self.expected}, got {shown(value)}"
        )


# --- The types that fields are declared by

Size: TypeAlias = Annotated[int, Whole(1)]
"""An int ≥ 1."""

Index: TypeAlias = Annotated[int, Whole()]
"""An int."""

IndexOrNone: TypeAlias = Annotated[int | None, Whole(may_be_none=True)]
"""An int, or None."""

Axis: TypeAlias = Annotated[int, AfterBatch()]
"""A dimension of x other than the batch, counted as in torch: 1 is the first of an example."""

Sizes: TypeAlias = Annotated[int | tuple[int, ...], PerAxis(1)]
"""An int ≥ 1, or one for each axis; kept as a tuple."""

SizesOrNone: TypeAlias = Annotated[int | tuple[int, ...] | None, PerAxis(1, may_be_none=True)]
"""An int ≥ 1, or one for each axis, kept as a tuple; or None."""

SizesWithNone: TypeAlias = Annotated[
    int | tuple[int | None, ...] | None, PerAxis(1, entries_may_be_none=True)
]
"""An int ≥ 1 or None, or one of these for each axis; kept as a tuple."""

Margins: TypeAlias = Annotated[int | tuple[int, ...], PerAxis(0)]
"""An int ≥ 0, or one for each axis; kept as a tuple."""

Padding: TypeAlias = Annotated[int | tuple[int, ...] | str, PerAxis(0, ("same", "valid"))]
"""An int ≥ 0, or one for each axis, kept as a tuple; or "same" or "valid", as in PyTorch."""

Flag: TypeAlias = Annotated[bool, OneOf((True, False))]
"""True or False."""

Bias: TypeAlias = Annotated[bool, BehindSizes()]
"""True or False. An int is refused as one of torch.nn's sizes."""

Finite: TypeAlias = Annotated[float, Number()]
"""A finite number."""

NonZero: TypeAlias = Annotated[float, NumberButZero()]
"""A finite number other than 0."""

NonNegative: TypeAlias = Annotated[float, Number(0.0)]
"""A finite number ≥ 0."""

Positive: TypeAlias = Annotated[float, NumberButZero(0.0)]
"""A finite number > 0."""

Probability: TypeAlias = Annotated[float, Number(0.0, 1.0)]
"""A number in [0, 1]."""

Fractions: TypeAlias = Annotated[tuple[float, float], BelowOne(2)]
"""A pair of numbers in [0, 1)."""
