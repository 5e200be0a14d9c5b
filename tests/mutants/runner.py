"""Plants bugs in copies of the source tree and runs the suite there."""

from __future__ import annotations

import enum
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from .table import Mutant

ROOT = Path(__file__).resolve().parents[2]
SUITE = ("tests",)
"""What a mutant meets that the tests named for it have not killed."""

_COPIED = ("funcnet", "tests", "pyproject.toml")
# The gate itself, and the tests of what is no part of the package.
_LEFT_OUT = ("mutants", "test_mutants.py", "test_denoise.py", "test_benchmark.py")
_PYTEST = [
    *(sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-rfE"),
    *("-p", "no:cacheprovider", "-p", "mutants.plugin"),
    *("-k", "not shrink"),  # the plugin has Hypothesis shrink nothing
    *("-o", "addopts=--strict-markers --strict-config"),  # no doctests: they are no properties
    *(f"--ignore=tests/{name}" for name in _LEFT_OUT),
]

_CRASHES = {-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGFPE}
"""How a process ends of a bug in it, and not of something done to it."""


class GateError(Exception):
    """The gate cannot judge: a patch does not apply, or the suite fails without a bug."""


class Verdict(enum.Enum):
    KILLED = "killed"
    TIMED_OUT = "timed out"
    SURVIVED = "survived"
    ERROR = "error"


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant; `detail` is the test that failed, or what went wrong."""

    mutant: Mutant
    verdict: Verdict
    detail: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.verdict in (Verdict.KILLED, Verdict.TIMED_OUT)


def gate(
    mutants: Sequence[Mutant], jobs: int = 2, report: Callable[[Outcome], None] = lambda _: None
) -> list[Outcome]:
    """What becomes of each mutant, in order; `report` hears of each as soon as it is known.

    The tests that a mutant names run first, and the whole suite where they all pass; each only
    after it has passed without a bug, and ten times as long at most (five minutes at least).

    Raises GateError if a patch does not apply or the suite fails without a bug.
    """

    def first(mutant: Mutant) -> Outcome:
        outcome = _patiently(mutant, tree, mutant.tests, limit)
        if outcome.verdict is not Verdict.SURVIVED:
            report(outcome)
        return outcome

    def second(outcome: Outcome) -> Outcome:
        if outcome.verdict is Verdict.SURVIVED:
            outcome = _patiently(outcome.mutant, tree, SUITE, limit)
            report(outcome)
        return outcome

    with snapshot() as tree, ThreadPoolExecutor(jobs) as pool:
        for mutant in mutants:
            plant(mutant, tree)
        named = sorted({test for mutant in mutants for test in mutant.tests})
        parts = [named[i::jobs] for i in range(min(jobs, len(named)))]
        limit = max(map(_limit, pool.map(lambda tests: baseline(tree, tests), parts)))
        outcomes = list(pool.map(first, mutants))
        if any(outcome.verdict is Verdict.SURVIVED for outcome in outcomes):
            limit = jobs * _limit(baseline(tree, SUITE))
        return list(pool.map(second, outcomes))


@contextmanager
def snapshot() -> Iterator[Path]:
    """A copy of the source tree as it is now."""
    with TemporaryDirectory(prefix="funcnet-gate-") as folder:
        tree = Path(folder)
        _copy(ROOT, tree)
        yield tree


def plant(mutant: Mutant, tree: Path) -> str:
    """The source of a mutant's file with the bug. Raises GateError if the patch does not apply."""
    source = (tree / mutant.file).read_text("utf-8")
    found = source.count(mutant.old)
    if found != 1:
        raise GateError(f"{mutant.name}: expected its old text once in {mutant.file}, got {found}×")
    return source.replace(mutant.old, mutant.new)


def baseline(tree: Path, tests: Sequence[str]) -> float:
    """The seconds that tests take without a bug. Raises GateError if they do not pass."""
    start = time.monotonic()
    code, output = _run_pytest(tree, tests, None)
    if code != 0:
        raise GateError(f"without a bug, {' '.join(tests)} do not pass:\n{output}")
    return time.monotonic() - start


def examine(mutant: Mutant, tree: Path, tests: Sequence[str], limit: float) -> Outcome:
    """What tests make of a mutant, planted in a copy of a tree. Only a failing test kills it."""
    start = time.monotonic()
    with TemporaryDirectory(prefix=f"funcnet-{mutant.name}-") as folder:
        copy = Path(folder)
        _copy(tree, copy)
        (copy / mutant.file).write_text(plant(mutant, tree), "utf-8")
        try:
            verdict, detail = _judge(*_run_pytest(copy, tests, limit))
        except subprocess.TimeoutExpired:
            verdict, detail = Verdict.TIMED_OUT, f"after {limit:.0f} s"
    return Outcome(mutant, verdict, detail, time.monotonic() - start)


def _patiently(mutant: Mutant, tree: Path, tests: Sequence[str], limit: float) -> Outcome:
    """`examine`, but time must run out twice: the machine may have stood still."""
    outcome = examine(mutant, tree, tests, limit)
    return examine(mutant, tree, tests, limit) if outcome.verdict is Verdict.TIMED_OUT else outcome


def _judge(code: int, output: str) -> tuple[Verdict, str]:
    failures = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if code == 0:
        return Verdict.SURVIVED, ""
    if code == 1 and failures:
        return Verdict.KILLED, failures[0].split(" - ")[0]
    if code in _CRASHES:
        return Verdict.KILLED, f"the process ended by {signal.Signals(-code).name}"
    return Verdict.ERROR, f"pytest ended with {code}:\n{output}"


def _limit(seconds: float) -> float:
    return max(300.0, 10 * seconds)


def _copy(source: Path, target: Path) -> None:
    for name in _COPIED:
        if (source / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(source / name, target / name, ignore=ignored)
        else:
            shutil.copy(source / name, target / name)


def _run_pytest(tree: Path, tests: Sequence[str], limit: float | None) -> tuple[int, str]:
    """The exit code and the output. Raises subprocess.TimeoutExpired."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (tree, tree / "tests"))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HYPOTHESIS_PROFILE": "quick",
    }
    with subprocess.Popen(
        [*_PYTEST, *tests],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # what the tests have started, too
            raise
    return process.returncode, output
