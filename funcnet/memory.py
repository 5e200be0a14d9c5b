"""Keep the memory that one training step frees for the next one.

The C library of Linux hands freed memory back to the system once a threshold of it lies unused at
the top of its heap (mallopt(3), M_TRIM_THRESHOLD). A training step frees and takes back the same
tens of megabytes, and fetching them from the system page by page takes up to half as long again as
the arithmetic. Importing the package sets the threshold to 256 MiB, with blocks of up to 32 MiB on
the heap. The setting is for the whole process. It is left alone where the user has tuned the C
library by its own variables (GLIBC_TUNABLES, MALLOC_…) or sets FUNCNET_KEEP_MEMORY=0, and on other
systems.
"""

import ctypes
import os
import sys

SWITCH = "FUNCNET_KEEP_MEMORY"
"""The environment variable that, set to 0, leaves the C library as it is."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Set both thresholds, if this C library has them and the user has not."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    tuned = "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in os.environ)
    refused = os.environ.get(SWITCH) == "0"
    if not sys.platform.startswith("linux") or tuned or refused:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 2**28)
        mallopt(_M_MMAP_THRESHOLD, 2**25)
