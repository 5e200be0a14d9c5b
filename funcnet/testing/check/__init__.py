"""The check of hand-written gradients: `check_vjp`, `check_function` and what serves them alone."""

from funcnet.testing.check.comparison import Errors
from funcnet.testing.check.function import check_function
from funcnet.testing.check.vjp import check_vjp, inspect_vjp

__all__ = ["Errors", "check_function", "check_vjp", "inspect_vjp"]
