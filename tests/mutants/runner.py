"""Plants bugs in copies of the source tree and runs the suite there."""

from __future__ import annotations

import compileall
import enum
import importlib.util
import math
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from .collected import Collected, Planted, collected
from .forked import run_pytest
from .mutant import GateError, Generated, Mutant

ROOT = Path(__file__).resolve().parents[2]
SUITE = ("tests",)
"""What a mutant meets that its first tests have not killed."""

_COPIED = ("funcnet", "tests", "pyproject.toml")
# The gate itself, and the tests of what is no part of the package.
_LEFT_OUT = (
    *("mutants", "test_mutants.py"),
    *("test_denoise.py", "test_denoise_apply.py", "test_benchmark.py", "test_examples.py"),
    *("test_verify_your_layer.py", "test_verify_a_kernel.py", "test_docs.py"),
)
ARGUMENTS = [
    *("-q", "-x", "--tb=no", "-rfE"),
    *("-p", "no:cacheprovider"),
    "--assert=plain",  # nobody reads what was compared, and modules load from their bytecode
    *("-k", "not shrink"),  # the plugin has Hypothesis shrink nothing
    *("-o", "addopts=--strict-markers --strict-config"),  # no doctests: they are no properties
    *(f"--ignore=tests/{name}" for name in _LEFT_OUT),
]

_CRASHES = {-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGFPE}
"""How a process ends of a bug in it, and not of something done to it."""


class Verdict(enum.Enum):
    KILLED = "killed"
    TIMED_OUT = "timed out"
    SURVIVED = "survived"
    EQUIVALENT = "equivalent"
    NOT_EQUIVALENT = "killed, though listed as equivalent"
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
    mutants: Sequence[Mutant],
    jobs: int = 2,
    report: Callable[[Outcome], None] = lambda _: None,
    equivalent: Mapping[str, str] | None = None,
    quick: bool = False,
) -> list[Outcome]:
    """Return what becomes of each mutant, in order; `report` hears of each as soon as it is known.

    The tests that a mutant names run first, and the whole suite where they all pass; each only
    after it has passed without a bug, and ten times as long at most (a minute at least). With
    `quick`, and for mutants that are listed as equivalent, the first tests are all.

    Raise GateError if a bug cannot be planted or the suite fails without a bug.
    """
    equivalent = equivalent or {}

    def first(group: Sequence[Mutant]) -> list[Outcome]:
        outcomes = []
        for outcome in _examine_in_turn(group, tree):
            if outcome.mutant.name in equivalent:
                outcome = _as_listed(outcome, equivalent[outcome.mutant.name])
            if quick or outcome.verdict is not Verdict.SURVIVED:
                report(outcome)
            outcomes.append(outcome)
        return outcomes

    def second(outcome: Outcome) -> Outcome:
        if outcome.verdict is Verdict.SURVIVED:
            outcome = _patiently(outcome.mutant, tree, SUITE, limit)
            report(outcome)
        return outcome

    with snapshot() as tree, ThreadPoolExecutor(jobs) as pool:
        for mutant in mutants:
            plant(mutant, tree)
        found = {o.mutant: o for some in pool.map(first, _groups(mutants, jobs)) for o in some}
        outcomes = [found[mutant] for mutant in mutants]
        if quick or all(outcome.verdict is not Verdict.SURVIVED for outcome in outcomes):
            return outcomes
        limit = jobs * _limit(baseline(tree, SUITE))
        return list(pool.map(second, outcomes))


def _groups(mutants: Sequence[Mutant], jobs: int) -> Iterator[list[Mutant]]:
    """Yield the mutants that meet the same tests, large groups in a part for each job."""
    by_tests = defaultdict(list)
    for mutant in mutants:
        by_tests[mutant.tests].append(mutant)
    for group in by_tests.values():
        size = max(20, -(-len(group) // jobs))
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _examine_in_turn(group: Sequence[Mutant], tree: Path) -> Iterator[Outcome]:
    """Yield the outcomes of mutants that meet the same tests, which are collected once."""
    tests = group[0].tests
    with collected(tree, [*ARGUMENTS, *tests]) as runs:
        start = time.monotonic()
        whole = runs.run(None, math.inf)
        if whole is None or whole.code != 0:
            baseline(tree, tests)  # which says what is wrong
            raise GateError(f"{' '.join(tests)} do not pass where they are collected once")
        limit = _limit(time.monotonic() - start)
        for mutant in group:
            yield _in_functions(mutant, tree, runs, limit) or _patiently(mutant, tree, tests, limit)


def _in_functions(mutant: Mutant, tree: Path, runs: Collected, limit: float) -> Outcome | None:
    """Run collected tests against a mutant; None if that does not kill it."""
    start = time.monotonic()
    path = tree / mutant.file
    planted = Planted(str(path), path.read_text("utf-8"), plant(mutant, tree))
    run = runs.run(planted, limit)
    if run is None or not ((run.code == 1 and run.failed) or run.code in _CRASHES):
        return None
    detail = f"FAILED {run.failed}" if run.code == 1 else _crash(run.code)
    return Outcome(mutant, Verdict.KILLED, detail, time.monotonic() - start)


@contextmanager
def snapshot() -> Iterator[Path]:
    """Copy the source tree as it is now, and compile it."""
    with TemporaryDirectory(prefix="funcnet-gate-") as folder:
        tree = Path(folder)
        _copy(ROOT, tree, "__pycache__", ".*")
        for part in ("funcnet", "tests"):
            compileall.compile_dir(tree / part, quiet=2)
        yield tree


def plant(mutant: Mutant, tree: Path) -> str:
    """Return the source of a mutant's file with the bug. Raise GateError if it does not apply."""
    path = tree / mutant.file
    if not path.exists():
        raise GateError(f"{mutant.name}: there is no file {mutant.file}")
    return mutant.planted(path.read_text("utf-8"))


def baseline(tree: Path, tests: Sequence[str]) -> float:
    """Return the seconds that tests take without a bug. Raise GateError if they do not pass."""
    start = time.monotonic()
    code, output = run_pytest(tree, [*ARGUMENTS, *tests])
    if code != 0:
        raise GateError(f"without a bug, {' '.join(tests)} do not pass:\n{output}")
    return time.monotonic() - start


def examine(mutant: Mutant, tree: Path, tests: Sequence[str], limit: float) -> Outcome:
    """Run tests against a mutant, planted in a copy of a tree."""
    start = time.monotonic()
    with TemporaryDirectory(prefix="funcnet-mutant-") as folder:
        copy = Path(folder)
        _copy(tree, copy)
        file = copy / mutant.file
        file.write_text(plant(mutant, tree), "utf-8")
        Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)
        try:
            verdict, detail = _judge(mutant, *run_pytest(copy, [*ARGUMENTS, *tests], limit))
        except TimeoutError as error:
            verdict, detail = Verdict.TIMED_OUT, str(error)
    return Outcome(mutant, verdict, detail, time.monotonic() - start)


def _patiently(mutant: Mutant, tree: Path, tests: Sequence[str], limit: float) -> Outcome:
    """Examine a mutant again if time runs out: the machine may have stood still."""
    outcome = examine(mutant, tree, tests, limit)
    return examine(mutant, tree, tests, limit) if outcome.verdict is Verdict.TIMED_OUT else outcome


def _as_listed(outcome: Outcome, reason: str) -> Outcome:
    """Return the outcome of a mutant that is listed as equivalent."""
    verdict, detail = Verdict.NOT_EQUIVALENT, outcome.detail
    if outcome.verdict is Verdict.SURVIVED:
        verdict, detail = Verdict.EQUIVALENT, reason
    return Outcome(outcome.mutant, verdict, detail, outcome.seconds)


def _judge(mutant: Mutant, code: int, output: str) -> tuple[Verdict, str]:
    """Judge by how pytest ended. Only a failing test kills a bug that was written by hand.

    A generated bug is no typing error, so it may also make funcnet or the tests unimportable.
    """
    failures = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if code == 0:
        return Verdict.SURVIVED, ""
    if code == 1 and failures:
        return Verdict.KILLED, failures[0].split(" - ")[0]
    if code in _CRASHES:
        return Verdict.KILLED, _crash(code)
    if code == 4 and isinstance(mutant, Generated):
        return Verdict.KILLED, "the tests cannot be collected"
    return Verdict.ERROR, f"pytest ended with {code}:\n{output}"


def _crash(code: int) -> str:
    return f"the process ended by {signal.Signals(-code).name}"


def _limit(seconds: float) -> float:
    return max(60.0, 10 * seconds)


def _copy(source: Path, target: Path, *ignored: str) -> None:
    for name in _COPIED:
        if (source / name).is_dir():
            ignore = shutil.ignore_patterns(*ignored)
            shutil.copytree(source / name, target / name, ignore=ignore)
        else:
            shutil.copy2(source / name, target / name)
