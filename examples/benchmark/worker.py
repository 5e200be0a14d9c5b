"""Contenders in processes of their own, as their users run them.

What one library does to its process (threads that wait for work, the allocator's settings and its
scattered memory) then touches no other. The processes take turns: all but one of them wait.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import agreement
import torch
from contenders import Contender
from entries import OURS, entries
from memory import Memory, Pass, measure, measure_pass
from problem import Problem
from timing import duration

from funcnet.memory import SWITCH


@dataclass(frozen=True)
class Settings:
    """The settings that all contenders share."""

    device: torch.device
    threads: int
    tf32: bool
    keep_memory: bool
    """Whether the others, too, keep freed memory as funcnet does (`funcnet/memory.py`)."""

    def apply(self) -> None:
        """Set up this process, and those it starts."""
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = self.tf32
        # JAX reads these when it is imported: the size of its pool of threads, precision, memory.
        os.environ["NPROC"] = str(self.threads)
        os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "tensorfloat32" if self.tf32 else "float32"
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


class WorkerError(RuntimeError):
    """A contender failed. The message has the traceback, or the process printed it as it ended."""


class Worker:
    """A process for the contender called `name`; a context manager that ends it."""

    def __init__(self, name: str, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, settings))
        with allocator_of(name, settings):
            self._process.start()
        theirs.close()

    def enter(self, problem: Problem) -> tuple[list[torch.Tensor], float]:
        """Make the contender for a problem: what `agreement.observed` sees, and the seconds until.

        These include the time of compiling.
        """
        seen, seconds = self._ask("enter", problem)
        return [torch.from_numpy(array) for array in seen], seconds

    def clock(self, mode: str) -> Callable[[int], float]:
        """Runs "train" or "infer" a number of times; the average seconds of a call."""
        return lambda calls: float(self._ask("clock", mode, calls))

    def memory(self, problem: Problem) -> Memory:
        """The memory of a training step, in a process that has done nothing else."""
        found: Memory = self._ask("memory", problem)
        return found

    def once(self, problem: Problem, mode: str) -> Pass:
        """Time and memory to "infer" or "train". The process must have done nothing else."""
        found: Pass = self._ask("once", problem, mode)
        return found

    def _ask(self, method: str, *args: Any) -> Any:
        try:
            self._connection.send((method, args))
            failed, answer = self._connection.recv()
        except (EOFError, ConnectionError):
            raise WorkerError(f"{self._name}: its process ended") from None
        if failed:
            raise WorkerError(f"{self._name}:\n{answer}")
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()  # which the process takes as the end
        self._process.join()


class _Server:
    """The answers of a worker, in its own process."""

    def __init__(self, name: str, settings: Settings) -> None:
        entered = entries(settings.device, jax=name.startswith("JAX"))
        self._entry, self._device = entered[name], settings.device
        self._contender: Contender | None = None

    def enter(self, problem: Problem) -> tuple[list[Any], float]:
        self._contender = None
        torch.compiler.reset()
        gc.collect()
        start = time.perf_counter()
        self._contender = self._entry(problem)
        seen = [tensor.numpy() for tensor in agreement.observed(self._contender)]
        seconds = time.perf_counter() - start
        gc.collect()
        gc.disable()  # nothing that is timed makes cycles
        return seen, seconds

    def clock(self, mode: str, calls: int) -> float:
        return duration(getattr(self._contender, mode), calls, self._device)

    def memory(self, problem: Problem) -> Memory:
        return measure(self._entry, problem)

    def once(self, problem: Problem, mode: str) -> Pass:
        return measure_pass(self._entry, problem, mode)


def _serve(connection: Connection, name: str, settings: Settings) -> None:
    """The process: answer until there are no more questions."""
    settings.apply()
    server = _Server(name, settings)
    while True:
        try:
            method, args = connection.recv()
        except EOFError:
            return
        try:
            answer = False, getattr(server, method)(*args)
        except Exception:
            answer = True, traceback.format_exc()
        connection.send(answer)


@contextmanager
def allocator_of(name: str, settings: Settings) -> Iterator[None]:
    """Let a process that starts now keep freed memory only if it is ours, or all are to."""
    before = os.environ.get(SWITCH)
    if not (name.startswith(OURS) or settings.keep_memory):
        os.environ[SWITCH] = "0"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(SWITCH, None)
        else:
            os.environ[SWITCH] = before
