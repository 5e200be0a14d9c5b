"""Purity: a call writes to no input and no global state, and its results share no memory."""

from __future__ import annotations

import operator
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import optree
import torch
from torch import Tensor

from funcnet.compat import version
from funcnet.ops.inplace import is_expanded
from funcnet.testing.check.case import Case, Leaves, tensors_of
from funcnet.testing.errors import GradientMismatch
from funcnet.testing.layouts import bits, reach, same

_Result = TypeVar("_Result")

_GLOBAL_RANDOMNESS = threading.RLock()
"""Held while the global random states are watched or changed: another thread may check, too."""


def pure(
    case: Case, who: str, call: Callable[[], _Result], extra: dict[str, Tensor] | None = None
) -> _Result:
    """Return `call()`. Raise GradientMismatch if it changes an input, or a tensor in `extra`."""
    tensors = tensors_of({**case.inputs, **(extra or {})})
    before = {name: (_description(x), bits(x)) for name, x in tensors.items()}
    trees = {name: optree.tree_flatten(getattr(case, name)) for name in ("params", "x")}
    with _GLOBAL_RANDOMNESS:
        states = _random_states(case)
        result = call()
        _expect_states(case, who, states)
    for name, x in tensors.items():
        description, old = before[name]
        if _description(x) != description or not torch.equal(bits(x), old):
            raise GradientMismatch(f"{who}: writes to {name}, a tensor that it was handed")
    for name, (leaves_before, structure_before) in trees.items():
        leaves, structure = optree.tree_flatten(getattr(case, name))
        if structure != structure_before or not all(map(operator.is_, leaves, leaves_before)):
            raise GradientMismatch(f"{who}: changes the tree of {name} that it was handed")
    return result


@contextmanager
def put_back(case: Case) -> Iterator[None]:
    """Undo what a layer that fails has written into the caller's tensors."""
    before = [(x, x.detach().clone()) for x in case.inputs.values() if not is_expanded(x)]
    try:
        yield
    except BaseException:
        with torch.inference_mode():  # here, a tensor of any kind can be written to
            for x, old in before:
                if x.shape == old.shape and not same(x, old):
                    x.copy_(old)
        raise


def _description(x: Tensor) -> tuple[Any, ...]:
    """The properties of a tensor, besides its entries, that a call can change."""
    return x.shape, x.stride(), x.requires_grad, 0 if x.is_inference() else version(x)


def init_under_two_seeds(case: Case, call: Callable[[], _Result]) -> list[_Result]:
    """Return `call()` twice, under two global seeds; the random states are restored."""
    results = []
    with _GLOBAL_RANDOMNESS:
        states = _random_states(case)
        try:
            for seed in (1, 2):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds every device
                if case.grad.device.type == "cuda":
                    torch.cuda.manual_seed(seed)
                np.random.seed(seed)
                random.seed(seed)
                before = _random_states(case)
                results.append(call())
                _expect_states(case, "init", before)
        finally:
            torch.set_rng_state(states["torch"])
            np.random.set_state(states["numpy"])
            random.setstate(states["random"])
            if "torch.cuda" in states:
                torch.cuda.set_rng_state(states["torch.cuda"], case.grad.device)
    return results


def _random_states(case: Case) -> dict[str, Any]:
    """The states of all generators that a layer must not draw from."""
    states = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(legacy=False),
        "random": random.getstate(),
    }
    if case.grad.device.type == "cuda":
        states["torch.cuda"] = torch.cuda.get_rng_state(case.grad.device)
    return states


def _expect_states(case: Case, who: str, states: dict[str, Any]) -> None:
    """Raise GradientMismatch unless the random states are still these."""
    for name, new in _random_states(case).items():
        if not _same_state(states[name], new):
            raise GradientMismatch(f"{who}: draws from the global random state of {name}")


def _same_state(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor):
        return torch.equal(old, new)
    if isinstance(old, np.ndarray):
        return np.array_equal(old, new)
    if isinstance(old, dict):  # numpy's, of any bit generator
        return all(_same_state(state, new.get(name)) for name, state in old.items())
    return bool(old == new)


def expect_unshared(name: str, result: Tensor, others: Mapping[str, Any], why: str = "") -> None:
    """Raise GradientMismatch if a result shares storage with one of the other tensors."""
    _expect_outside(name, result, _owners(others), why)


def expect_no_overlap(name: str, result: Tensor, why: str) -> None:
    """Raise GradientMismatch if several entries of a result lie in one place in memory."""
    places = torch.arange(reach(result), device="cpu").as_strided(result.shape, result.stride())
    if int(places.flatten().bincount(minlength=1).max()) > 1:
        raise GradientMismatch(
            f"{name} has several entries in one place in memory{why}, as an expanded tensor has: "
            "nothing can be written over it. The remedy is a clone()"
        )


def expect_own(case: Case, gradients: Leaves) -> None:
    """Raise GradientMismatch if a gradient shares memory with an input or another gradient."""
    names, owners = case.names, _owners(case.inputs)
    found: dict[int, str] = {}
    for name, gradient in zip(names, gradients, strict=True):
        _expect_outside(f"the gradient for {name}", gradient, owners)
        if gradient.numel() and found.setdefault(gradient.data_ptr(), name) != name:
            raise GradientMismatch(
                f"the gradients for {found[gradient.data_ptr()]} and {name} share memory: "
                "whoever writes to one changes the other"
            )


def _expect_outside(name: str, result: Tensor, owners: Mapping[int, str], why: str = "") -> None:
    if result.numel() and (owner := owners.get(_storage(result))) is not None:
        raise GradientMismatch(
            f"{name} shares memory with {owner}{why}: whoever writes to one changes the other. "
            "The remedy is a clone()"
        )


def _owners(tensors: Mapping[str, Any]) -> dict[int, str]:
    """The names of tensors by their storage."""
    return {_storage(x): name for name, x in tensors_of(tensors).items() if x.numel()}


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
