"""What loading raises."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A file cannot be trusted or is not what was asked for; says what is wrong in which entry."""
