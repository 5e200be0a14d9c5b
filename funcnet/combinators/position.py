"""Where in a network an error was raised: `layer 2: layer 0: …`."""

from __future__ import annotations

import torch


class Position:
    """A block that works on one child after another: what is raised in it names the child."""

    i: int

    def __enter__(self) -> Position:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # torch.compile cannot follow what is done to an error.
        if isinstance(error, (ValueError, TypeError)) and not torch.compiler.is_compiling():
            error.args = (f"layer {self.i}: {error}",)
