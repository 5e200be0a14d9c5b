"""The verdict that `check_vjp` raises."""

from __future__ import annotations

from typing import Any


class GradientMismatch(AssertionError):  # noqa: N818 (it is a failed assertion)
    """A layer breaks its contract, or its gradient is wrong. The message says where and how.

    What it says can also be read off: `leaf` (`params[2]['weight'][5, 0, 1, 1]`), `analytic`,
    `numeric` and `relative_error` at that entry, `wrong_fraction` of the leaf, `guess` at the cause
    and `snippet`, the code that replays the case; None where the verdict has no such number.
    `layer`, `params`, `x`, `grad` and `key` are what was checked (for a loss, `target` too).
    """

    def __init__(
        self,
        message: str,
        *,
        leaf: str | None = None,
        analytic: float | None = None,
        numeric: float | None = None,
        relative_error: float | None = None,
        wrong_fraction: float | None = None,
        guess: str | None = None,
    ) -> None:
        super().__init__(message)
        self.leaf = leaf
        self.analytic = analytic
        self.numeric = numeric
        self.relative_error = relative_error
        self.wrong_fraction = wrong_fraction
        self.guess = guess
        self.snippet: str | None = None
        self.layer: Any = None
        self.params: Any = None
        self.x: Any = None
        self.grad: Any = None
        self.key: Any = None
        self.target: Any = None
