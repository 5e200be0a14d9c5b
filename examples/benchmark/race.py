"""One network at one batch size: check that all agree, then time them side by side."""

from __future__ import annotations

from collections.abc import Mapping

import agreement
from entries import PURE, takes_part
from problem import Problem
from results import Row
from timing import side_by_side
from worker import Worker


def race(
    problem: Problem, workers: Mapping[str, Worker], seconds: float, tolerance: float
) -> list[Row]:
    """The row of training and that of inference; raises DisagreementError."""
    taking_part = {name: w for name, w in workers.items() if takes_part(name, problem)}
    entered = {name: worker.enter(problem) for name, worker in taking_part.items()}
    agreement.check(problem, {name: seen for name, (seen, _) in entered.items()}, tolerance)
    first = {name: seconds for name, (_, seconds) in entered.items()}
    rows = []
    for mode in ("train", "infer"):
        clocks = {name: worker.clock(mode) for name, worker in taking_part.items()}
        if mode == "infer" or problem.network.is_layer:
            del clocks[PURE]  # it differs in the update only
        network = problem.network
        times = side_by_side(clocks, seconds)
        rows.append(Row(network.name, problem.batch, mode, times, network.is_layer, first))
        print(rows[-1], flush=True)
    return rows
