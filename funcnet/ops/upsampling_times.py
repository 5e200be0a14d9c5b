"""The times that the implementations of an upsampling convolution take on the CPU, by their sizes.

Each is a sum over what is computed and what is read and written, in nanoseconds: for an image of
`pixels` pixels in all, before upsampling, and a weight of shape (O, C, kh, kw).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from funcnet.ops.phases import Phases
from funcnet.ops.window import Ints, Pair


class LowResolution(NamedTuple):
    """z = K·x for each pixel, tap and channel of y, then sums along both axes."""

    call: float
    product: float
    z: float
    """To write and read an entry of z."""
    half: float
    """The same for z summed along one axis."""
    pixel: float
    """For a pixel of x, whatever its channels."""

    def of(self, pixels: int, shape: Ints, scale: Pair) -> float:
        out_channels, channels, kh, kw = shape
        entry = self.product * channels + self.z + self.half * scale[0] / kh
        return self.call + pixels * (self.pixel + kh * kw * out_channels * entry)


class AllPhases(NamedTuple):
    """One convolution of x by the kernels of all phases, whose channels are put in their places."""

    call: float
    product: float
    entry: float
    """For an entry of y, to put it in its place."""
    weight: float
    """To make an entry of a kernel, or to read one of the weight."""
    lanes: float
    """A convolution to fewer channels takes as long as one to so many."""
    pixel: float
    """For a pixel of y, whatever its channels."""

    def of(self, pixels: int, shape: Ints, scale: Pair, axes: Sequence[Phases]) -> float:
        out_channels, channels, kh, kw = shape
        kernels = math.prod([len(axis.sums) for axis in axes])
        taps = math.prod([axis.size for axis in axes])
        z = taps * self.product * channels * max(self.lanes, kernels * out_channels)
        y = scale[0] * scale[1] * (self.pixel + out_channels * self.entry)
        weights = self.weight * out_channels * channels * (kernels * taps + kh * kw)
        return self.call + pixels * (z + y) + weights


class TwoSteps(NamedTuple):
    """The upsampled image u, and its convolution."""

    call: float
    product: float
    u: float
    """For an entry of u."""
    lanes: float
    """A convolution to fewer channels takes as long as one to so many."""
    pixel: float
    """For a pixel of y, whatever its channels."""
    entry: float = 0
    """For an entry of grad."""
    weight: float = 0
    """For an entry of the weight."""

    def of(self, pixels: int, shape: Ints, scale: Pair, backward: bool) -> float:
        out_channels, channels, kh, kw = shape
        products = kh * kw * channels * max(self.lanes, out_channels)
        if backward:  # one for dweight, as many as forward, and one for dx
            products += kh * kw * out_channels * max(self.lanes, channels)
        each = self.product * products + self.u * channels + self.entry * out_channels + self.pixel
        weights = self.weight * out_channels * channels * kh * kw
        return self.call + pixels * scale[0] * scale[1] * each + weights


FORWARD = (
    LowResolution(call=120e3, product=0.011, z=0.76, half=1.9, pixel=3.5),
    AllPhases(call=270e3, product=0.011, entry=1.2, weight=1.3, lanes=17, pixel=3.4),
    TwoSteps(call=60e3, product=0.0099, u=0.5, lanes=11, pixel=10),
)
BACKWARD = (
    LowResolution(call=94e3, product=0.022, z=0.6, half=2.2, pixel=34),
    TwoSteps(call=120e3, product=0.0092, u=1.3, lanes=13, pixel=15, entry=0.42, weight=2.1),
)
FORWARD_IN_TILES = (
    LowResolution(call=160e3, product=0.0013, z=1.1, half=2.1, pixel=0.64),
    AllPhases(call=310e3, product=0.0014, entry=0.51, weight=1.2, lanes=14, pixel=3.1),
    TwoSteps(call=61e3, product=0.0014, u=0.32, lanes=1, pixel=9.2),
)
BACKWARD_IN_TILES = (
    LowResolution(call=170e3, product=0.006, z=0.85, half=2.3, pixel=43),
    TwoSteps(call=87e3, product=0.002, u=0.47, lanes=24, pixel=18, weight=1.3),
)
"""Fitted to an Intel Xeon (Sapphire Rapids), one thread, in float32 and in bfloat16 by tiles, over
scales 1 to 5, kernels of 1 to 9 taps along an axis, 1 to 256 channels of x and y, images of 4×4 to
128×128 pixels and batches of 1 to 64. What is chosen takes more than 1.25 times as long as the
fastest in 50 of 1536 cases forward and in 50 backward; in tiles, in 57 of 1118 and in 15."""
