"""Keep the memory that one training step frees for the next one.

The C library of Linux hands freed memory back to the system once more than twice the largest block
ever freed lies unused at the top of its heap, at most 64 MiB (mallopt(3), M_MMAP_THRESHOLD). A
training step frees and takes back the same tens of megabytes, and fetching them from the system
page by page takes up to half as long again as the arithmetic. Freeing one block of the largest size
that the C library heeds, here where the package is imported, has it keep 64 MiB from the start. The
block is never touched, so it costs nothing; elsewhere this has no effect.
"""

import torch

_LARGEST_HEEDED = 2**25 - 2**12

torch.empty(_LARGEST_HEEDED, dtype=torch.uint8, device="cpu")
