"""The check of hand-written gradients: `check_vjp` and what serves it alone."""

from funcnet.testing.check.comparison import Errors
from funcnet.testing.check.vjp import check_vjp, inspect_vjp

__all__ = ["Errors", "check_vjp", "inspect_vjp"]
