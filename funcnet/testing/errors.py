"""The exception that `check_vjp` raises, and notes on those of the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class GradientMismatch(AssertionError):  # noqa: N818 (it is a failed assertion)
    """A layer breaks its contract, or its gradient is wrong. The message says where and how.

    The parts of the message are attributes, None where they do not apply: `leaf`
    (`params[2]['weight'][5, 0, 1, 1]`), `analytic`, `numeric` and `relative_error` at that entry,
    `wrong_fraction` of the leaf, `guess` at the cause, and `snippet`, code that replays the case.
    `layer`, `params`, `x`, `grad`, `key` and a loss's `target` are the case that was checked.
    """

    leaf: str | None = None
    analytic: float | None = None
    numeric: float | None = None
    relative_error: float | None = None
    wrong_fraction: float | None = None
    guess: str | None = None
    snippet: str | None = None
    layer: Any = None
    params: Any = None
    x: Any = None
    grad: Any = None
    key: Any = None
    target: Any = None


@contextmanager
def noted(where: str) -> Iterator[None]:
    """Note on an exception of the user's own where it was raised, which changes it no further."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, GradientMismatch) and hasattr(error, "add_note"):  # Python 3.11
            error.add_note(where)
        raise
