"""Work in place, on memory that funcnet has just made itself.

It saves a pass over memory and changes no number. Autograd refuses some writes, and torch.func may
refuse them halfway; torch.jit.trace loses them. There the same numbers are written to new memory.
So they are for dual numbers, whose tangents some kernels lose when they work in place.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from funcnet.compat import (
    dual_level,
    innermost_transformation,
    is_jit_tracing,
    none_but_vmap,
)


def is_eager() -> bool:
    """Whether torch runs eagerly: not inside torch.func, torch.compile, torch.export or a trace.

    Nor inside forward-mode autograd, which makes dual numbers.
    """
    # This runs several times a layer: every Python call counts.
    if torch.compiler.is_compiling() or is_jit_tracing():
        return False
    return innermost_transformation() is None and dual_level(forward_ad) < 0


def is_transforming() -> bool:
    """Whether what torch.compile compiles here runs inside a transformation of torch.func."""
    from funcnet.compiling import constant

    is_one: bool = constant(lambda: innermost_transformation() is not None)
    return is_one


def is_mapped_alone() -> bool:
    """Whether torch runs eagerly, or with torch.func.vmap as its only transformation."""
    if torch.compiler.is_compiling() or is_jit_tracing():
        return False
    return none_but_vmap() and dual_level(forward_ad) < 0


def is_tracing() -> bool:
    """Whether torch.jit.trace records, where sizes are tensors."""
    return not torch.compiler.is_compiling() and is_jit_tracing()


def has_open_sizes(x: Tensor) -> bool:
    """Whether a graph is being made that has to work for other sizes of x.

    If Python branches on a size there, or loops over it, the graph works for one size alone.
    """
    if torch.compiler.is_compiling():
        # The import takes half a second, unless torch compiles: then it has been made already.
        from torch.fx.experimental.symbolic_shapes import has_static_value

        is_exporting = torch.compiler.is_exporting()
        return is_exporting or not all(has_static_value(size) for size in x.shape)
    return are_open(x.shape)


def are_open(sizes: Iterable[object]) -> bool:
    """Whether some sizes are not ints: tensors in a trace, or SymInts of make_fx."""
    return not _INT.issuperset(map(type, sizes))


_INT = frozenset((int,))


def has_values(x: Tensor) -> bool:
    """Whether Python may read x's values, without waiting for a device."""
    return x.is_cpu and is_eager() and type(x) in TENSORS  # a FakeTensor has none


TENSORS = frozenset((Tensor, torch.nn.Parameter))
"""The types of plain tensors; a subclass may be anything."""


def in_layout_of(like: Tensor, x: Tensor) -> Tensor:
    """x in the memory layout of another tensor, by a product, which autograd can differentiate."""
    return torch.ones_like(like) * x


def is_expanded(x: Tensor) -> bool:
    """Whether several entries share one place in memory, so that x cannot be written over.

    The stride of an axis of size 1 may be anything.
    """
    if 0 not in x.stride() or not x.numel():
        return False
    return any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True))


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, written over x, which autograd does not need."""
    return x.add_(y) if is_eager() else x + y


def add_into(out: Tensor, x: Tensor, y: Tensor, alpha: int = 1) -> None:
    """out = x + alpha · y."""
    if is_eager():
        try:
            torch.add(x, y, alpha=alpha, out=out)
            return
        except RuntimeError:
            pass
    out.copy_(x).add_(y, alpha=alpha)


def is_untracked(*tensors: Tensor | None) -> bool:
    """Whether torch runs eagerly and autograd records nothing computed from `tensors`."""
    return is_eager() and has_no_tape(*tensors)


def has_no_tape(*tensors: Tensor | None) -> bool:
    """Whether autograd records nothing computed from `tensors`."""
    return not torch.is_grad_enabled() or not any(
        t is not None and t.requires_grad for t in tensors
    )


def add_over(x: Tensor, y: Tensor) -> Tensor:
    """x + y, written over x where torch allows it: nobody else has x, but autograd may need it."""
    if is_eager() and not x.requires_grad:
        try:
            return x.add_(y)
        except RuntimeError:  # x is expanded, or y needs a gradient
            pass
    return x + y


def multiply(x: Tensor, y: Tensor | float) -> Tensor:
    """x · y, written over x."""
    return x.mul_(y) if is_eager() else x * y


def add_product(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x + y · z, written over x."""
    return x.addcmul_(y, z) if is_eager() else torch.addcmul(x, y, z)
