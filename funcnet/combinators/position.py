"""Where in a network an error was raised: `layer 2: stem: …`."""

from __future__ import annotations

import torch


class Position:
    """A block that works on one child after another: what is raised in it names child `i`."""

    i: int

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self.names = names

    def __enter__(self) -> Position:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # torch.compile cannot follow what is done to an error.
        if isinstance(error, (ValueError, TypeError)) and not torch.compiler.is_compiling():
            where = self.names[self.i] if self.names else f"layer {self.i}"
            error.args = (f"{where}: {error}",)
