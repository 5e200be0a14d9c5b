"""The gradients that a backward pass is asked for: it computes no others."""

from __future__ import annotations

from typing import NamedTuple


class Need(NamedTuple):
    """Whether gradients of parameters and of the input are needed."""

    params: bool = True
    input: bool = True
    consume: bool = False
    """Whether residuals may be freed as they are used, since nobody uses them again."""
    each: bool = False
    """Whether a layer's gradients of parameters are wanted for each example, by `_bwd_each`."""
