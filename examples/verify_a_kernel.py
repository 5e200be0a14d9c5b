"""Find the mistake in the gradient of a kernel that does not use funcnet, and mend it.

    python examples/verify_a_kernel.py

The kernel is root-mean-square normalisation with a learned weight, y = w ∘ x / r, where
r = √(mean of x² + ε) over the last axis, as a `torch.autograd.Function`. With g for the gradient
of y and n = w ∘ g,

    dx = (n − x · mean(n ∘ x) / r²) / r
    dw = Σ g ∘ x / r            over the rows
"""

import argparse

import torch

from funcnet.testing import GradientMismatch, check_function

EPS = 1e-5


class Hasty(torch.autograd.Function):
    """The normalisation with a mistake that shows only in the first layer of a network."""

    @staticmethod
    def forward(x, weight):
        r = (x.square().mean(-1, keepdim=True) + EPS).sqrt()
        return weight * x / r, r

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        if not ctx.needs_input_grad[0]:
            return None, None  # nothing to do
        x, weight, r = ctx.saved_tensors
        scaled = weight * grad
        dx = (scaled - x * (scaled * x).mean(-1, keepdim=True) / r.square()) / r
        return dx, (grad * x / r).sum(tuple(range(x.ndim - 1)))


class RMSNorm(Hasty):
    """The normalisation, mended: each gradient is computed where it, and not another, is needed."""

    @staticmethod
    def backward(ctx, grad, _):
        x, weight, r = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            scaled = weight * grad
            dx = (scaled - x * (scaled * x).mean(-1, keepdim=True) / r.square()) / r
        if ctx.needs_input_grad[1]:
            dweight = (grad * x / r).sum(tuple(range(x.ndim - 1)))
        return dx, dweight


def plain(x, weight):
    """The normalisation in PyTorch's own operations, as a reference."""
    r = (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    return weight * x / r, r


def main():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 8, generator=generator)
    weight = torch.randn(8, generator=generator)

    double = [t.double().requires_grad_() for t in (x, weight)]
    passes = torch.autograd.gradcheck(lambda *inputs: Hasty.apply(*inputs)[0], double)
    print(f"torch.autograd.gradcheck passes: {passes}\n")
    try:
        check_function(Hasty, x, weight)
    except GradientMismatch as mismatch:
        print(f"check_function does not.\n\n{mismatch}\n")

    check_function(RMSNorm, x, weight, reference=plain)
    check_function(RMSNorm, x.bfloat16(), weight.bfloat16(), reference=plain)
    print("Mended: right in float32 and bfloat16, for each input alone, in any memory layout.")


if __name__ == "__main__":
    shown = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=shown).parse_args()
    main()
