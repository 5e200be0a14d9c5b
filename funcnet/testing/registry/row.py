"""The registry's entry for a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Protocol, TypeVar

from torch import nn

from funcnet.fields import Hyperparameters, Number, OneOf, PerAxis, Whole, kinds
from funcnet.interop.to_torch import NOT_IN_TORCH
from funcnet.layer import Layer, Shape

_Choice = TypeVar("_Choice")


class Choose(Protocol):
    """Takes one of some choices, the simplest first; a Hypothesis strategy does it at random."""

    def __call__(self, choices: Sequence[_Choice]) -> _Choice: ...


@dataclass(frozen=True)
class Row:
    """A layer class: settings to try, examples to try every time, its twin in torch.nn.

    `settings` gives the choices for a hyperparameter, the simplest first; the others' choices
    follow from the kinds of their fields, and what the constructor refuses is drawn again. `build`
    makes a layer where hyperparameters depend on each other. `twin` makes the torch.nn module that
    computes the same from examples of a shape, with parameters of the same names; None where there
    is none. `classes` is the number that the integers in x are below, for a layer that takes them.
    `needs_key` says that the layer refuses to evaluate without a key.
    """

    layer: type[Layer]
    examples: tuple[tuple[Layer, Shape], ...]
    settings: dict[str, Sequence[Any]] = field(default_factory=dict)
    build: Callable[[Choose], Layer] | None = None
    twin: Callable[[Any, Shape], nn.Module] | None = None
    classes: Callable[[Any], int] | None = None
    needs_key: bool = False

    def draw(self, choose: Choose) -> Layer:
        """A layer with settings chosen at random. Raises ValueError for some that do not fit."""
        if self.build is not None:
            return self.build(choose)
        return self.layer(**choose_settings(self.layer, self.settings, choose))


def same_name(layer: Any, _: Shape, *sizes: Any) -> nn.Module:
    """The torch.nn module of the layer's name and settings, which come behind the sizes of x."""
    names = [f.name for f in fields(layer) if f.init and f.name not in NOT_IN_TORCH]
    cls: Any = getattr(nn, type(layer).__name__)
    module: nn.Module = cls(*sizes, **{name: getattr(layer, name) for name in names})
    return module


def choose_settings(
    cls: type[Hyperparameters], settings: Mapping[str, Sequence[Any]], choose: Choose
) -> dict[str, Any]:
    """Each hyperparameter with one of its choices."""
    names = (f.name for f in fields(cls) if f.init)
    return {name: choose(choices(cls, name, settings.get(name))) for name in names}


def choices(cls: type[Hyperparameters], name: str, given: Sequence[Any] | None) -> Sequence[Any]:
    """The choices for a hyperparameter: those given, or what the kind of its field suggests."""
    if given is not None:
        return given
    kind = kinds(cls).get(name)
    default = next(f.default for f in fields(cls) if f.name == name)
    if isinstance(kind, Whole):
        least = 0 if kind.least is None else kind.least
        return [least, least + 1, least + 2, least + 3]
    if isinstance(kind, PerAxis):
        tuples: list[Any] = per_axis(kind.least, kind.least + 2, len(cls._axes or "CHW") - 1)
        return [*tuples, *kind.words, *([None] if kind.may_be_none else [])]
    if isinstance(kind, OneOf):
        return sorted(kind.choices, key=str)
    if isinstance(kind, Number):
        numbers = [default, 0.0, 0.5, 1.0, 2.0, -1.5]
        return [n for n in numbers if n is not MISSING and kind.least <= n <= kind.most]
    if default is MISSING:
        raise TypeError(f"registry: expected settings for {name} of {cls.__name__} in its row")
    return [default]


def per_axis(least: int, most: int, axes: int) -> list[tuple[int, ...]]:
    """Tuples of sizes, one an axis, the simplest first; equal ones come several times.

    One choice from a list, because Hypothesis thinks fewer choices simpler than smaller numbers.
    """
    alike = [(n,) * axes for n in range(least, most + 1)]
    if axes == 1:
        return alike
    others = [
        (*[m] * axis, n, *[m] * (axes - axis - 1))
        for axis in range(axes)
        for m in range(least, most + 1)
        for n in range(least, most + 1)
        if m != n
    ]
    distinct = sorted(set(others), key=lambda sizes: (max(sizes), sizes))
    return alike + distinct + alike * (most - least)
