"""Memory of a training step, each contender in a process of its own.

Two figures: the bytes of live tensors, at most, counted by PyTorch's allocator; and the memory of
the whole process, as the operating system counts it, before the contender is made and at its peak
over a few steps (for torch.compile that holds the compiler too).

As a script, the worker: `python memory.py ENTRY NETWORK BATCH DTYPE DEVICE THREADS`.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from entries import entries
from networks import all_networks
from problem import Problem
from torch.profiler import ProfilerActivity, profile

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """In bytes. `live` is None where the allocator is not PyTorch's."""

    live: int | None
    baseline: int
    peak: int


def measure(name: str, problem: Problem) -> Memory:
    """The memory of the contender called `name`, found out in a new process."""
    dtype = str(problem.dtype).removeprefix("torch.")
    problem_words = (problem.network.name, problem.batch, dtype, problem.device)
    words = [name, *map(str, problem_words), str(torch.get_num_threads())]
    worker = [sys.executable, __file__, *words]
    result = subprocess.run(worker, check=True, stdout=subprocess.PIPE, text=True)
    return Memory(**json.loads(result.stdout.splitlines()[-1]))


def _work(name: str, problem: Problem) -> Memory:
    entry = entries(problem.device)[name]
    baseline = _resident("VmRSS")
    contender = entry(problem)
    for _ in range(2):
        contender.train()
    _forget_peak()
    for _ in range(3):
        contender.train()
    peak = _resident("VmHWM")
    del contender
    torch.compiler.reset()
    live = None if name.startswith("JAX") else _live_bytes(name, problem)
    return Memory(live, baseline, peak)


def _live_bytes(name: str, problem: Problem) -> int:
    """At most, from before the contender is made until after its second step."""
    if problem.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        _two_steps(name, problem)
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _two_steps(name, problem)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return max(
        int(event["args"]["Total Allocated"]) for event in events if event.get("name") == "[memory]"
    )


def _two_steps(name: str, problem: Problem) -> None:
    contender = entries(problem.device)[name](problem)
    for _ in range(2):
        contender.train()


def _resident(field: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at most (VmHWM)."""
    if not _STATUS.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def _forget_peak() -> None:
    """Let VmHWM start anew, where the system can do that."""
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")


def main() -> None:
    """Work on what the command line says and print the result."""
    name, network, batch, dtype, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    (chosen,) = (n for n in all_networks() if n.name == network)
    problem = Problem(chosen, int(batch), getattr(torch, dtype), torch.device(device))
    print(json.dumps(asdict(_work(name, problem))))


if __name__ == "__main__":
    main()
