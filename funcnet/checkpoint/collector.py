"""Python's garbage collector, out of the way while a file is read."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Switch the collector off meanwhile, if it was on.

    It looks through all objects of the process again and again when many are made, and a tree of
    thousands of tensors is many, none of them garbage: a third of the time of loading it.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
