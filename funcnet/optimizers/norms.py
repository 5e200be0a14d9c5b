"""The norm of a tree of gradients, and clipping by it."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from funcnet.checks import shown
from funcnet.compat import foreach_norm, norms_in_turn
from funcnet.layer import Tree
from funcnet.ops.inplace import is_eager
from funcnet.optimizers.leaves import flatten


def global_norm(tree: Tree) -> Tensor:
    """√(Σ |x|²) over all numbers of a tree: a 0-dimensional tensor.

    Its dtype is the widest of the leaves', at least float32: sums in half precision would overflow.
    It is 0 for a tree without numbers.

    Raises TypeError, naming the path, for a leaf that is not a floating-point or complex tensor.

    >>> import torch
    >>> global_norm({"a": torch.tensor([3.0]), "b": (torch.tensor(4.0),)})
    tensor(5.)
    """
    return _norm(flatten("global_norm", "tree", tree)[0])


def clip_by_global_norm(grads: Tree, max_norm: float) -> tuple[Tree, Tensor]:
    """(grads · min(1, max_norm / norm), norm), where norm is the `global_norm` before clipping.

    Gradients whose norm is not above max_norm keep their bits, in new tensors. If the norm is NaN,
    all gradients become NaN; if it is infinite, they become 0, and NaN where they are infinite.
    `max_norm` may be infinite.

    Raises ValueError unless max_norm ≥ 0, TypeError unless it is a number, and what `global_norm`
    raises.
    `torch.nn.utils.clip_grad_norm_` divides by norm + 1e-6 instead:
    https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html

    >>> import torch
    >>> clip_by_global_norm({"w": torch.tensor([3.0, 4.0])}, 1.0)
    ({'w': tensor([0.6000, 0.8000])}, tensor(5.))
    """
    check_max_norm("clip_by_global_norm", max_norm)
    gs, structure = flatten("clip_by_global_norm", "grads", grads)
    norm = _norm(gs)
    scale = clipping(norm, max_norm)
    return structure.unflatten([(g * scale.to(g.device)).to(g.dtype) for g in gs]), norm


def clipping(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / norm), the factor that clips a gradient of this norm."""
    fits, one = norm <= float(max_norm), torch.ones_like(norm)
    # Autograd multiplies the derivative of the value not chosen by 0, and 0 · ∞ would be NaN.
    return torch.where(fits, one, float(max_norm) / torch.where(fits, one, norm))


def check_max_norm(who: str, max_norm: float) -> None:
    """Raise unless max_norm is a number ≥ 0, which may be infinite."""
    if isinstance(max_norm, bool) or not isinstance(max_norm, Real):
        raise TypeError(f"{who}: expected max_norm to be a number, got {shown(max_norm)}")
    if not max_norm >= 0:
        raise ValueError(f"{who}: expected max_norm >= 0, got {max_norm}")


def _norm(xs: list[Tensor]) -> Tensor:
    if not xs:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    xs = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in xs]
    dtype, device = torch.float32, xs[0].device
    for x in xs:
        dtype = torch.promote_types(dtype, x.dtype)
    norms = (foreach_norm if is_eager() else norms_in_turn)(xs, 2.0, dtype)
    norm: Tensor = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))
    return norm
