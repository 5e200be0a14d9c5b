"""The residuals that `Recompute` and `Reversible` save, and the time that it costs.

The network has n residual blocks. `Recompute` on √n segments of √n blocks keeps the segments'
inputs, and in the backward pass the residuals of one segment. `Reversible` makes as many blocks
into couplings of two halves of the channels, and keeps only its last y.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import optree
import torch
from timing import duration, side_by_side

import funcnet as fn

_BLOCKS = 16
_CHANNELS = 32


@dataclass(frozen=True)
class Kept:
    """Bytes that `fwd` returns to be kept, x's and y's among them, and seconds of fwd and bwd."""

    name: str
    bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.name}: {self.bytes / 1e6:.1f} MB kept, {self.seconds * 1e3:.2f} ms"


def kept(device: torch.device, batch: int = 16, side: int = 32, seconds: float = 0.3) -> list[Kept]:
    """The network as it is, in √n recomputed segments, and reversible, timed in turns."""
    steps, sizes = {}, {}
    for name, (net, channels) in networks().items():
        shape = (channels, side, side)
        params = net.init(fn.key(0), shape, device=device)
        x = fn.normal(fn.key(1), (batch, *shape), device=device)
        grad = fn.normal(fn.key(2), (batch, *net.out_shape(shape)), device=device)
        steps[name] = functools.partial(_step, net, params, x, grad)
        sizes[name] = size_of(net.fwd(params, x)[1], params)
    clocks = {
        name: functools.partial(duration, step, device=device) for name, step in steps.items()
    }
    times = side_by_side(clocks, seconds)
    return [Kept(name, sizes[name], times[name].median) for name in steps]


def networks() -> dict[str, tuple[fn.Layer, int]]:
    """Networks by name, with the channels that they take. All need the same products."""
    block = fn.Sequential(fn.Conv2d(_CHANNELS, 3, padding=1), fn.ReLU())
    blocks = [fn.Residual(block)] * _BLOCKS
    size = math.isqrt(_BLOCKS)
    parts = [fn.Recompute(fn.Sequential(*blocks[:size])) for _ in range(size)]
    return {
        f"{_BLOCKS} residual blocks": (fn.Sequential(*blocks), _CHANNELS),
        f"Recompute, {size} segments of {size}": (fn.Sequential(*parts), _CHANNELS),
        f"Reversible, {_BLOCKS} halves": (fn.Reversible(*[block] * _BLOCKS), 2 * _CHANNELS),
    }


def size_of(residuals: Any, params: Any) -> int:
    """Bytes of the memory that residuals hold beside that of params."""
    given = {leaf.untyped_storage().data_ptr() for leaf in optree.tree_leaves(params)}
    storages = {
        leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
        for leaf in optree.tree_leaves(residuals)
        if isinstance(leaf, torch.Tensor)
    }
    return sum(size for pointer, size in storages.items() if pointer not in given)


def _step(net: fn.Layer, params: Any, x: torch.Tensor, grad: torch.Tensor) -> Any:
    _, residuals = net.fwd(params, x)
    return net.bwd(params, residuals, grad)
