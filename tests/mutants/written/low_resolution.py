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
        "dtaps = dkernel.reshape(kh, kw, *weight.shape[:2])",
        "dtaps = dkernel.reshape(kw, kh, *weight.shape[:2]).transpose(0, 1)",
        "dweight of square kernels has the right shape even when it is transposed",
    ),
    Row(
        "kernel-gradient-of-the-last-chunk",
        "dkernel = dk if dkernel is None or dk is None else dkernel.add_(dk)",
        "dkernel = dk",
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
