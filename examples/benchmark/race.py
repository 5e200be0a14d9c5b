"""One network at one batch size: check that all agree, then time them side by side."""

from __future__ import annotations

from collections.abc import Mapping

import agreement
from entries import PURE
from problem import Problem
from results import Row
from timing import side_by_side
from worker import Worker


def race(
    problem: Problem, workers: Mapping[str, Worker], seconds: float, tolerance: float
) -> list[Row]:
    """The row of training and that of inference; raises DisagreementError."""
    seen = {name: worker.enter(problem) for name, worker in workers.items()}
    agreement.check(problem, seen, tolerance)
    rows = []
    for mode in ("train", "infer"):
        clocks = {name: worker.clock(mode) for name, worker in workers.items()}
        if mode == "infer" or problem.network.is_layer:
            del clocks[PURE]  # it differs in the update only
        times = side_by_side(clocks, seconds)
        rows.append(Row(problem.network.name, problem.batch, mode, times))
        print(rows[-1], flush=True)
    return rows
