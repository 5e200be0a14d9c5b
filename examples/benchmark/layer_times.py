"""The time of a training step of funcnet, by layer and by PyTorch operation."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from contenders import funcnet_in_place
from problem import Problem
from torch.profiler import ProfilerActivity, profile

import funcnet as fn

_STEPS = 20

_METHODS = {"_fwd": "forward", "_fwd_": "forward", "_bwd": "backward", "_bwd_": "backward"}

Seconds = dict[tuple[int, str], float]


def print_profile(problem: Problem) -> None:
    """Print one training step's time by layer, then by operation, in milliseconds."""
    train = funcnet_in_place(problem).train
    for _ in range(3):
        train()
    print(f"{problem.network.name}, batch {problem.batch}: one training step, in ms\n")
    print(_by_layer(problem, train))
    print(_by_operation(train))


def _by_layer(problem: Problem, train: Callable[[], Any]) -> str:
    net = problem.network.net
    with _layer_clock(net, problem.device) as seconds:
        start = time.perf_counter()
        for _ in range(_STEPS):
            train()
        _wait(problem.device)
        total = time.perf_counter() - start
    lines = [f"{'layer':<54}{'forward':>9}{'backward':>9}{'share':>7}"]
    for i, layer in enumerate(net):
        lines.append(_line(f"{i}: {layer}", seconds[i, "forward"], seconds[i, "backward"], total))
    rest = total - sum(seconds.values())
    lines.append(_line("loss, update, and what lies between layers", rest, 0.0, total))
    return "\n".join([*lines, f"{'whole step':<54}{total / _STEPS * 1e3:9.2f}\n"])


def _line(name: str, forward: float, backward: float, total: float) -> str:
    per_step = f"{forward / _STEPS * 1e3:9.2f}{backward / _STEPS * 1e3:9.2f}"
    return f"{name:<54}{per_step}{(forward + backward) / total:7.0%}"


def _by_operation(train: Callable[[], Any]) -> str:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(_STEPS):
            train()
    averages = profiler.key_averages(group_by_input_shape=True)
    total = sum(event.self_cpu_time_total for event in averages)
    averages.sort(key=lambda event: -event.self_cpu_time_total)
    lines = [f"{'operation':<34}{'calls':>6}{'ms':>8}{'share':>7}  shapes"]
    for event in averages[:30]:
        calls, time_ = event.count / _STEPS, event.self_cpu_time_total
        shapes = " ".join("×".join(map(str, shape)) for shape in event.input_shapes if shape)
        numbers = f"{calls:6.0f}{time_ / _STEPS / 1e3:8.2f}{time_ / total:7.1%}"
        lines.append(f"{event.key:<34.34}{numbers}  {shapes:.70}")
    return "\n".join(lines)


@contextmanager
def _layer_clock(net: fn.Sequential, device: torch.device) -> Iterator[Seconds]:
    """Add up the seconds spent in each layer's methods, by (position, direction), meanwhile."""
    positions = {id(layer): i for i, layer in enumerate(net)}
    seconds: Seconds = defaultdict(float)
    originals = [
        (cls, name, getattr(cls, name))
        for cls in {type(layer) for layer in net}
        for name in _METHODS
        if name in dir(cls)
    ]
    own = {(cls, name) for cls, name, _ in originals if name in vars(cls)}
    inside: list[fn.Layer] = []
    for cls, name, method in originals:
        setattr(cls, name, _clocked(method, _METHODS[name], positions, seconds, inside, device))
    try:
        yield seconds
    finally:
        for cls, name, method in originals:
            setattr(cls, name, method) if (cls, name) in own else delattr(cls, name)


def _clocked(
    method: Callable[..., Any],
    direction: str,
    positions: dict[int, int],
    seconds: Seconds,
    inside: list[fn.Layer],
    device: torch.device,
) -> Callable[..., Any]:
    """`method`, timed unless it is called by another that is."""

    @functools.wraps(method)
    def timed(self: fn.Layer, *args: Any, **kwargs: Any) -> Any:
        if inside or id(self) not in positions:
            return method(self, *args, **kwargs)
        inside.append(self)
        start = time.perf_counter()
        try:
            return method(self, *args, **kwargs)
        finally:
            _wait(device)
            seconds[positions[id(self)], direction] += time.perf_counter() - start
            inside.pop()

    return timed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
