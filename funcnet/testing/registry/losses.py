"""The losses: a row each, with the targets that it takes and its twin in torch.nn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from funcnet.losses import L1, MSE, BCEWithLogits, CrossEntropy, Huber, Loss
from funcnet.testing.registry.row import Choose, choose_settings


@dataclass(frozen=True)
class LossRow:
    """The registry's entry for a loss.

    `twin` makes the torch.nn module that computes the same. `targets` tells the kinds of target
    that a loss takes, names in `TARGETS`; `rank` is the number of axes that x has at least.
    `settings` is as in a layer's row.
    """

    loss: type[Loss]
    twin: Callable[[Any], nn.Module]
    targets: Callable[[Any], tuple[str, ...]] = lambda loss: ("numbers",)
    rank: int = 0
    settings: dict[str, Sequence[Any]] = field(default_factory=dict)

    def draw(self, choose: Choose) -> Loss:
        """A loss with settings chosen at random. Raises ValueError for some that do not fit."""
        return self.loss(**choose_settings(self.loss, self.settings, choose))


def _classes(loss: Any, x: Tensor, generator: torch.Generator) -> Tensor:
    """int64 classes, of x's shape without axis 1; every fourth but the first is to be ignored."""
    shape = (*x.shape[:1], *x.shape[2:])
    classes = torch.randint(x.shape[1], shape, generator=generator, device="cpu")
    ignored = torch.randint(4, shape, generator=generator, device="cpu") == 0
    # The mean over no class is NaN: the first is one that counts, if there are two.
    ignored.reshape(-1)[:1] = False
    classes.reshape(-1)[:1] += classes.reshape(-1)[:1] == loss.ignore_index
    classes.reshape(-1)[:1] %= x.shape[1]
    return torch.where(ignored, loss.ignore_index, classes)


def _probabilities(loss: Any, x: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers in x's shape that add up to 1 along axis 1."""
    return _numbers(loss, x, generator).softmax(1)


def _in_unit(loss: Any, x: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers in [0, 1] in x's shape; both ends are among them."""
    return (_numbers(loss, x, generator) + 0.5).clamp(0, 1)


def _numbers(_: Any, x: Tensor, generator: torch.Generator) -> Tensor:
    """Any numbers in x's shape."""
    return torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu")


TARGETS: dict[str, Callable[[Any, Tensor, torch.Generator], Tensor]] = {
    "numbers": _numbers,
    "in [0, 1]": _in_unit,
    "classes": _classes,
    "probabilities": _probabilities,
}


def draw_target(kind: str, loss: Any, x: Tensor, seed: int) -> Tensor:
    """A target of a kind for a loss of x; floating-point ones have x's dtype."""
    target = TARGETS[kind](loss, x, torch.Generator().manual_seed(seed))
    return target.to(device=x.device, dtype=x.dtype if target.is_floating_point() else None)


def _classes_or_probabilities(loss: Any) -> tuple[str, ...]:
    # Probabilities go with no class to ignore.
    return ("classes", "probabilities") if loss.ignore_index < 0 else ("classes",)


def _same_name(loss: Any) -> nn.Module:
    """The torch.nn module of the loss's name and settings."""
    settings = {f.name: getattr(loss, f.name) for f in fields(loss)}
    twin: nn.Module = getattr(nn, f"{type(loss).__name__}Loss")(**settings)
    return twin


LOSS_ROWS = (
    LossRow(MSE, _same_name),
    LossRow(L1, _same_name),
    LossRow(Huber, _same_name, settings={"delta": [1.0, 0.25, 2.0]}),
    LossRow(BCEWithLogits, _same_name, targets=lambda loss: ("in [0, 1]",)),
    LossRow(
        CrossEntropy,
        _same_name,
        targets=_classes_or_probabilities,
        rank=2,
        settings={"label_smoothing": [0.0, 0.1, 1.0], "ignore_index": [-100, -1, 0, 2]},
    ),
)
