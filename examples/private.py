"""Handwritten digits learned in private: what clipping and noise cost.

    python examples/private.py          8×8 images from scikit-learn; a few minutes on two cores

DP-SGD (Abadi et al., "Deep learning with differential privacy", CCS 2016): each step takes every
one of M examples with probability q = B/M, clips its gradient gᵢ to the norm C, adds Gaussian noise
to the sum, and divides by B:

    g = (Σᵢ gᵢ·min(1, C/‖gᵢ‖) + σ·C·N(0, 1)) / B

No example moves the sum by more than C, so the noise hides whether it was there. ε says how well:
(ε, δ)-differential privacy with δ = 10⁻⁵. Prints the held-out accuracy for several C and σ, and
draws `runs/private.png`.
"""

import argparse
import math
from pathlib import Path

import optree
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

import funcnet as fn

OUT = Path("runs/private.png")
STEPS, BATCH, DELTA = 300, 128, 1e-5
CLIPS, NOISES = (0.1, 1.0, 10.0), (0.0, 0.5, 1.0, 2.0, 4.0)
LOSS = fn.CrossEntropy()


def network():
    """Group normalisation, since batch normalisation would couple the examples."""
    return fn.Sequential(
        fn.Conv2d(16, 3, padding=1), fn.GroupNorm(4), fn.ReLU(),
        fn.Conv2d(32, 3, stride=2, padding=1), fn.GroupNorm(4), fn.ReLU(),
        fn.Flatten(), fn.Linear(64), fn.ReLU(), fn.Linear(10),
    )  # fmt: skip


def train(net, x, y, key, clip, noise, steps):
    """Parameters after some steps of DP-SGD."""
    init_key, key = fn.split(key)
    params = net.init(init_key, x.shape[1:])
    # A rate in proportion to 1/C makes the noise in a step as large for every C.
    sgd = fn.SGD(fn.schedules.cosine(0.5 / clip, steps), momentum=0.9)
    state, clipped = sgd.init(params), fn.clipped_value_and_grad(net, LOSS, clip)
    for step in range(steps):
        batch_key, noise_key = fn.split(fn.fold_in(key, step))
        batch = fn.bernoulli(batch_key, BATCH / len(x), (len(x),))
        _, total = clipped(params, x[batch], y[batch])
        grads = optree.tree_map(lambda g: g / BATCH, with_noise(total, noise_key, noise * clip))
        params, state = sgd.step_(params, grads, state)
    return params


def with_noise(tree, key, std):
    """The tree with a draw from N(0, std²) added to each of its numbers."""
    leaves, structure = optree.tree_flatten(tree)
    keys = fn.split(key, len(leaves))
    noisy = [x + std * fn.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return optree.tree_unflatten(structure, noisy)


def epsilon(noise, q, steps):
    """ε after `steps` steps, for examples that are added or removed.

    Rényi differential privacy of order α, of the sampled Gaussian mechanism, adds up over steps:
    (α − 1)·ρ(α) = log Σ_k C(α, k)·(1 − q)^(α−k)·q^k·exp(k(k − 1)/2σ²), and ε is the least of
    steps·ρ(α) + log(1/δ)/(α − 1). Mironov et al., arXiv:1908.10530, 2019.
    """
    if not noise:
        return math.inf

    def rho(order):
        terms = [
            math.log(math.comb(order, k)) + (order - k) * math.log1p(-q) + k * math.log(q)
            + k * (k - 1) / (2 * noise**2)
            for k in range(order + 1)
        ]  # fmt: skip
        most = max(terms)
        return (most + math.log(sum(math.exp(t - most) for t in terms))) / (order - 1)

    return min(steps * rho(order) - math.log(DELTA) / (order - 1) for order in range(2, 257))


def main(steps=STEPS, clips=CLIPS, noises=NOISES):
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    order = fn.permutation(fn.key(0), len(x))
    held_out, rest = order[:360], order[360:]
    epsilons = [epsilon(noise, BATCH / len(rest), steps) for noise in noises]
    print(f"held-out accuracy\n{'σ':>24}" + "".join(f"{noise:>9g}" for noise in noises))
    print(f"{'ε':>24}" + "".join(f"{value:>9.3g}" for value in epsilons))
    net, accuracy = network(), {}
    for clip in clips:
        for noise in noises:
            params = train(net, x[rest], y[rest], fn.key(1), clip, noise, steps)
            found = net.apply(params, x[held_out]).argmax(1)
            accuracy[clip, noise] = float((found == y[held_out]).double().mean())
        line = "".join(f"{accuracy[clip, noise]:>9.1%}" for noise in noises)
        print(f"{f'C = {clip:g}':>24}{line}")
    draw(accuracy, clips, noises, epsilons)
    return accuracy


def draw(accuracy, clips, noises, epsilons):
    """Accuracy against the noise, a line for each norm."""
    _, ax = plt.subplots(figsize=(7, 4.5))
    for clip in clips:
        ax.plot(noises, [accuracy[clip, noise] for noise in noises], "o-", label=f"C = {clip:g}")
    labels = [
        f"{noise:g}\n{'∞' if value == math.inf else f'{value:.3g}'}"
        for noise, value in zip(noises, epsilons, strict=True)
    ]
    ax.set_xticks(noises, labels)
    ax.set(xlabel=f"noise σ, and below it ε for δ = {DELTA:g}", ylabel="held-out accuracy")
    ax.set_ylim(0, 1)
    ax.grid(alpha=0.3)
    ax.legend(title="clipped to the norm")
    OUT.parent.mkdir(exist_ok=True)
    plt.tight_layout()
    plt.savefig(OUT, dpi=120)
    print(f"Accuracy against noise: {OUT}")


if __name__ == "__main__":
    shown = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=shown).parse_args()
    main()
