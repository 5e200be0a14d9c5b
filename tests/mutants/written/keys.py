"""Bugs in keys and in the numbers drawn from them."""

from __future__ import annotations

from ..mutant import Row, in_file

KEYS = in_file(
    "keys.py",
    "test_keys.py test_errors.py",
    Row(
        "split-ignores-the-key",
        '_derive("split", key, i)',
        '_derive("split", _ROOT, i)',
        "different keys have different children",
    ),
    Row(
        "split-repeats",
        '_derive("split", key, i)',
        '_derive("split", key, i // 2)',
        "the keys of a split are all different",
    ),
    Row(
        "uniform-leaves-its-value",
        "first.item() < low and above.item() < high",
        "first.item() < low",
        "an interval of one number that the dtype does not hold draws that number, rounded",
    ),
    Row(
        "fold-in-collides-with-split",
        '_derive("fold_in", ',
        '_derive("split", ',
        "split(key)[1] and fold_in(key, 1) are different keys",
    ),
    Row(
        "seed-cut-to-32-bits",
        '_uint64("key", "seed", seed))',
        '_uint64("key", "seed", seed) % 2**32)',
        "seeds of 64 bits are all different",
    ),
    Row(
        "bernoulli-complement",
        "(part.size) < p",
        "(part.size) >= p",
        "p is the probability of True",
    ),
    Row("uniform-upper-bound", "* (high - low) + low)", "* high + low)", "draws lie below high"),
    Row(
        "uniform-reaches-high",
        "x.clamp(*_within(low, high, dtype))",
        "x",
        "the interval is half open after rounding, too",
    ),
    Row(
        "normal-scales-its-mean", ".mul_(std).add_(mean)", ".add_(mean).mul_(std)", "N(mean, std²)"
    ),
    Row(
        "float64-drawn-in-float32",
        "np.float64 if dtype == torch.float64 else np.float32",
        "np.float32",
        "float64 numbers have 53 random bits",
    ),
)
