"""Random bits as a function of a key and of position: a counter-based generator on any device.

Counter i and the halves of a key, k₁ low and k₂ high, give 64 bits, by arithmetic modulo 2⁶⁴ as in
MurmurHash3's and SplitMix64's finalisers (Steele et al., "Fast splittable pseudorandom number
generators", 2014), with the second half of the key mixed in after the first round:

    z = i·g + k₁
    z = (z ⊕ z/2³²)·m₁ + k₂
    z = (z ⊕ z/2²⁹)·m₂
    z = (z ⊕ z/2³²)·m₁

with `_GOLDEN` for g, `_FIRST` for m₁ and `_SECOND` for m₂. Each of the two halves of z decides one
entry. These are a dozen integer operations on tensors, the same on every device, so they need no
copy from the host; torch.compile fuses them into one pass. torch's shift copies the sign, so that
z ⊕ z/2³² is the same for z and its complement. Two counters give the same bits for this reason with
a probability of about 2⁻⁶⁴.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from funcnet.keys import Key, halves
from funcnet.ops.inplace import is_eager

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64

_CHUNK = 2**17
"""Entries drawn at a time on the CPU: their z should stay in the cache."""


def bernoulli(key: Key, p: float, shape: Sequence[int], device: torch.device) -> Tensor:
    """A bool tensor: entry i, counted in row-major order, is True with probability p.

    It follows from key, p and i alone. p is rounded to a multiple of 2⁻³².
    """
    size = math.prod(shape)
    threshold = round(p * 2**32)
    if threshold >= 2**32:  # 2³² − 2³¹ is not an int32
        return torch.ones(shape, dtype=torch.bool, device=device)
    below = threshold - 2**31
    if not is_eager() or device.type != "cpu" or size <= _CHUNK:
        return (_random(key, 0, size, device) < below).view(shape)
    bounds = pairwise([*range(0, size, _CHUNK), size])
    return torch.cat([_random(key, *both, device) < below for both in bounds]).view(shape)


def _random(key: Key, start: int, stop: int, device: torch.device) -> Tensor:
    """Entries `start` up to `stop` of a stream of uniform int32 numbers; `start` is even."""
    low, high = halves(key)
    # An exporter cannot prove that an open size is at most 2·⌈size/2⌉.
    last = stop if torch.compiler.is_exporting() else (stop + 1) // 2
    i = torch.arange(start // 2, last, device=device)
    if torch.compiler.is_compiling():
        # Inductor takes i·g for an index, whose overflow is undefined in C++ and has ended in
        # writes beyond the tensor. After a bitwise operation it takes i for a value.
        i = i | 0
    return _mix(i, low, high).view(torch.int32).narrow(0, 0, stop - start)


def _mix(i: Tensor, low: Any, high: Any) -> Tensor:
    z: Tensor = i * _GOLDEN + low
    z = (z ^ (z >> 32)) * _FIRST + high
    z = (z ^ (z >> 29)) * _SECOND
    return (z ^ (z >> 32)) * _FIRST
