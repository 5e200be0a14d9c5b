"""The gradient of an embedding, a table whose rows are selected by integers x:

    dweight[i] = Σ dy[n, …] over x[n, …] = i, and 0 for i = `padding`.

Sums in half precision would stop growing: on the CPU, they are taken in float32. Where x names few
rows, only these are made in float32, since the table may be as large as the rest of a network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from funcnet.ops import native
from funcnet.ops.inplace import has_values

_backward: Callable[..., Tensor] = torch.ops.aten.embedding_dense_backward


def gradient(dy: Tensor, x: Tensor, rows: int, padding: int | None) -> Tensor:
    """dweight (rows, E), of dy (N, …, E) and x (N, …)."""
    wide, ignored = native.upcast(dy), -1 if padding is None else padding
    # Sorting x saves time if it names at most a quarter as many rows as there are.
    if wide is dy or 4 * x.numel() > rows or not has_values(x):
        return _backward(wide, x, rows, ignored, False).to(dy.dtype)
    named, place = torch.unique(x, return_inverse=True)
    sums = _backward(wide, place, len(named), -1, False)
    dweight = dy.new_zeros(rows, dy.shape[-1]).index_copy_(0, named.long(), sums.to(dy.dtype))
    if padding is not None:
        dweight[padding] = 0.0
    return dweight
