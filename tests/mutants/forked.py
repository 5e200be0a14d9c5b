"""Runs pytest in a process of its own, without the seconds that importing torch takes.

A server imports the packages that funcnet and its tests need, once, and forks for each run. The
fork imports funcnet and the tests from a given tree, so nothing of one run reaches another.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("torch", "torch.func", "torch.testing", "optree", "safetensors.torch"),
        *("numpy", "numpy.random", "pytest", "hypothesis", "hypothesis.strategies"),
    ]
)
# A process is started and ended in one thread at a time: multiprocessing keeps a list of them.
LOCK = threading.Lock()


def run_pytest(tree: Path, arguments: Sequence[str], limit: float | None = None) -> tuple[int, str]:
    """Return pytest's exit code and output, or minus a signal's number and the output so far.

    Raise TimeoutError after `limit` seconds.
    """
    with TemporaryDirectory(prefix="funcnet-run-") as folder:
        output = Path(folder) / "output"
        process = CONTEXT.Process(target=_run, args=(str(tree), list(arguments), str(output)))
        with LOCK:
            process.start()
        ended = False
        try:
            ended = bool(wait([process.sentinel], limit))
        finally:
            if not ended:
                _kill(process.pid)
            with LOCK:
                process.join()
        if not ended:
            raise TimeoutError(f"after {limit:.0f} s")
        return process.exitcode, output.read_text("utf-8") if output.exists() else ""


def _kill(pid: int) -> None:
    """Kill a run and what its tests have started, or the run alone if it has no group yet."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)


def _run(tree: str, arguments: list[str], output: str) -> None:
    """Run pytest in a tree, in the forked process, and exit with its code."""
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    enter(tree)
    import pytest

    from . import plugin

    sys.exit(int(pytest.main(arguments, plugins=[plugin])))


def enter(tree: str) -> None:
    """Make a forked process ready to run the tests of a tree, and to end when the gate does."""
    os.setsid()
    threading.Thread(target=_end_with_the_gate, daemon=True).start()
    os.chdir(tree)
    paths = [tree, os.path.join(tree, "tests")]
    sys.path[:0] = paths
    sys.dont_write_bytecode = True
    os.environ.update(
        PYTHONPATH=os.pathsep.join(paths),
        PYTHONDONTWRITEBYTECODE="1",
        OMP_NUM_THREADS="1",
        HYPOTHESIS_PROFILE="quick",
    )
    import torch

    torch.set_num_threads(1)


def _end_with_the_gate() -> None:
    """Kill this run, and what its tests have started, when the gate's process ends."""
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)
