"""Time and memory as one image grows, from 256×256 to 2048×2048 pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import agreement
import torch
from entries import CHANNELS_LAST, OURS
from networks import MEASURED, all_networks
from problem import Problem
from worker import Settings, Worker

SIDES = (256, 512, 1024, 2048)
_NAMES = (OURS, CHANNELS_LAST)


@dataclass(frozen=True)
class Growth:
    """Nanoseconds a pixel, and bytes at the peak beyond weights and data, by contender."""

    mode: str
    """"infer" or "train"."""
    side: int
    nanoseconds: dict[str, float]
    peak: dict[str, float]

    def __str__(self) -> str:
        parts = (
            f"{name} {self.nanoseconds[name]:.0f} ns a pixel, {self.peak[name] / 1e6:.0f} MB"
            for name in self.nanoseconds
        )
        return f"{self.mode} {self.side}×{self.side}: {', '.join(parts)}"


def grow(
    problem: Problem, settings: Settings, tolerance: float, sides: tuple[int, ...] = SIDES
) -> list[Growth]:
    """The denoiser on a larger and larger image, each time in new processes.

    Raises DisagreementError where the two outputs, or the parameters after the steps, differ.
    """
    (denoiser,) = (network for network in all_networks() if network.name == MEASURED[0])
    found = []
    for mode, side in product(("infer", "train"), sides):
        network = replace(denoiser, shape=(denoiser.shape[0], side, side))
        larger = replace(problem, network=network, batch=1)
        nanoseconds, peak, seen = {}, {}, []
        for name in _NAMES:
            with Worker(name, settings) as worker:
                once = worker.once(larger, mode)
            nanoseconds[name] = once.seconds / side**2 * 1e9
            peak[name] = once.peak
            seen.append([torch.from_numpy(array) for array in once.seen])
        ours, theirs = seen
        agreement.check_large(larger, ours, theirs, mode == "train", tolerance)
        found.append(Growth(mode, side, nanoseconds, peak))
        print(found[-1], flush=True)
    return found
