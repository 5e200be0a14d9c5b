"""Verification of gradients, of funcnet's layers and of your own.

    from funcnet.testing import GradientMismatch, check_function, check_vjp, strategies

`check_vjp(layer, params, x)` checks the gradient and the contract of a layer, network or loss.
`check_function(function, *inputs)` checks the gradient of an autograd.Function, an nn.Module or any
other function.
`strategies` draws layers, inputs that fit them, networks and trees for Hypothesis. It is imported
on first use, since Hypothesis comes with `pip install funcnet[test]` only; so is `registry`, a row
for each layer.
`python -m funcnet.testing` checks every layer in many random cases and prints a table.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from funcnet.testing.check import check_function, check_vjp
from funcnet.testing.errors import GradientMismatch

if TYPE_CHECKING:
    from funcnet.testing import registry, strategies

__all__ = ["GradientMismatch", "check_function", "check_vjp", "registry", "strategies"]


def __getattr__(name: str) -> Any:
    if name in ("registry", "strategies"):
        return importlib.import_module(f"funcnet.testing.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
