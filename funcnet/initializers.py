"""Initialisers: how a parameter is drawn from a key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import torch
from torch import Tensor

from funcnet.fields import Finite, Hyperparameters, InstanceOf, NonNegative
from funcnet.keys import Key, check_draw, normal, uniform


@dataclass(frozen=True)
class Initializer(Hyperparameters):
    """A function (key, shape, dtype=None, device=None) -> tensor that is a value.

    A subclass writes `_draw`, or `_range` and `_std` where it draws from such a distribution.
    """

    def __post_init__(self) -> None:
        # A layer's check declares parameters under torch.compile too, where only shapes count.
        if not torch.compiler.is_compiling():
            super().__post_init__()

    def __call__(
        self,
        key: Key,
        shape: Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A tensor of `shape`, drawn from the key; float32 on the CPU unless told otherwise."""
        check_draw(self, key, dtype)
        if device is not None and torch.device(device).type == "meta":
            return torch.empty(tuple(shape), dtype=dtype or torch.float32, device=device)
        return self._draw(key, tuple(shape), dtype or torch.float32, device or "cpu")

    def _draw(
        self, key: Key, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Initializer):
    """One number everywhere.

    >>> import funcnet as fn
    >>> Constant(0.25)(fn.key(0), (2,))
    tensor([0.2500, 0.2500])
    """

    value: Finite

    def _draw(
        self, key: Key, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        return torch.full(shape, self.value, dtype=dtype, device=device)


@dataclass(frozen=True)
class Zeros(Constant):
    """0 everywhere.

    >>> import funcnet as fn
    >>> Zeros()(fn.key(0), (2,))
    tensor([0., 0.])
    """

    value: Finite = 0.0


@dataclass(frozen=True)
class Ones(Constant):
    """1 everywhere.

    >>> import funcnet as fn
    >>> Ones()(fn.key(0), (2,))
    tensor([1., 1.])
    """

    value: Finite = 1.0


@dataclass(frozen=True)
class Uniform(Initializer):
    """Numbers drawn evenly from [low, high).

    Raises ValueError unless both are finite and low ≤ high.

    >>> import funcnet as fn
    >>> bool((Uniform(-1.0, 1.0)(fn.key(0), (1000,)).abs() <= 1).all())
    True
    """

    low: Finite = 0.0
    high: Finite = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low <= self.high:
            raise ValueError(f"Uniform: expected low <= high, got {self.low} and {self.high}")

    def _draw(
        self, key: Key, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        return uniform(key, shape, self.low, self.high, dtype, device)


@dataclass(frozen=True)
class Normal(Initializer):
    """Numbers from the normal distribution N(mean, std²).

    >>> import funcnet as fn
    >>> Normal(std=0.02)(fn.key(0), (2, 3)).shape
    torch.Size([2, 3])
    """

    mean: Finite = 0.0
    std: NonNegative = 1.0

    def _draw(
        self, key: Key, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        return normal(key, shape, self.mean, self.std, dtype, device)


InitializerOrNone: TypeAlias = Annotated[
    Initializer | None,
    InstanceOf(lambda: Initializer, "an initialiser or None", may_be_none=True),
]
"""An initialiser; None where the layer draws as torch.nn does."""
