"""Bugs where a network goes through a large image tile by tile."""

from __future__ import annotations

from ..mutant import Row, in_file

_RUNNING = in_file(
    "running.py",
    "test_tiling.py",
    Row(
        "tiles-of-another-formula",
        'return layer._tile(shape, part) if writes(layer, "_tile") else None',
        "return layer._tile(shape, part)",
        "a subclass that changes the formula has not said which part of x it sees",
    ),
)

_OPS = in_file(
    "ops/tiles.py",
    "test_tiling.py",
    Row(
        "tile-without-the-stride",
        "start = window.stride[axis] * target.start",
        "start = target.start",
        "window i starts at stride · i",
    ),
    Row(
        "tile-short-of-the-reach",
        "+ window.reach[axis]\n",
        "+ window.kernel_size[axis]\n",
        "a dilated kernel sees further than it has taps",
    ),
)

_CROPPED = in_file(
    "combinators/cropped.py",
    "test_tiling.py",
    Row(
        "places-counted-from-the-image",
        "slice(own.start - all_.start, own.stop - all_.start)",
        "slice(own.start, own.stop)",
        "a tile's places are counted from where it starts",
    ),
    Row(
        "placed-from-the-other-end",
        "for side in (own.start, n - own.stop)]",
        "for side in (n - own.stop, own.start)]",
        "dx of a part lies where the part was",
    ),
)

_TILING = in_file(
    "combinators/tiling.py",
    "test_tiling.py",
    Row(
        "rows-left-over",
        "for start in range(0, n, length)]",
        "for start in range(0, n - length + 1, length)]",
        "the last tile may be shorter",
    ),
    Row(
        "gradients-of-tiles-written-over",
        "cropped(dx, tile.source, tile.examples).add_(dsource)",
        "cropped(dx, tile.source, tile.examples).copy_(dsource)",
        "a pixel that several tiles see has the sum of their gradients",
    ),
)

_SUMMATION = in_file(
    "ops/summation.py",
    "test_tiling.py",
    Row(
        "trees-added-in-bfloat16",
        "total = optree.tree_map(widened, first)",
        "total = first",
        "many small terms would be lost in a sum of 16 bits",
    ),
)

_BFLOAT16 = in_file(
    "ops/bfloat16.py",
    "test_half_precision.py",
    Row(
        "kernel-not-turned",
        "columns.taps].flip(2, 3))",
        "columns.taps])",
        "dx is a convolution by the kernel turned round",
    ),
    Row(
        "taps-without-the-padding",
        "q, tap = divmod(first + p, s)",
        "q, tap = divmod(first, s)",
        "with padding, other taps see a pixel",
    ),
    Row(
        "phases-short-of-the-last-pixels",
        "pixels - count + q\n",
        "pixels - count\n",
        "as many pixels come out as there are",
    ),
    Row(
        "last-examples-alone",
        "dkernel if total is None else widened(total).add_(dkernel)",
        "dkernel",
        "dK is the sum over all examples",
    ),
    Row(
        "examples-added-in-bfloat16",
        "widened(total).add_(dkernel)",
        "total.add_(dkernel)",
        "many small terms would be lost in a sum of 16 bits",
    ),
    Row(
        "gradients-of-few-columns",
        "min(*x.shape[2:], *grad.shape[2:]) >= _LARGE",
        "min(x.shape[2], grad.shape[2]) >= _LARGE",
        "PyTorch's gradients in bfloat16 are wrong for images of few columns",
    ),
)

_FEW_CHANNELS = in_file(
    "ops/few_channels.py",
    "test_few_channels.py",
    Row(
        "taps-not-in-reverse",
        "turned = weight.flip(2, 3)",
        "turned = weight",
        "dx is a convolution by the taps in reverse",
    ),
    Row(
        "sides-of-dx-exchanged",
        "(k - 1 - before, k - 1 - after)",
        "(k - 1 - after, k - 1 - before)",
        "what y was padded by before x, dx is not",
    ),
    Row(
        "dx-the-slower-way",
        "return to_few and is_faster, from_few and is_faster",
        "return to_few and is_faster, to_few and is_faster",
        "dx of many channels is slower so",
    ),
)

_LOW_RESOLUTION = in_file(
    "ops/low_resolution.py",
    "test_half_precision.py",
    Row(
        "sums-in-bfloat16",
        "torch.unflatten(native.upcast(made), 1,",
        "torch.unflatten(made, 1,",
        "each sum would be rounded to bfloat16",
    ),
)

TILING = (
    *_RUNNING,
    *_OPS,
    *_CROPPED,
    *_TILING,
    *_SUMMATION,
    *_BFLOAT16,
    *_FEW_CHANNELS,
    *_LOW_RESOLUTION,
)
