"""Write a layer of your own, let funcnet find the mistake in its gradient, and mend it.

    python examples/verify_your_layer.py

The layer is a gate with a learned slope a for each channel, y = x · σ(a·x), known as Swish. With
z = a·x and the gradient dy of y,

    dx = dy · (σ(z) + z · σ′(z))
    da = Σ dy · x² · σ′(z)        over the images and their pixels, for each channel
"""

import argparse
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funcnet as fn
from funcnet.testing import GradientMismatch, check_vjp, strategies


@dataclass(frozen=True)
class Hasty(fn.Layer):
    """The gate with a mistake. It trains all the same, only worse."""

    start: float = 1.0
    _axes = "CHW"

    def _params(self, shape):
        return {"slope": fn.Param((shape[0], 1, 1), fn.initializers.Constant(self.start))}

    def _fwd(self, params, x, key):
        gate = torch.sigmoid(params["slope"] * x)
        return x * gate, (x, gate)

    def _bwd(self, params, residuals, dy, need):
        x, gate = residuals
        bend = gate * (1 - gate)
        dslope = (dy * x.square() * bend).mean(0).sum((1, 2), keepdim=True)
        return {"slope": dslope}, dy * (gate + params["slope"] * x * bend)


@dataclass(frozen=True)
class Gate(Hasty):
    """The gate, mended: the gradient of a sum over the batch is a sum."""

    def _bwd(self, params, residuals, dy, need):
        x, gate = residuals
        bend = gate * (1 - gate)
        dslope = (dy * x.square() * bend).sum((0, 2, 3))[:, None, None]
        return {"slope": dslope}, dy * (gate + params["slope"] * x * bend)


@settings(max_examples=50, deadline=None, database=None)
@given(strategies.cases(st.builds(Gate, st.floats(-3, 3))))
def test_gate(case):
    """Check any slope, shape, batch, dtype and memory layout. A failure shrinks to the smallest."""
    check_vjp(*case)


def main():
    x = fn.normal(fn.key(1), (4, 3, 5, 5))

    layer = Hasty()
    params = layer.init(fn.key(0), (3, 5, 5))
    try:
        check_vjp(layer, params, x)
    except GradientMismatch as mismatch:
        print(f"The first try.\n\n{mismatch}\n")

    check_vjp(Gate(), params, x)
    net = fn.Sequential(fn.Conv2d(6, 3, padding=1), Gate(), fn.Upsample2d(2))
    check_vjp(net, net.init(fn.key(0), (3, 5, 5)), x)
    print("Mended: the gradient is right, alone and inside a network.")

    test_gate()
    print("It is right in 50 random cases too, as a property test runs them.")


if __name__ == "__main__":
    shown = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=shown).parse_args()
    main()
