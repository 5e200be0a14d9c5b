"""Bugs in upsampling convolutions that are computed at the low resolution."""

from __future__ import annotations

from ..mutant import Row, in_file

LOW_RESOLUTION = in_file(
    "ops/low_resolution.py",
    "test_upsample_conv.py",
    Row(
        "wrong-phase",
        "[(phase - before + tap) // s for",
        "[(s - 1 - phase - before + tap) // s for",
        "output s·i + a sees through tap t the pixel i + ⌊(a − p + t)/s⌋",
    ),
    Row(
        "off-by-one-padding",
        "[(phase - before + tap) // s for",
        "[(phase - before + tap + 1) // s for",
        "the padding before shifts every window",
    ),
    Row(
        "taps-transposed",
        "return weight.permute(2, 3, 0, 1).flatten(",
        "return weight.permute(3, 2, 0, 1).flatten(",
        "the taps of a kernel are in row-major order",
    ),
    Row(
        "tap-gradients-transposed",
        "dtaps = dkernel.reshape(*window.kernel_size, *weight.shape[:2])",
        "dtaps = dkernel.reshape(*window.kernel_size[::-1], *weight.shape[:2]).transpose(0, 1)",
        "dweight of square kernels has the right shape even when it is transposed",
    ),
    Row(
        "neighbours-that-are-the-same",
        "sums.narrow(dim, half, length)",
        "sums.narrow(dim, 0, length)",
        "b is a sum of s different entries of dy",
    ),
    Row(
        "sums-padded-as-y",
        "((k - 1 - before, k - 1 - after) for",
        "((before, after) for",
        "the first sum that a tap sees starts k − 1 − p before dy",
    ),
    Row(
        "kernel-gradient-of-the-last-chunk",
        "dkernel = widened(dk) if dkernel is None else dkernel.add_(dk)",
        "dkernel = widened(dk)",
        "dweight sums over all chunks",
    ),
    Row(
        "gather-shifts-like-spread",
        "(dy, -q[tap])",
        "(dy, q[tap])",
        "the adjoint of a shift is the shift back",
    ),
    Row(
        "phases-that-see-the-same-lost",
        "merged[-1] = merged[-1][0] + dy, q",
        "merged[-1] = dy, q",
        "what several phases share gets the sum of their gradients",
    ),
    Row(
        "phases-merged-by-their-first-tap",
        "merged[-1][1] == q and",
        "merged[-1][1][0] == q[0] and",
        "phases differ if any tap sees another pixel",
    ),
    Row(
        "copied-from-a-phase-that-differs",
        "same = phase and q == shifts[phase - 1]",
        "same = phase and q[0] == shifts[phase - 1][0]",
        "phases differ if any tap sees another pixel",
    ),
    Row(
        "rest-added-unshifted",
        "target.add_(source.narrow(dim, start + shift, stop - start))",
        "target.add_(source.narrow(dim, start, stop - start))",
        "each tap sees a pixel of its own",
    ),
    Row(
        "third-term-lost",
        "for source in sources[2:]:",
        "for source in sources[3:]:",
        "every tap counts",
    ),
)

TILES = in_file(
    "ops/tiles.py",
    "test_upsample_conv.py",
    Row(
        "chunks-overlap",
        "part = slice(start, start + examples)",
        "part = slice(start, start + examples + 1)",
        "each example is in one tile",
    ),
    Row(
        "chunk-written-to-the-start",
        "        dx[tile.source] = dtile\n",
        "        dx[: len(dtile)] = dtile\n",
        "each tile has its place in the batch",
    ),
    Row(
        "overlaps-written-over",
        "dx[tile.source].add_(dtile)",
        "dx[tile.source].copy_(dtile)",
        "pixels that two tiles see have the sum of both gradients",
    ),
)

PHASES = in_file(
    "ops/phases.py",
    "test_upsample_conv.py",
    Row(
        "phases-from-the-first-window",
        "phases.starts[phase] - phases.starts[0]",
        "0",
        "a phase sees through its first window the pixels from q_a on",
    ),
    Row(
        "phases-of-rows-by-one-kernel",
        "rows.kernels[a], columns.kernels[b]",
        "rows.kernels[0], columns.kernels[b]",
        "phases see different sums of taps",
    ),
    Row(
        "sums-of-taps-that-overflow",
        "not math.isfinite(kernel.detach().sum().item())",
        "False",
        "y is finite where a sum of taps is not, if its products are",
    ),
)
