"""Noise2Noise: train a denoiser that never sees a clean image, then use it (docs/denoiser.md).

python examples/denoise.py                                 # on scikit-image's photographs
python examples/denoise.py --pairs SHOTS OTHER_SHOTS       # on your own noisy pairs
python examples/denoise.py --resume                        # go on after a kill, to the same bits
python examples/denoise.py apply runs/denoise/denoiser.safetensors IN.png OUT.png
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from denoising import apply, command_line
from denoising.data import Data, scaled
from denoising.errors import InputError, one_line
from denoising.run import Progress, Recipe, Run
from denoising.tiles import device_of
from torch import Tensor

import funcnet as fn


def conv(channels: int) -> tuple[fn.Layer, ...]:
    return fn.Conv2d(channels, 3, padding=1), fn.ReLU()


def level(inside: int, outside: int, *inner: fn.Layer) -> fn.Layer:
    """A layer that puts x beside what `inner` makes of it at half the size."""
    down, up = fn.Conv2d(inside, 2, stride=2), fn.UpsampleConv2d(outside)
    return fn.Concat(fn.Identity(), fn.Sequential(down, fn.ReLU(), *inner, up, fn.ReLU()))


ZEROS = fn.initializers.Zeros()
LAST = fn.Conv2d(3, 3, padding=1, weight_init=ZEROS, bias_init=ZEROS)  # y = x at the start
LOWER = level(96, 48, *conv(96))
UNET = fn.Residual(fn.Sequential(*conv(24), level(48, 24, LOWER, *conv(48)), *conv(24), LAST))


def train_epoch(
    net: fn.Layer, optimizer: Any, data: Data, batch_size: int, p: Progress
) -> Iterator[Progress]:
    """Take the steps from `p` to the end of the epoch or the goal. Yields progress after each."""
    loss_and_grads = fn.value_and_grad(net, fn.MSE())
    key, device = fn.fold_in(p.key, p.epoch), device_of(p.params)
    order = fn.permutation(key, len(data.noisy))
    for rows in order.split(batch_size)[p.step : p.step + p.steps_left]:
        variant = fn.fold_in(key, p.step)
        x, target = (varied(scaled(t[rows], device), variant) for t in (data.noisy, data.target))
        loss, grads = loss_and_grads(p.params, x, target)
        grads, _ = fn.clip_by_global_norm(grads, max_norm=0.1)
        params, state = optimizer.step_(p.params, grads, p.state)
        p = p.after_step(params, state, float(loss))
        yield p


def train(options: argparse.Namespace) -> None:
    """Train to the goal, with a checkpoint now and then, and the best model after each epoch."""
    run, p = Run.begin(options, RECIPES[options.network], train_epoch)
    optimizer = run.optimizer(p.ends)
    while p.is_under_way:
        steps = train_epoch(run.net, optimizer, run.data, options.batch_size, p)
        for after in run.with_bar(steps, p):
            p = after
            if p.steps % options.checkpoint_every == 0:
                run.checkpoints.save(p.steps, p)
        p = run.end_epoch(p)
    run.finish(p)


def varied(x: Tensor, key: fn.Key) -> Tensor:
    """x flipped and turned in one of eight ways, and gray in one batch of eight."""
    turn, other = fn.permutation(key, 8)[:2].tolist()
    if other == 0:
        x = x[:, fn.permutation(key, 3)[:1].expand(3)]
    x = x.transpose(2, 3) if turn & 4 else x
    return x.flip([axis for axis in (2, 3) if turn & (axis - 1)]).contiguous()


REPORTS_NETWORK = fn.Sequential(
    fn.Conv2d(128, 2, stride=2),
    fn.ReLU(),
    fn.Conv2d(256, 2, stride=2),
    fn.ReLU(),
    fn.UpsampleConv2d(128),
    fn.ReLU(),
    fn.UpsampleConv2d(3),
    fn.Sigmoid(),
)
RECIPES = {
    "unet": Recipe(
        UNET,
        optimizer=lambda lr, momentum: fn.Adam(lr, betas=(momentum, 0.999)),
        schedule=fn.schedules.one_cycle,
        lr=4e-3,
        epochs=6,
    ),
    "report": Recipe(
        REPORTS_NETWORK,
        optimizer=fn.SGD,
        schedule=lambda peak, steps: fn.schedules.cosine(peak, steps, warmup=steps // 10),
        lr=1.0,
        epochs=6,
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; end with one line on stderr and status 1 where its input cannot be used."""
    options = command_line.parse(__doc__, tuple(RECIPES), arguments)
    try:
        {"train": train, "apply": apply.apply}[options.command](options)
    except (InputError, fn.CheckpointError, OSError, MemoryError) as error:
        sys.exit(f"denoise.py: {one_line(error)}")


if __name__ == "__main__":
    main()
