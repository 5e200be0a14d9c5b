"""Handwritten digits: an MLP and a small ResNet, trained side by side.

    python examples/digits.py           8×8 images from scikit-learn; under a minute on two cores

Prints a line for each network and writes `runs/digits.png`: the ten held-out digits whose true
class got the least probability from the ResNet.
"""

import argparse
import math
from pathlib import Path

import optree
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

import funcnet as fn

OUT = Path("runs/digits.png")
EPOCHS, BATCH = 30, 64


def mlp():
    return fn.Sequential(
        fn.Flatten(), fn.Linear(128), fn.ReLU(), fn.Dropout(0.2), fn.Linear(64), fn.ReLU(),
        fn.Linear(10),
    )  # fmt: skip


def block(channels):
    conv = fn.Conv2d(channels, 3, padding=1)  # used twice, it has parameters twice
    return fn.Residual(fn.Sequential(fn.GroupNorm(4), fn.ReLU(), conv, fn.ReLU(), conv))


def resnet():
    return fn.Sequential(
        stem=fn.Conv2d(16, 3, padding=1), first=block(16),
        down=fn.Conv2d(32, 3, stride=2, padding=1), second=block(32),
        pool=fn.AdaptiveAvgPool2d(1), flat=fn.Flatten(), head=fn.Linear(10),
    )  # fmt: skip


def train(net, x, y, key, epochs):
    """Parameters after some epochs of AdamW, and the loss of the last batch."""
    init_key, key = fn.split(key)
    params = net.init(init_key, x.shape[1:])
    steps = epochs * math.ceil(len(x) / BATCH)
    adam = fn.AdamW(fn.schedules.cosine(3e-3, steps, warmup=50), weight_decay=0.05)
    state = adam.init(params)
    loss_and_grads = fn.value_and_grad(net, fn.CrossEntropy(label_smoothing=0.05))
    for epoch in range(epochs):
        order_key, noise_key = fn.split(fn.fold_in(key, epoch))
        for i, batch in enumerate(fn.permutation(order_key, len(x)).split(BATCH)):
            loss, grads = loss_and_grads(params, x[batch], y[batch], fn.fold_in(noise_key, i))
            params, state = adam.step_(params, grads, state)
    return params, float(loss)


def main(epochs=EPOCHS):
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    order = fn.permutation(fn.key(0), len(x))
    held_out, rest = order[:360], order[360:]
    print(f"{'network':<8} {'parameters':>10} {'last loss':>10} {'held-out accuracy':>18}")
    for name, net in (("mlp", mlp()), ("resnet", resnet())):
        params, loss = train(net, x[rest], y[rest], fn.key(1), epochs)
        probabilities = net.apply(params, x[held_out]).softmax(1)
        accuracy = (probabilities.argmax(1) == y[held_out]).double().mean()
        size = sum(leaf.numel() for leaf in optree.tree_leaves(params))
        print(f"{name:<8} {size:>10,} {loss:>10.3f} {float(accuracy):>18.1%}")
    draw(x[held_out], y[held_out], probabilities)
    return float(accuracy)


def draw(x, y, probabilities):
    """Draw the ten digits whose true class got the least probability, with their likeliest two."""
    least = probabilities[torch.arange(len(y)), y].argsort()[:10]
    _, axes = plt.subplots(2, 5, figsize=(8, 4))
    for ax, i in zip(axes.flat, least.tolist(), strict=True):
        first, second = probabilities[i].argsort(descending=True)[:2].tolist()
        sure, less = (float(probabilities[i, digit]) for digit in (first, second))
        ax.imshow(x[i, 0].numpy(), cmap="gray_r")
        ax.set_title(f"is {y[i]}\n{first}: {sure:.0%}, {second}: {less:.0%}", fontsize=9)
        ax.axis("off")
    OUT.parent.mkdir(exist_ok=True)
    plt.tight_layout()
    plt.savefig(OUT, dpi=120)
    print(f"The ten whose true class got the least probability: {OUT}")


if __name__ == "__main__":
    shown = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=shown).parse_args()
    main()
