"""Calls that torch.compile does not look into.

Import this only while torch compiles: it imports the compiler, which takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def constant(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function at compile time. Its result is a constant of the graph."""
    return function(*arguments)


@partial(
    torch.compiler.disable,
    reason="no graph holds a function of funcnet.distributed: compile what is between them",
)
def as_it_is(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a function between graphs, as it is, whenever the compiled code runs."""
    return function(*arguments, **named)
