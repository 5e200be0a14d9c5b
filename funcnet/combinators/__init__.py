"""Layers made of layers."""

from funcnet.combinators.cast import Cast
from funcnet.combinators.concat import Concat
from funcnet.combinators.frozen import Frozen
from funcnet.combinators.loop import Loop
from funcnet.combinators.product import Product
from funcnet.combinators.recompute import Recompute
from funcnet.combinators.repeat import Repeat
from funcnet.combinators.residual import Residual
from funcnet.combinators.reversible import Reversible
from funcnet.combinators.sequential import Sequential
from funcnet.combinators.sum import Sum

__all__ = [
    "Cast",
    "Concat",
    "Frozen",
    "Loop",
    "Product",
    "Recompute",
    "Repeat",
    "Residual",
    "Reversible",
    "Sequential",
    "Sum",
]
