"""Times of several functions side by side.

Machines drift: clocks change, neighbours come and go. So the functions take turns, a slice of time
each, round by round, and what is reported of each is its median over rounds. They may live in
different processes: what takes turns are their clocks, which run a function a number of times.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

Function = Callable[[], Any]
Clock = Callable[[int], float]
"""Runs a function that many times; the average seconds of a call."""

_SLICE = 0.02
"""Seconds that a function runs in its turn, at least."""

_PAUSE = 0.005
"""Seconds until the threads of the one before have gone to sleep."""

_LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Times:
    """Seconds a call: median and quartiles over the rounds, and each round's."""

    median: float
    low: float
    high: float
    rounds: int
    samples: tuple[float, ...] = ()


def side_by_side(clocks: Mapping[str, Clock], seconds: float) -> dict[str, Times]:
    """Times of each function, which runs for `seconds` or more in all."""
    calls = {name: _calls_a_slice(clock) for name, clock in clocks.items()}
    quickest = min(n * duration for n, duration in calls.values())
    rounds = max(_LEAST_ROUNDS, math.ceil(seconds / quickest))
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(rounds):
        for name, clock in clocks.items():
            time.sleep(_PAUSE)
            clock(1)  # the caches hold another's data
            samples[name].append(clock(calls[name][0]))
    return {name: _summary(values) for name, values in samples.items()}


def _calls_a_slice(clock: Clock) -> tuple[int, float]:
    """The number of calls that fill a slice, and the time of one, after a few calls to warm up."""
    clock(2)
    duration = min(clock(1) for _ in range(2))
    return max(1, math.ceil(_SLICE / duration)), duration


def duration(function: Function, calls: int, device: torch.device) -> float:
    """Seconds a call, on average over `calls`."""
    if device.type == "cuda":
        return _cuda_duration(function, calls)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _cuda_duration(function: Function, calls: int) -> float:
    """Seconds a call, on average over `calls`, by the device's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


def _summary(values: list[float]) -> Times:
    low, _, high = quantiles(values, n=4)
    return Times(median(values), low, high, len(values), tuple(values))
