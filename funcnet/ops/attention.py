"""Attention of a sequence to itself, o = A·v, for each example and each head.

With T rows of q, k and v (T, d), and a scale 1/√d,

    s = q·kᵀ/√d,    p = softmax(s) along each row,    A = p, or p ∘ m/(1 − r) under dropout,

where m keeps a weight with probability 1 − r. Under a causal mask s is −∞ above the diagonal.
With do for ∂L/∂o,

    dv = Aᵀ·do,    dA = do·vᵀ,    dp = dA, or dA ∘ m/(1 − r),
    ds = p ∘ (dp − Σ dp ∘ p along each row),    dq = ds·k/√d,    dk = dsᵀ·q/√d.

On the CPU, PyTorch's kernel computes this block by block, and keeps log Σ exp s of each row: memory
is linear in T. It takes neither dropout nor other devices. There the products above are computed,
with p once more for the gradients: between the passes, memory is linear in T here too, except for
the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funcnet.compat import flash_attention, flash_attention_backward, softmax_backward
from funcnet.ops.accumulation import widened
from funcnet.ops.inplace import is_untracked


def attend(
    qkv: Tensor, heads: int, causal: bool, keep: Tensor | None, scale: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """(o, residuals): o (N, T, E) of q, k and v side by side, (N, T, 3E).

    `keep` is the mask m (N, heads, T, T) and `scale` is 1/(1 − r); None is no dropout.
    """
    q, k, v = _split(qkv, heads)
    if keep is None and _is_for_kernel(qkv):
        o, logsumexp = flash_attention(q, k, v, is_causal=causal)
        return _merged(o), {"logsumexp": logsumexp}
    q, k, v = map(widened, (q, k, v))  # for logits as exact as the kernel's
    weights = _softmax(q, k, causal)
    kept = {} if keep is None else {"keep": keep}
    o = _dropped(weights, kept, scale) @ v
    return _merged(o).to(qkv.dtype), kept


def gradients(
    qkv: Tensor,
    o: Tensor,
    kept: dict[str, Tensor],
    do: Tensor,
    heads: int,
    causal: bool,
    scale: float,
) -> Tensor:
    """∂L/∂qkv (N, T, 3E), given o and the residuals of `attend`."""
    q, k, v = _split(qkv, heads)
    do = _by_head(do, heads)
    if "logsumexp" in kept and _is_for_kernel(qkv, do):
        o = _by_head(o, heads)
        gradients = flash_attention_backward(do, q, k, v, o, kept["logsumexp"], 0.0, causal)
    else:
        q, k, v, do = map(widened, (q, k, v, do))
        p = _softmax(q, k, causal)
        dv = _dropped(p, kept, scale).mT @ do
        dp = _dropped(do @ v.mT, kept, scale)
        ds = softmax_backward(dp, p, -1, p.dtype) * q.shape[-1] ** -0.5
        gradients = ds @ k, ds.mT @ q, dv
    return torch.cat([_merged(t) for t in gradients], -1).to(qkv.dtype)


def _is_for_kernel(qkv: Tensor, grad: Tensor | None = None) -> bool:
    # The kernel divides by T, and has no rule for vmap and no second derivative.
    is_there = flash_attention is not None
    return is_there and qkv.is_cpu and qkv.shape[1] > 0 and is_untracked(qkv, grad)


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """q, k and v, (N, heads, T, d) each."""
    examples, steps, size = qkv.shape
    parts = qkv.reshape(examples, steps, 3, heads, size // (3 * heads))
    return parts.transpose(1, 3).unbind(2)


def _by_head(o: Tensor, heads: int) -> Tensor:
    """(N, T, E) as (N, heads, T, d)."""
    examples, steps, size = o.shape
    return o.reshape(examples, steps, heads, size // heads).transpose(1, 2)


def _merged(o: Tensor) -> Tensor:
    """(N, heads, T, d) as (N, T, E)."""
    return o.transpose(1, 2).flatten(2)


def _softmax(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """p (N, heads, T, T)."""
    s = (q * q.shape[-1] ** -0.5) @ k.mT
    if causal:
        after = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
        s = s.masked_fill(after, float("-inf"))
    return torch.softmax(s, -1)


def _dropped(weights: Tensor, kept: dict[str, Tensor], scale: float) -> Tensor:
    """weights ∘ m/(1 − r), or the weights as they are."""
    if "keep" not in kept:
        return weights
    return weights.masked_fill(kept["keep"].logical_not(), 0.0) * scale
