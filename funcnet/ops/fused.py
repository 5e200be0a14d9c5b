"""Adam's step in one pass over memory, by PyTorch's kernel for the CPU.

The kernel reads and writes memory as it lies. It is handed a large tensor as a row of its numbers,
because it takes longer for other orders of axes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from funcnet.compat import fused_adam, fused_adamw
from funcnet.ops.each import Each, Scalar, Tensors
from funcnet.ops.inplace import TENSORS

_DTYPES = frozenset((torch.float32, torch.float64))  # in 16 bits it rounds less than torch.optim

_MANY = 2**12
"""From how many numbers a view costs less than it saves: a step of weights in channels_last of
64×64×3×3 and more takes 0.6 of the time, of 8×8×3×3 1.2 times as long (Intel Xeon, one thread)."""


def fits_adam(each: Each, lr: Scalar, p: Tensors, g: Tensors, *state: Tensors) -> bool:
    """Whether the kernel may be called: it has no gradient, and reads p's memory as it lies."""
    if fused_adam is None:
        return False
    if not (each.eager and isinstance(lr, float) and _DTYPES.issuperset([x.dtype for x in p])):
        return False
    is_tracked = torch.is_grad_enabled()
    for xs in (p, g, *state):
        if not TENSORS.issuperset([type(x) for x in xs]):
            return False
        if is_tracked and True in [x.requires_grad for x in xs]:
            return False
    dense = [x.is_cpu and (x.is_contiguous() or _is_dense(x.shape, x.stride())) for x in p]
    return all(dense)


def adam(
    each: Each,
    lr: float,
    n: int,
    p: Tensors,
    g: Tensors,
    *state: Tensors,
    is_adamw: bool,
    **rest: Any,
) -> tuple[Tensors, ...]:
    """(p, *state) after step number n. `rest` is what the kernel takes by torch.optim's names."""
    if not each.write:
        p, *state = ([x.clone() for x in xs] for xs in (p, *state))  # type: ignore[assignment]
    if p:
        kernel: Any = fused_adamw if is_adamw else fused_adam
        g, *moments = (_laid_out_like(p, xs) for xs in (g, *state))
        steps = [torch.tensor(n, dtype=torch.float32, device="cpu")] * len(p)
        large = [i for i, x in enumerate(p) if x.numel() >= _MANY and not x.is_contiguous()]
        rows = (_rows(xs, large) if xs else xs for xs in (p, g, *moments))
        kernel(*rows, steps, lr=lr, **rest)
        for new, old in zip(moments, state, strict=True):
            if new is not old:
                for x, kept in zip(new, old, strict=True):
                    kept.copy_(x)
    return p, *state


def _rows(xs: Tensors, which: list[int]) -> Tensors:
    """Dense tensors, some of them as views of their numbers in the order of their memory."""
    rows = [*xs]
    for i in which:
        rows[i] = xs[i].as_strided((xs[i].numel(),), (1,))
    return rows


def _laid_out_like(p: Tensors, xs: Tensors) -> Tensors:
    """xs, each with the strides of its p, which is dense."""
    if not xs or [x.stride() for x in xs] == [x.stride() for x in p]:
        return xs
    return [torch.empty_like(like).copy_(x) for like, x in zip(p, xs, strict=True)]


# Without the cache, this takes as long as the step of a small tensor.
@lru_cache(maxsize=1024)
def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a tensor fills its memory once, in whatever order of its axes."""
    size = 1
    for stride, n in sorted(zip(strides, shape, strict=True)):
        if n > 1:
            if stride != size:
                return False
            size *= n
    return True
