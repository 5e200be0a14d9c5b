"""The place in a network where an error was raised: `layer 2: stem: …`."""

from __future__ import annotations

import torch


class Position:
    """A block that works on one child after another: errors raised in it name child `i`."""

    i: int

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self.names = names

    def __enter__(self) -> Position:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # torch.compile cannot follow what is done to an error.
        if not isinstance(error, Exception) or torch.compiler.is_compiling():
            return
        where = self.names[self.i] if self.names else f"layer {self.i}"
        if isinstance(error, (ValueError, TypeError, RuntimeError)):
            given, message = error.args, f"{where}: {error}"
            error.args = (message,)
            if str(error) == message:
                return
            # Its class writes the message itself, from what it was given.
            error.args = given
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(f"raised in {where}")
