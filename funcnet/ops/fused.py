"""Adam's step in one pass over memory, by PyTorch's kernel for the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcnet.compat import fused_adam, fused_adamw
from funcnet.ops.each import Each, Scalar, Tensors
from funcnet.ops.inplace import TENSORS

_DTYPES = frozenset((torch.float32, torch.float64))  # in 16 bits it rounds less than torch.optim


def fits_adam(each: Each, lr: Scalar, p: Tensors, g: Tensors, *state: Tensors) -> bool:
    """Whether the kernel may be called: it knows no autograd, and reads p's memory as it lies."""
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
    return all(x.is_cpu and _is_dense(x) for x in p)


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
        kernel(p, g, *moments, steps, lr=lr, **rest)
        for new, old in zip(moments, state, strict=True):
            if new is not old:
                for x, kept in zip(new, old, strict=True):
                    kept.copy_(x)
    return p, *state


def _laid_out_like(p: Tensors, xs: Tensors) -> Tensors:
    """xs, each with the order of its axes in memory that p has, which is dense."""
    if not xs or [x.stride() for x in xs] == [x.stride() for x in p]:
        return xs
    return [torch.empty_like(like).copy_(x) for like, x in zip(p, xs, strict=True)]


def _is_dense(x: Tensor) -> bool:
    """Whether x fills its memory once, in whatever order of its axes."""
    if x.is_contiguous():
        return True
    size = 1
    for stride, n in sorted(zip(x.stride(), x.shape, strict=True)):
        if n > 1:
            if stride != size:
                return False
            size *= n
    return True
