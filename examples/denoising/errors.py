"""Errors and warnings of one line."""

from __future__ import annotations

import sys


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line."""


def warn(message: str) -> None:
    print(f"denoise.py: warning: {message}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """The message of an error, with the path for an OSError."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
