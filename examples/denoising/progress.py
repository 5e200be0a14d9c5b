"""The tree that training carries from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch

import funcnet as fn
from denoising.errors import InputError
from denoising.evaluation import score
from denoising.tiles import Tree


@fn.register_node
class Progress(NamedTuple):
    """A checkpoint is this tree in a file."""

    settings: dict[str, Any]
    """All that the trained parameters depend on. A resumed run must share them."""
    unit: str
    """The unit of the goals: epochs or minutes."""
    goals: list[float]
    """The goals, in that unit, each larger than the last."""
    ends: list[int]
    """The number of steps at which each of these goals is reached."""
    key: fn.Key
    params: Tree
    state: Tree
    epoch: int
    """Epochs that are done. The last one of a goal may be shorter."""
    step: int
    """Steps done of the epoch that has begun."""
    loss: float
    """The sum of these steps' losses."""
    best: Tree
    """The parameters of the best epoch."""
    history: list[dict[str, float]]

    @property
    def steps(self) -> int:
        """All steps done."""
        return int(self.state.step)

    @property
    def steps_left(self) -> int:
        """Steps to the next goal; 0 where a goal has just ended an epoch."""
        if self.step and self.steps in self.ends:
            return 0
        return next((end - self.steps for end in self.ends if end > self.steps), 0)

    @property
    def is_under_way(self) -> bool:
        """Whether there are steps to do, or an epoch to end."""
        return self.steps_left > 0 or self.step > 0

    def after_step(self, params: Tree, state: Tree, loss: float) -> Progress:
        """Return the progress after a step. Raises InputError where the loss is not finite."""
        if not math.isfinite(loss):
            raise InputError(f"epoch {self.epoch + 1}: the loss is {loss}; try a smaller --lr")
        return self._replace(params=params, state=state, step=self.step + 1, loss=self.loss + loss)

    def after_epoch(self, row: dict[str, float]) -> Progress:
        """The progress at the start of the next epoch."""
        if not math.isfinite(score(row)):
            raise InputError(f"epoch {self.epoch + 1}: the loss is nan; try a smaller --lr")
        is_best = score(row) > max(map(score, self.history), default=-math.inf)
        return self._replace(
            epoch=self.epoch + 1,
            step=0,
            loss=0.0,
            best=copy(self.params) if is_best else self.best,
            history=[*self.history, row],
        )

    def laid_out_as(self, new: Progress) -> Progress:
        """The same numbers in the memory of `new`, on its device.

        A file does not keep the order of a tensor's elements in memory. Sums are rounded in that
        order, so a resumed run would differ in its last bits from one that was never killed.
        """
        trees = (self.params, self.state, self.best)
        theirs = (new.params, new.state, new.best)
        params, state, best = optree.tree_map(lambda ours, x: x.copy_(ours), trees, theirs)
        return self._replace(params=params, state=state, best=best)


def start(
    net: fn.Layer,
    init_state: Callable[[Tree], Tree],
    shape: Sequence[int],
    key: fn.Key,
    device: torch.device,
    settings: dict[str, Any],
) -> Progress:
    """New parameters for images of `shape`, and no goal yet."""
    init_key, shuffle_key = fn.split(key)
    params = net.init(init_key, shape, device=device)
    return Progress(
        settings=settings,
        unit="epochs",
        goals=[],
        ends=[],
        key=shuffle_key,
        params=params,
        state=init_state(params),
        epoch=0,
        step=0,
        loss=0.0,
        best=copy(params),
        history=[],
    )


def copy(tree: Tree) -> Tree:
    """`step_` writes into the parameters and its state: what is to stay is copied."""
    return optree.tree_map(torch.clone, tree)
