"""An upsampling convolution tile by tile, so that what is made between two passes fits the cache.

In one dimension, with upsampling by s, k taps and padding p before, output e sees through tap t the
pixel ⌊(e − p + t)/s⌋. The outputs a … b − 1 thus see the pixels from ⌊(a − p)/s⌋ to
⌊(b − 1 − p + k − 1)/s⌋ and no others. With r for the first of these, and e′ = e − a,

    ⌊(e − p + t)/s⌋ = r + ⌊(e′ − p′ + t)/s⌋,    p′ = p − a + s·r:

a tile of y is the same convolution of a tile of x, with p′ for p. The tiles of y lie side by side,
while those of x overlap by the reach of a kernel. So dweight is the sum of the tiles' dweight, and
dx the sum of the tiles' dx, each in its place. Where p′ is negative, pixels are cropped. With a
stride, its multiples stand for a and b − 1, and with dilation, the kernel's reach for k.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from torch import Tensor

from funcnet.ops.window import Pair, Window


class Tile(NamedTuple):
    """A part of x, the part of y that sees no more of x, and the window from one to the other."""

    source: tuple[slice, ...]
    target: tuple[slice, ...]
    window: Window
    overlaps: bool
    """Whether other tiles see some of the same pixels."""


class _Span(NamedTuple):
    """A tile's part of one axis."""

    source: slice
    target: slice
    sides: Pair


def cut(x: Tensor, scale: Pair, window: Window, entries: int, most: int) -> Iterator[Tile]:
    """Yield tiles of x (N, C, H, W), of about `most` entries where a pixel has `entries`.

    A tile is a few whole images, or else part of one: nearly a square, since squares overlap least,
    and twice as large, for the same reason.
    """
    batch, _, height, width = x.shape
    pixels = max(1, most // max(1, entries))
    if height * width <= _SLACK * pixels:
        examples = max(1, math.ceil(batch / max(1, math.ceil(batch * height * width / pixels))))
        for start in range(0, max(batch, 1), examples):
            part = slice(start, start + examples)
            yield Tile((part,), (part,), window, overlaps=False)
        return
    pixels *= 2
    columns = min(width, max(math.isqrt(pixels), pixels // height, 1))
    lengths = max(1, pixels // columns), columns
    spans = [
        list(_spans(axis, length, x.shape[2:], scale, window))
        for axis, length in enumerate(lengths)
    ]
    every = slice(None)
    for example, rows, across in product(range(batch), *spans):
        part = slice(example, example + 1)
        yield Tile(
            (part, every, rows.source, across.source),
            (part, every, rows.target, across.target),
            Window(window.kernel_size, sides=(rows.sides, across.sides)),
            overlaps=True,
        )


def behind(
    part: Sequence[slice], size: Sequence[int], window: Window, scale: Sequence[int] = ()
) -> tuple[tuple[slice, ...], Window]:
    """(source, window): what a part of y sees of x, whose axes have `size`, and the window there.

    y is what the window makes of x, or of x upsampled by `scale`.
    """
    axes = zip(part, size, scale or (1,) * len(part), strict=True)
    found = [_seen(axis, own, n, window, s) for axis, (own, n, s) in enumerate(axes)]
    sides = tuple(span.sides for span in found)
    return tuple(span.source for span in found), replace(window, sides=sides)


def put(dtile: Tensor | None, dx: Tensor | None, tile: Tile, x: Tensor) -> Tensor | None:
    """dx, None before the first tile, with the gradient of a tile added in its place."""
    if dtile is None or dtile.shape == x.shape:
        return dtile
    if dx is None:
        dx = dtile.new_empty_strided(x.shape, x.stride())
        dx = dx.zero_() if tile.overlaps else dx
    if tile.overlaps:
        dx[tile.source].add_(dtile)
    else:
        dx[tile.source] = dtile
    return dx


_SLACK = 4
"""The multiple of `most` entries up to which an image is not cut.

In `examples/denoise.py`, images of 256×256 pixels are faster whole: measured on an AMD EPYC
(Zen 4)."""


def _spans(
    axis: int, length: int, size: Sequence[int], scale: Pair, window: Window
) -> Iterator[_Span]:
    """Yield spans of about `length` pixels, equally long."""
    n, s = size[axis], scale[axis]
    count = window.count([s * n for s, n in zip(scale, size, strict=True)])[axis]
    blocks = -(-count // s)
    length = -(-blocks // -(-blocks // length))
    for a in range(0, blocks, length):
        yield _seen(axis, slice(s * a, min(s * (a + length), count)), n, window, s)


def _seen(axis: int, target: slice, n: int, window: Window, s: int) -> _Span:
    """The span of the outputs `target`, on an axis where x has n pixels."""
    start = window.stride[axis] * target.start - window.sides[axis][0]
    stop = window.stride[axis] * (target.stop - 1) - window.sides[axis][0] + window.reach[axis]
    first = min(max(0, start // s), n - 1)
    last = max(min(n - 1, (stop - 1) // s), first)
    return _Span(slice(first, last + 1), target, (s * first - start, stop - s * (last + 1)))
