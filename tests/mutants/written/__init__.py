"""The bugs written by hand: what someone might write, or forget, in a derivation or in the frame.

Each is one replacement in one file, where the old text stands exactly once. A new bug is one new
row. What it breaks must be something that a user would call wrong, so nothing that only costs
time. A row quotes code, and neither a message nor a docstring. Ordinary layers need no rows, since
`operators.py` makes their bugs; `vocabulary.py` has the few that no operator makes.
"""

from __future__ import annotations

from ..mutant import Written
from .checkpoint import CHECKPOINT
from .convolution import CONVOLUTION
from .distributed import DISTRIBUTED
from .frame import FRAME
from .interop import INTEROP
from .karatsuba import KARATSUBA
from .keys import KEYS
from .low_resolution import LOW_RESOLUTION, PHASES, TILES
from .optimizers import OPTIMIZERS
from .per_example import PER_EXAMPLE
from .tiling import TILING
from .vocabulary import VOCABULARY

WRITTEN: tuple[Written, ...] = (
    *FRAME,
    *CONVOLUTION,
    *LOW_RESOLUTION,
    *PHASES,
    *TILES,
    *KARATSUBA,
    *OPTIMIZERS,
    *KEYS,
    *CHECKPOINT,
    *VOCABULARY,
    *PER_EXAMPLE,
    *INTEROP,
    *DISTRIBUTED,
    *TILING,
)
