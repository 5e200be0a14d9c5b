"""An error that names all that is wrong at once."""

from __future__ import annotations

from collections.abc import Sequence


def refusal(expected: str, problems: Sequence[str], remedy: str = "") -> ValueError:
    """Return the error that something was expected, a line for each problem, and the remedy."""
    text = "\n  ".join([f"{expected}, got", *problems])
    return ValueError(f"{text}\n{remedy}" if remedy else text)
