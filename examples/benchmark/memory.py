"""Memory of a training step, each contender in a new process of its own.

Two figures: the bytes of live tensors, at most, counted by PyTorch's allocator; and the memory of
the whole process, as the operating system counts it, before the contender is made and at its peak
over a few steps (for torch.compile this includes the compiler).
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from entries import Entry
from problem import Problem
from timing import duration
from torch.profiler import ProfilerActivity, profile

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """Numbers of bytes. `live` is None where the allocator is not PyTorch's.

    The others are NaN where the system does not tell.
    """

    live: int | None
    baseline: float
    peak: float


def measure(entry: Entry, problem: Problem) -> Memory:
    """The memory that this process needs for the contender."""
    baseline = _resident("VmRSS")
    contender = entry(problem)
    for _ in range(2):
        contender.train()
    _forget_peak()
    for _ in range(3):
        contender.train()
    peak = _resident("VmHWM")
    is_torch = isinstance(contender.train(), torch.Tensor)
    del contender
    torch.compiler.reset()
    return Memory(_live_bytes(entry, problem) if is_torch else None, baseline, peak)


@dataclass(frozen=True)
class Pass:
    """The least seconds of a forward pass or training step, and its bytes beyond the start.

    The bytes are NaN where the system does not tell. `seen` is the output, or the parameters after
    all the steps, as arrays.
    """

    seconds: float
    peak: float
    seen: list[Any]


def measure_pass(entry: Entry, problem: Problem, mode: str) -> Pass:
    """The time and memory that this process needs to "infer" or "train"."""
    contender = entry(problem)
    run = getattr(contender, mode)
    baseline = _resident("VmRSS")
    _forget_peak()
    run()
    peak = _resident("VmHWM") - baseline
    seconds = min(duration(run, 1, problem.device) for _ in range(3))
    seen = [contender.as_tensor(run())] if mode == "infer" else contender.state()
    return Pass(seconds, peak, [tensor.float().cpu().numpy() for tensor in seen])


def _live_bytes(entry: Entry, problem: Problem) -> int:
    """The most bytes held, from before the contender is made until after its second step."""
    if problem.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        _two_steps(entry, problem)
        return torch.cuda.max_memory_allocated()
    return max(total for total, _ in allocations(lambda: _two_steps(entry, problem)))


def allocations(run: Callable[[], Any]) -> list[tuple[int, int]]:
    """(all bytes that are held then, bytes of this one) after each allocation on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    found = [event["args"] for event in events if event.get("name") == "[memory]"]
    return [(int(event["Total Allocated"]), int(event["Bytes"])) for event in found]


def _two_steps(entry: Entry, problem: Problem) -> None:
    contender = entry(problem)
    for _ in range(2):
        contender.train()


def _resident(field: str) -> float:
    """Bytes of this process in memory: now (VmRSS), or at most (VmHWM). NaN on Windows."""
    if resource is None:
        return math.nan
    if not _STATUS.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def _forget_peak() -> None:
    """Let VmHWM start anew, where the system can do that."""
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")
