"""Runs the same tests against many bugs, and collects them once.

A process collects the tests of a tree and forks for each bug, which the fork plants by `swap`. What
kills a bug there kills it. What does not may have had its effect while modules were imported, and
deserves a run of its own.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .forked import CONTEXT, LOCK, enter
from .swap import swap

_ANSWERED = 99
"""The exit code of a fork that has sent how its run ended."""


class Planted(NamedTuple):
    """A bug: the source of a file without it and with it."""

    file: str
    old: str
    new: str


class Run(NamedTuple):
    """How a run ended: pytest's code, or minus a signal's number; the test that failed; the seconds
    of each test. The code is None if the bug cannot be planted in functions alone.
    """

    code: int | None
    failed: str
    seconds: dict[str, float]


class Collected:
    """Tests of a tree that have been collected."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._seconds: dict[str, float] = {}
        self._kills: Counter[str] = Counter()

    def run(self, planted: Planted | None, limit: float) -> Run | None:
        """Run the tests until one fails.

        The quickest come first, and those that have failed before: bugs of one file are alike.
        Return None if they take longer than `limit` seconds, or could not be collected.
        """
        order = {test: time / (1 + self._kills[test]) for test, time in self._seconds.items()}
        try:
            self._connection.send((planted, order, limit))
            run: Run | None = self._connection.recv()
        except (EOFError, ConnectionError):
            return None
        if run is not None and run.code == 0:
            self._seconds = run.seconds
        if run is not None and run.failed:
            self._kills[run.failed] += 1
        return run


@contextmanager
def collected(tree: Path, arguments: Sequence[str]) -> Iterator[Collected]:
    """Collect tests as pytest's `arguments` say."""
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_serve, args=(str(tree), list(arguments), there))
    with LOCK:
        process.start()
    there.close()
    try:
        yield Collected(here)
    finally:
        here.close()
        with LOCK:
            process.join()


def _serve(tree: str, arguments: list[str], connection: Connection) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    enter(tree)

    from . import plugin

    server = _Server(connection)
    code = int(pytest.main(arguments, plugins=[plugin, server]))
    if server.is_fork:
        connection.send(Run(code, server.failed, dict(server.seconds)))
        sys.exit(_ANSWERED)


class _Server:
    """Instead of running the tests, forks for each request; the fork runs them."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.is_fork = False
        self.failed = ""
        self.seconds: Counter[str] = Counter()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        while (request := self._next()) is not None:
            planted, order, limit = request
            with warnings.catch_warnings():
                # A thread that watches over this process does not mind.
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child:
                self._wait(child, limit)
                continue
            self.is_fork = True
            os.setsid()
            threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
            if planted is not None and not swap(*planted):
                self.connection.send(Run(None, "", {}))
                os._exit(_ANSWERED)
            session.items.sort(key=lambda item: order.get(item.nodeid, 0.0))
            return None
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def _next(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            return None

    def _wait(self, child: int, limit: float) -> None:
        """Wait for a fork, which answers itself unless it crashes or time runs out."""
        end = time.monotonic() + limit
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                self.connection.send(None)
                return
            time.sleep(0.005)
        code = os.waitstatus_to_exitcode(status)
        if code != _ANSWERED:
            self.connection.send(Run(code, "", {}))


def _end_with(parent: int) -> None:
    """Kill this fork, and what its tests have started, when the process that made it ends."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)
