"""What the registry says of a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import nn

from funcnet.layer import Layer, Shape

_Choice = TypeVar("_Choice")


class Choose(Protocol):
    """Takes one of some choices, the simplest first; a Hypothesis strategy does it at random."""

    def __call__(self, choices: Sequence[_Choice]) -> _Choice: ...


@dataclass(frozen=True)
class Row:
    """A layer class: settings to try, examples worth trying every time, its twin in torch.nn.

    `settings` gives the choices for a hyperparameter, the simplest first; the others' follow from
    the kinds of their fields, and what the constructor refuses is drawn again. `build` makes a layer
    where hyperparameters depend on each other. `twin` makes the torch.nn module that computes the
    same from examples of a shape, with parameters of the same names; None where there is none.
    `classes` is the number that integers in x are below, for a layer that takes integers.
    """

    layer: type[Layer]
    examples: tuple[tuple[Layer, Shape], ...]
    settings: dict[str, Sequence[Any]] = field(default_factory=dict)
    build: Callable[[Choose], Layer] | None = None
    twin: Callable[[Any, Shape], nn.Module] | None = None
    classes: Callable[[Any], int] | None = None
