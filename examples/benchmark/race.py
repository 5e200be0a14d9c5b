"""One network at one batch size: check that all agree, then time them side by side."""

from __future__ import annotations

from collections.abc import Mapping

import agreement
import torch
from entries import PURE, Entry
from problem import Problem
from results import Row
from timing import side_by_side


def race(
    problem: Problem, entered: Mapping[str, Entry], seconds: float, tolerance: float
) -> list[Row]:
    """The row of training and that of inference; raises DisagreementError."""
    torch.compiler.reset()
    contenders = {name: entry(problem) for name, entry in entered.items()}
    agreement.check(problem, contenders, tolerance)
    rows = []
    for mode in ("train", "infer"):
        functions = {name: getattr(contender, mode) for name, contender in contenders.items()}
        if mode == "infer" or problem.network.is_layer:
            del functions[PURE]  # it differs in the update only
        times = side_by_side(functions, seconds, problem.device)
        rows.append(Row(problem.network.name, problem.batch, mode, times))
        print(rows[-1], flush=True)
    return rows
