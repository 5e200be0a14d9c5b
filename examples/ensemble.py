"""Twenty networks trained as one, by torch.func.vmap over their parameters.

    python examples/ensemble.py         under a minute on two cores

A single network is as sure where it has seen no data as where it has. The networks of an ensemble
disagree there. Their spread is a hint, not a bound: in the gap between the data the truth leaves
the band. `runs/ensemble.png` shows their mean and spread, and whether the intervals hold as many
points as they promise.
"""

import argparse
from pathlib import Path

import optree
import torch
from matplotlib import pyplot as plt

import funcnet as fn

OUT = Path("runs/ensemble.png")
MEMBERS, NOISE = 20, 0.1
NET = fn.Sequential(fn.Linear(64), fn.Tanh(), fn.Linear(64), fn.Tanh(), fn.Linear(1))


def data(key, count):
    """x from two intervals with a gap between them, and y = sin(2x) + x/3 with noise."""
    left, right, noise = fn.split(key, 3)
    shape = (count // 2, 1)
    x = torch.cat([fn.uniform(left, shape, -3, -1), fn.uniform(right, shape, 0.5, 3)])
    return x, truth(x) + fn.normal(noise, x.shape, std=NOISE)


def truth(x):
    return torch.sin(2 * x) + x / 3


def main(steps=800):
    x, y = data(fn.key(0), 60)
    keys = fn.split(fn.key(1), MEMBERS)
    members = [NET.init(key, (1,)) for key in keys]
    params = optree.tree_map(lambda *leaves: torch.stack(leaves), *members)
    resampled = torch.stack([fn.uniform(key, (len(x),), 0, len(x)).long() for key in keys])
    xs, ys = x[resampled], y[resampled]  # each member has seen other points

    adam = fn.Adam(fn.schedules.cosine(1e-2, steps))
    state = adam.init(params)  # one optimiser for the stacked parameters
    loss_and_grads = torch.func.vmap(fn.value_and_grad(NET, fn.MSE()))
    for _ in range(steps):
        losses, grads = loss_and_grads(params, xs, ys)
        params, state = adam.step_(params, grads, state)

    predict = torch.func.vmap(NET.apply, in_dims=(0, None))
    grid = torch.linspace(-4, 4, 400)[:, None]
    fresh_x, fresh_y = data(fn.key(2), 2000)
    shares, promised = coverage(predict(params, fresh_x), fresh_y)
    print(f"{MEMBERS} members, mean loss {float(losses.mean()):.4f}")
    print("promised  held")
    for p, share in zip(promised, shares, strict=True):
        print(f"{p:>8.0%} {share:>5.0%}")
    draw(grid, predict(params, grid), x, y, promised, shares)
    return float(losses.mean())


def coverage(predictions, y):
    """The share of points inside the central interval of the ensemble, for each promised share."""
    promised = [0.1 * i for i in range(1, 10)]
    mean, std = predictions.mean(0), (predictions.var(0) + NOISE**2).sqrt()
    levels = torch.special.ndtr((y - mean) / std)
    return [float(((levels - 0.5).abs() <= p / 2).double().mean()) for p in promised], promised


def draw(grid, curves, x, y, promised, shares):
    OUT.parent.mkdir(exist_ok=True)
    _, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(2, 1))
    mean, std = curves.mean(0)[:, 0], curves.std(0)[:, 0]
    left.fill_between(grid[:, 0], mean - 2 * std, mean + 2 * std, alpha=0.25, label="± 2 std")
    left.plot(grid, mean, label="mean of the ensemble")
    left.plot(grid, truth(grid), "k--", linewidth=0.8, label="truth")
    left.plot(x, y, ".", color="tab:red", label="data")
    left.set(xlabel="x", ylabel="y", ylim=(-4, 4))
    left.legend()
    right.plot([0, 1], [0, 1], "k--", linewidth=0.8)
    right.plot(promised, shares, "o-")
    right.set(xlabel="promised share", ylabel="held share", title="calibration")
    plt.tight_layout()
    plt.savefig(OUT, dpi=120)


if __name__ == "__main__":
    shown = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=shown).parse_args()
    main()
