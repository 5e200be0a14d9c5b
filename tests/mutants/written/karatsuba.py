"""Bugs in the convolutions that save products by Karatsuba's method."""

from __future__ import annotations

from ..mutant import Row, in_file

KARATSUBA = in_file(
    "ops/karatsuba.py",
    "test_karatsuba.py",
    Row(
        "rows-of-taps-for-columns",
        "for h in down for w in across",
        "for w in across for h in down",
        "the taps of a kernel are in row-major order",
    ),
    Row(
        "sums-of-two-taps-swapped",
        "((0.0, 0.0, 1.0), (0.0, 1.0, 1.0)),",
        "((0.0, 1.0, 1.0), (0.0, 0.0, 1.0)),",
        "of a pair, the first output sees one tap of the second pixel, the other two",
    ),
    Row(
        "even-pairs-without-the-second-pixel",
        "    even.sub_(a)\n",
        "    even.sub_(b)\n",
        "S·(x_i + x_{i+1}) holds products with both pixels too many",
    ),
    Row(
        "odd-pairs-with-the-pixels-swapped",
        "a[..., :-1, :], b[..., 1:, :]",
        "a[..., 1:, :], b[..., :-1, :]",
        "the pair of odd i sees x_i and x_{i+1}, not the two beyond",
    ),
    Row(
        "first-output-from-the-first-entry",
        "line[..., 0].copy_(b[..., 0, 1])",
        "line[..., 0].copy_(b[..., 0, 0])",
        "the first output is the second entry of its pair",
    ),
    Row(
        "last-output-from-the-second-entry",
        "line[..., -1].copy_(a[..., -1, 0])",
        "line[..., -1].copy_(a[..., -1, 1])",
        "the last output is the first entry of its pair",
    ),
    Row(
        "gradient-of-the-first-output-lost",
        "    db[..., 0, 1].add_(line[..., 0])\n",
        "",
        "the first output has a gradient, too",
    ),
    Row(
        "gradient-of-the-last-output-misplaced",
        "da[..., -1, 0].add_(line[..., -1])",
        "da[..., -1, 1].add_(line[..., -1])",
        "the last output is the first entry of its pair",
    ),
    Row(
        "gradient-of-the-sum-to-one-pixel",
        "inplace.add_into(strided(dx, 1, 2, dim), dodd, dboth)",
        "strided(dx, 1, 2, dim).copy_(dodd)",
        "what is multiplied with a sum reaches both of its terms",
    ),
    Row(
        "kernel-gradients-of-a-factor-lost",
        "(dtaps[0] + dtaps[1] + dtaps[2])",
        "(dtaps[0] + dtaps[1])",
        "the taps are in the kernels of every factor",
    ),
    Row(
        "any-padding",
        "window == _WINDOW",
        "window.kernel_size == _WINDOW.kernel_size",
        "the pairs lie like this when one pixel is padded on every side",
    ),
    Row(
        "odd-heights",
        "height % 2 == width % 2 == 0",
        "width % 2 == 0",
        "the pixels go in pairs",
    ),
)
