"""Calls that torch.compile does not look into.

Import this where it compiles, and only there: it imports the compiler, which takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def constant(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function does while it is compiled, the same whenever the graph runs."""
    return function(*arguments)


@partial(
    torch.compiler.disable,
    reason="no graph holds a function of funcnet.distributed: compile what is between them",
)
def as_it_is(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Return what a function does that runs between graphs."""
    return function(*arguments, **named)
