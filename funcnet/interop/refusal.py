"""An error that names all that is wrong at once."""

from __future__ import annotations

from collections.abc import Sequence


def refusal(expected: str, problems: Sequence[str]) -> ValueError:
    """Return the error that something was expected, and a line for each problem."""
    return ValueError("\n  ".join([f"{expected}, got", *problems]))
