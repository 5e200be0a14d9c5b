"""Model-agnostic meta-learning: a start from which one step of SGD comes near a new sine wave.

    python examples/maml.py             under a minute on two cores

The gradient with respect to the start goes through the step, `fn.SGD.step`, a pure function
(Finn et al., "Model-agnostic meta-learning for fast adaptation of deep networks", 2017).
`runs/maml.png` shows the network before and after one step on ten points of a new wave.
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib import pyplot as plt

import funcnet as fn

OUT = Path("runs/maml.png")
NET = fn.Sequential(fn.Linear(40), fn.ReLU(), fn.Linear(40), fn.ReLU(), fn.Linear(1))
LOSS, SGD = fn.MSE(), fn.SGD(0.02)
TASKS, POINTS = 25, 10


def tasks(key, count):
    """Points of `count` sine waves, a set to learn from and one to be judged on; the waves."""
    a, b, c = fn.split(key, 3)
    height, phase = fn.uniform(a, (count, 1, 1), 0.1, 5.0), fn.uniform(b, (count, 1, 1), 0, math.pi)
    x = fn.uniform(c, (count, 2 * POINTS, 1), -5, 5)
    y = height * torch.sin(x + phase)
    return (x[:, :POINTS], y[:, :POINTS], x[:, POINTS:], y[:, POINTS:]), (height, phase)


def adapt(params, x, y):
    """Parameters after one step on a few points."""
    _, grads = fn.value_and_grad(NET, LOSS)(params, x, y)
    return SGD.step(params, grads, SGD.init(params))[0]


def loss_after(params, x, y, new_x, new_y):
    return LOSS.apply(NET.apply(adapt(params, x, y), new_x), new_y)


def mean_loss_after(params, *points):
    """The mean over many waves of the loss after a step on each."""
    return torch.func.vmap(loss_after, in_dims=(None, 0, 0, 0, 0))(params, *points).mean()


def main(steps=3000):
    params = NET.init(fn.key(0), (1,))
    adam = fn.Adam(fn.schedules.cosine(5e-3, steps))
    state = adam.init(params)
    learn = torch.func.grad(mean_loss_after)
    held_out, waves = tasks(fn.key(1), 500)
    print("step   loss before a step   after it, on 500 new waves")
    for step in range(steps + 1):
        if step % (steps // 5) == 0:
            before = LOSS.apply(NET.apply(params, held_out[2]), held_out[3])
            print(f"{step:4} {before:20.3f} {mean_loss_after(params, *held_out):26.3f}", flush=True)
        grads = learn(params, *tasks(fn.fold_in(fn.key(2), step), TASKS)[0])
        params, state = adam.step_(params, grads, state)
    after = float(mean_loss_after(params, *held_out))
    draw(params, *(part[0] for part in (*held_out[:2], *waves)))
    return after


def draw(params, x, y, height, phase):
    OUT.parent.mkdir(exist_ok=True)
    grid = torch.linspace(-5, 5, 200)[:, None]
    plt.figure(figsize=(7, 4))
    plt.plot(grid, height * torch.sin(grid + phase), "k--", linewidth=0.8, label="a new wave")
    plt.plot(x, y, "k^", label="ten points of it")
    plt.plot(grid, NET.apply(params, grid), label="before")
    plt.plot(grid, NET.apply(adapt(params, x, y), grid), label="after one step of SGD")
    plt.xlabel("x")
    plt.ylabel("y")
    plt.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    plt.tight_layout()
    plt.savefig(OUT, dpi=120)


if __name__ == "__main__":
    shown = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=shown).parse_args()
    main()
