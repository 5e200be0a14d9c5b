"""The check before anything is timed: all contenders must compute the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from contenders import Contender, torch_nn
from problem import Problem
from torch import Tensor

_STEPS = 3

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-2,
    torch.bfloat16: 5e-1,
    torch.float16: 1e-1,
}
"""Tolerances of each tensor's change, in the Euclidean norm. float32's is for a ReLU whose input
rounds to the other side of 0: without one, float32 agrees to 2e-6. In half precision most of an
update is lost in the rounding of the parameters: there only gross errors are noticed."""

MIXED_TOLERANCE = 5e-1
"""The tolerance of float32 parameters in a network that computes in bfloat16. Deep networks amplify
its rounding, ours and autocast's alike: only gross errors are noticed."""

TF32_TOLERANCE = 2e-2
"""The tolerance of float32 in matrix products of 10 bits."""


class DisagreementError(AssertionError):
    """Two contenders compute different numbers."""


def observed(contender: Contender) -> list[Tensor]:
    """The output, the loss of each of a few steps, and the state after the last, in float64."""
    results = [contender.infer(), *(contender.train() for _ in range(_STEPS))]
    tensors = [contender.as_tensor(result) for result in results]
    return [tensor.double().cpu() for tensor in tensors] + _copies(contender)


def check(problem: Problem, seen: Mapping[str, list[Tensor]], tolerance: float) -> None:
    """Compare what was observed of each contender with torch.nn and autograd in float64.

    Raises DisagreementError, with the contender and the size of the difference.
    """
    reference = torch_nn(
        replace(problem, dtype=torch.float64, mixed=False), torch.contiguous_format
    )
    start = [] if problem.network.is_layer else _copies(reference)
    expected = observed(reference)
    for name, tensors in seen.items():
        for i, (actual, wanted) in enumerate(zip(tensors, expected, strict=True)):
            state = i - _STEPS - 1  # the states come after the output and the losses
            before = start[state] if start and state >= 0 else torch.zeros(())
            # A loss that has shrunk still comes from logits of the first one's size.
            scale = expected[1] if 1 <= i <= _STEPS and not problem.network.is_layer else wanted
            allowed = _allowed(problem, wanted - before, scale, tolerance)
            _check_tensor(f"{problem.network.name}: {name}", actual, wanted, allowed)


def check_large(
    problem: Problem, ours: list[Tensor], theirs: list[Tensor], trained: bool, tolerance: float
) -> None:
    """Compare funcnet with torch.nn in one dtype, where float64 would take too much memory.

    Their tensors are the parameters of a network that was trained, or its output.
    """
    start = _copies(torch_nn(problem, torch.contiguous_format)) if trained else [torch.zeros(())]
    who = f"{problem.network.name} on {problem.network.shape}: funcnet"
    for actual, wanted, before in zip(ours, theirs, start, strict=True):
        _check_tensor(who, actual, wanted, _allowed(problem, wanted - before, wanted, tolerance))


def _allowed(problem: Problem, change: Tensor, scale: Tensor, tolerance: float) -> float:
    """The tolerance as a norm, with room for the rounding of numbers of this scale."""
    rounding = torch.finfo(problem.dtype).eps * torch.linalg.vector_norm(scale)
    return float(tolerance * torch.linalg.vector_norm(change) + _STEPS * rounding)


def _copies(contender: Contender) -> list[Tensor]:
    return [tensor.double().cpu().clone() for tensor in contender.state()]


def _check_tensor(who: str, actual: Tensor, wanted: Tensor, allowed: float) -> None:
    if actual.shape != wanted.shape:
        raise DisagreementError(
            f"{who}: expected shape {tuple(wanted.shape)}, got {tuple(actual.shape)}"
        )
    difference = float(torch.linalg.vector_norm(actual - wanted))
    if not difference <= allowed:
        raise DisagreementError(
            f"{who}: expected {tuple(wanted.shape)} to within {allowed:.1e}, got {difference:.1e}"
        )
