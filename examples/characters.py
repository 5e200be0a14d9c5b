"""A small transformer that learns to write, character by character, from Python's own help texts.

    python examples/characters.py       about two minutes on two cores

Prints the loss as it falls, in bits a character, and a sample; draws `runs/characters.png`.
"""

import argparse
import math
from pathlib import Path
from pydoc_data.topics import topics

import torch
from matplotlib import pyplot as plt

import funcnet as fn

OUT = Path("runs/characters.png")
LENGTH, WIDTH, HEADS, DEPTH, BATCH = 64, 96, 4, 3, 32
TEMPERATURE = 0.8


def block():
    attend = fn.MultiheadAttention(HEADS, causal=True)
    think = fn.Sequential(fn.Linear(4 * WIDTH), fn.GELU(), fn.Linear(WIDTH))
    return fn.Sequential(
        attend=fn.Residual(fn.Sequential(fn.LayerNorm(), attend)),
        think=fn.Residual(fn.Sequential(fn.LayerNorm(), think)),
    )


def transformer(characters):
    return fn.Sequential(
        embed=fn.Embedding(characters, WIDTH, weight_init=fn.initializers.Normal(std=0.02)),
        position=fn.PositionalEmbedding(LENGTH), blocks=fn.Repeat(block(), DEPTH),
        norm=fn.LayerNorm(), head=fn.Linear(characters), classes=fn.Permute(0, 2, 1),
    )  # fmt: skip


def main(steps=600):
    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = sorted(set(text))
    numbers = {character: i for i, character in enumerate(alphabet)}
    data = torch.tensor([numbers[character] for character in text])
    net = transformer(len(alphabet))
    params = net.init(fn.key(0), (LENGTH,))
    adam = fn.AdamW(fn.schedules.one_cycle(3e-3, steps))
    state, losses = adam.init(params), []
    loss_and_grads = fn.value_and_grad(net, fn.CrossEntropy())
    for step in range(steps):
        key = fn.fold_in(fn.key(1), step)
        starts = fn.uniform(key, (BATCH, 1), 0, len(data) - LENGTH - 1).long()
        windows = data[starts + torch.arange(LENGTH + 1)]
        loss, grads = loss_and_grads(params, windows[:, :-1], windows[:, 1:])
        grads, _ = fn.clip_by_global_norm(grads, 1.0)
        params, state = adam.step_(params, grads, state)
        losses.append(float(loss) / math.log(2))
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:4}  {losses[-1]:.2f} bits a character", flush=True)
    sample = write(net, params, data[:LENGTH].tolist(), fn.key(2), alphabet)
    print(f"\n{sample}\n")
    draw(losses)
    return losses


def write(net, params, context, key, alphabet, count=300):
    """Characters drawn one after the other, each from what the network makes of those before."""
    written = list(context)
    for i in range(count):
        logits = net.apply(params, torch.tensor([written[-LENGTH:]]))[0, :, -1]
        # With Gumbel's noise added, the largest is a draw from the softmax.
        noise = -(-fn.uniform(fn.fold_in(key, i), logits.shape, 1e-9).log()).log()
        written.append(int((logits / TEMPERATURE + noise).argmax()))
    return "".join(alphabet[i] for i in written[len(context) :])


def draw(losses):
    OUT.parent.mkdir(exist_ok=True)
    plt.figure(figsize=(6, 3.5))
    plt.plot(losses, linewidth=0.8)
    plt.xlabel("step")
    plt.ylabel("training loss [bits a character]")
    plt.tight_layout()
    plt.savefig(OUT, dpi=120)


if __name__ == "__main__":
    shown = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=shown).parse_args()
    main()
