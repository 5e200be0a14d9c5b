"""A run of training: how it begins, or goes on, and what it leaves in its folder."""

from __future__ import annotations

import argparse
import time
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import funcnet as fn
from denoising import command_line, report
from denoising.data import Data
from denoising.errors import InputError, one_line, warn
from denoising.evaluation import measure
from denoising.progress import Progress, copy, start
from denoising.tiles import Denoiser, stride_of

Schedule = Callable[[int], float]
TrainEpoch = Callable[[fn.Layer, Any, Data, int, Progress], Iterator[Progress]]


@dataclass(frozen=True)
class Recipe:
    """A network and how it is trained."""

    net: fn.Layer
    optimizer: Callable[[Any, float], Any]
    """Made from the learning rate and the momentum."""
    schedule: Callable[[float, int], Schedule]
    """Made from the peak of the learning rate and the number of steps."""
    lr: float
    epochs: int


@dataclass
class Run:
    """The constants of a run, from the first step to the last."""

    options: argparse.Namespace
    recipe: Recipe
    data: Data
    checkpoints: fn.Checkpoints
    began: float
    """Seconds, of time.perf_counter."""
    epoch_began: float = 0.0

    @property
    def net(self) -> fn.Layer:
        return self.recipe.net

    @property
    def lr(self) -> float:
        """The peak of the learning rate."""
        return float(self.options.lr or self.recipe.lr)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.data.noisy) // self.options.batch_size)

    @classmethod
    def begin(
        cls, options: argparse.Namespace, recipe: Recipe, train_epoch: TrainEpoch
    ) -> tuple[Run, Progress]:
        """The run that the options name, and its progress: new, or from the newest checkpoint.

        Nothing is written, or removed of an earlier run, unless all input can be used.
        """
        began = time.perf_counter()
        device = command_line.choose_device(options.device)
        data_key, train_key = fn.split(fn.key(options.seed))
        data = command_line.read_data(options, stride_of(recipe.net), data_key)
        checkpoints = fn.Checkpoints(options.out / "checkpoints", options.keep)
        run = cls(options, recipe, data, checkpoints, began)
        settings = run.settings(device)
        init = run.optimizer([1]).init
        p = start(run.net, init, data.noisy.shape[1:], train_key, device, settings)
        if options.resume:
            p = load(checkpoints, p)
        p = run.with_goal(p, train_epoch)
        checkpoints.save(p.steps, p)  # with the goal, which --minutes would not find again
        if p.steps == 0:
            clear(checkpoints)
        return run, p

    def settings(self, device: torch.device) -> dict[str, Any]:
        """All that the trained parameters depend on, but the goals."""
        names = ("network", "noise", "level", "patches", "batch_size", "momentum", "seed")
        return {
            **{name: getattr(self.options, name) for name in names},
            "lr": self.lr,
            "device": device.type,
            "checksum of the data": self.data.checksum(),
        }

    def with_goal(self, p: Progress, train_epoch: TrainEpoch) -> Progress:
        """The progress with the goal that the options name, unless it has it already.

        Raises InputError for a goal below one that was set before.
        """
        options = self.options
        unit = "minutes" if options.minutes else "epochs"
        before = p.goals[-1] if p.goals else 0.0
        goal = float(options.minutes or options.epochs or before or self.recipe.epochs)
        if p.goals and (options.minutes or options.epochs) and unit != p.unit:
            raise InputError(f"--{unit}: expected --{p.unit}, as in the run to resume")
        if goal == before:
            return p
        if goal < before:
            raise InputError(
                f"--{unit}: expected at least the {before:g} of the run to resume, got {goal:g}"
            )
        if options.minutes:
            steps = max(1, round(60 * (goal - before) / self.seconds_per_step(p, train_epoch)))
        else:
            steps = int(goal - before) * self.steps_per_epoch
        end = p.ends[-1] if p.ends else 0
        return p._replace(unit=unit, goals=[*p.goals, goal], ends=[*p.ends, end + steps])

    def seconds_per_step(self, p: Progress, train_epoch: TrainEpoch) -> float:
        """Seconds of a step, with its share of an epoch's evaluation, by trying on a copy."""
        trial = p._replace(params=copy(p.params), state=copy(p.state), step=0, ends=[10**12])
        optimizer = self.optimizer([10**12])

        def steps() -> Iterator[Progress]:
            while True:
                yield from train_epoch(
                    self.net, optimizer, self.data, self.options.batch_size, trial
                )

        endless = steps()
        seconds = []
        for _ in range(25):
            began = time.perf_counter()
            next(endless)
            seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        measure(Denoiser.of(self.net, trial.params), self.data)
        evaluation = time.perf_counter() - began
        return sum(seconds[5:]) / 20 + evaluation / self.steps_per_epoch

    def optimizer(self, ends: Sequence[int]) -> Any:
        """The optimiser, whose schedule begins anew after each of the goals, which are steps."""
        starts = [0, *ends[:-1]]
        parts = [
            self.recipe.schedule(self.lr, end - begin)
            for begin, end in zip(starts, ends, strict=True)
        ]

        def lr(step: int) -> float:
            i = min(bisect_right(ends, step), len(ends) - 1)
            return parts[i](step - starts[i])

        return self.recipe.optimizer(lr, self.options.momentum)

    def with_bar(self, steps: Iterator[Progress], p: Progress) -> Iterator[Progress]:
        """The same progress, with a bar, from `p` on."""
        self.epoch_began = time.perf_counter()
        with tqdm(
            desc=f"epoch {p.epoch + 1}",
            total=min(p.step + p.steps_left, self.steps_per_epoch),
            initial=p.step,
            unit="step",
            leave=False,
        ) as bar:
            for p in steps:
                bar.set_postfix(loss=f"{p.loss / p.step:.5f}", refresh=False)
                bar.update()
                yield p

    def end_epoch(self, p: Progress) -> Progress:
        """Measure, print and keep the best model."""
        row = {
            "epoch": p.epoch + 1,
            "steps": p.steps,
            "loss": p.loss / p.step,
            **measure(Denoiser.of(self.net, p.params), self.data),
            "seconds": round(time.perf_counter() - self.epoch_began, 2),
        }
        p = p.after_epoch(row)
        report.save_best(self.options.out, self.net, p, self.data)
        print(report.epoch_line(row), flush=True)
        return p

    def finish(self, p: Progress) -> None:
        self.checkpoints.save(p.steps, p)
        report.write_report(self.options.out, self.net, p, self.data)
        seconds = time.perf_counter() - self.began
        print(f"{self.options.out}: written in {seconds:.0f} s")


# --- Checkpoints


def load(checkpoints: fn.Checkpoints, new: Progress) -> Progress:
    """The progress in the newest whole checkpoint, or else `new`, with a warning.

    Raises InputError if all are damaged, or for the checkpoint of another program or run.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        newest = checkpoints.latest()
    for warning in caught:
        warn(one_line(Exception(warning.message)))
    folder = Path(checkpoints.folder)
    if newest is None:
        if files_of(folder):
            raise InputError(f"{folder}: expected a checkpoint that is whole, got none")
        warn(f"{folder}: no checkpoint to resume from; beginning anew")
        return new
    step, p = newest
    if not isinstance(p, Progress):
        path = folder / f"step-{step:08}.safetensors"
        raise InputError(f"{path}: expected a checkpoint of this program, got another tree")
    check(folder, p.settings, new.settings)
    return p.laid_out_as(new)


def check(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on from the checkpoint of another run."""
    wrong = [
        f"{name}: {then.get(name)} then, {now.get(name)} now"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if wrong:
        raise InputError(f"{folder}: cannot resume a run that differs ({'; '.join(wrong)})")


def clear(checkpoints: fn.Checkpoints) -> None:
    """Remove the checkpoints of an earlier run: all but the one of step 0, which is new."""
    for path in files_of(Path(checkpoints.folder))[1:]:
        path.unlink()


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"))
