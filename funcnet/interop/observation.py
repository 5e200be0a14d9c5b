"""The traits of a torch.nn.Module, found out by running it on random numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from funcnet.compat import version
from funcnet.interop.purity import purity
from funcnet.keys import fold_in, key, normal, uniform
from funcnet.layer import Shape
from funcnet.ops.autocast import without_autocast


class Traits(NamedTuple):
    """The traits of a module that has seen batches of examples of `shape`."""

    shape: Shape
    out_shape: Shape
    takes_integers: bool
    writes_x: bool
    needs_row_major: bool
    couples_examples: bool


_BATCH = 3
"""Examples in a batch. Its parts have 1 and 2: three sizes, all different."""

_Draw: TypeAlias = Callable[[int], Tensor]
"""Returns a batch of examples that the module takes, for a seed."""


def observe(module: nn.Module, shape: Shape) -> Traits:
    """Return the traits of a module. Raises ValueError unless y is a function of params and x.

    The module also runs with random parameters: its own may hide what it does, as a last layer of
    zeros hides all that comes before it.
    """
    like = tensor_like(module)
    cuda = [like.device] if like.is_cuda else []
    with without_autocast(like), torch.no_grad(), torch.random.fork_rng(cuda):
        if any(map(nn.parameter.is_lazy, module.parameters())):
            _first_run(module, shape, like)  # which makes parameters
        other, who = copy.deepcopy(module), type(module).__name__
        with purity(module):
            draw, y, writes_x = _first_run(module, shape, like)
            out_shape, x = shape_of_one(f"wrap: {who}", y, _BATCH), draw(0)
            _check_dtype(module, x, y)
            needs_row_major = _run(module, _column_major(x)) is None
            is_pure = _is_close(y, module(x), rtol=1e-2, atol=_fine(y))
            couples = _couples(module, draw)
        used = copy.deepcopy(module)
        _check_gradient(used, draw(0))
        remembers = _remembers(other, used, draw(0))
        with purity(other):
            couples = _couples(other, draw) or couples
        for factor in (-100, -1):  # a module may write to parameters that are large, or below 0
            _multiply(other, factor)
            with purity(other):
                _run(other, draw(0))
    if not is_pure or remembers:
        found = "computes with earlier parameters" if is_pure else "gave another y the second time"
        raise ValueError(
            "wrap: expected a module whose y depends on x and its parameters alone, got "
            f"{who}, which {found}"
        )
    takes_integers = not x.is_floating_point()
    return Traits(shape, out_shape, takes_integers, writes_x, needs_row_major, couples)


def tensor_like(module: nn.Module) -> Tensor:
    """Return a tensor with the dtype and device of a module, float32 on the CPU if it has none."""
    tensors = (*module.parameters(), *module.buffers())
    found = (tensor for tensor in tensors if tensor.is_floating_point())
    return next(found, torch.empty(0, dtype=torch.float32, device="cpu"))


def shape_of_one(who: str, y: Any, count: int) -> Shape:
    """Return the shape of an example of y. Raises ValueError unless y is a batch of `count`."""
    if not isinstance(y, Tensor) or not y.is_floating_point():
        got = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"{who}: expected y to be one floating-point tensor, got {got}")
    if y.shape[:1] != (count,):
        raise ValueError(
            f"{who}: expected y of shape ({count}, …) for a batch of {count}, got {tuple(y.shape)}"
        )
    return tuple(y.shape[1:])


def _check_dtype(module: nn.Module, x: Tensor, y: Tensor) -> None:
    """Raise ValueError unless y has the dtype of x and the module."""
    dtype, has_one = tensor_like(module).dtype, any(True for _ in module.parameters())
    if y.dtype != dtype and (has_one or x.is_floating_point()):
        raise ValueError(
            f"wrap: {type(module).__name__}: expected y of {dtype}, got {y.dtype}: "
            "a layer keeps the dtype of its params and x"
        )


def _check_gradient(module: nn.Module, x: Tensor) -> None:
    """Raise ValueError for a module that fails in its backward pass, or under autograd."""
    starts = [t.requires_grad_() for t in (x, *module.parameters()) if t.is_floating_point()]
    try:
        with torch.enable_grad():
            y = module(x.clone())
        if y.requires_grad:
            torch.autograd.grad(y, starts, torch.ones_like(y), allow_unused=True)
    except Exception as error:  # a module may raise anything
        raise ValueError(
            "wrap: expected a module that autograd can differentiate, got "
            f"{type(module).__name__}: {error}"
        ) from error


# --- Runs


def _first_run(module: nn.Module, shape: Shape, like: Tensor) -> tuple[_Draw, Any, bool]:
    """Return (the draw of x, y, whether x was written to): x of floats if taken, else of ints."""
    first: Exception | None = None
    for draw in _draws(module, shape, like):
        x = draw(0)
        before = version(x)
        try:
            y = module(x)
        except Exception as error:  # a module may raise anything
            first = error if first is None else first
        else:
            is_written = version(x) != before or not torch.equal(x, draw(0))
            return draw, y, is_written
    raise ValueError(
        f"wrap: expected examples that {type(module).__name__} takes, got shape {shape}: {first}"
    ) from first


def _run(module: nn.Module, x: Tensor) -> Any:
    """Return y, or None if the module does not take x."""
    try:
        return module(x)
    except Exception:  # a module may raise anything
        return None


def _draws(module: nn.Module, shape: Shape, like: Tensor) -> Iterator[_Draw]:
    """Yield the draws of floats, of integers that index every table in the module, and of zeros."""
    size = (_BATCH, *shape)
    tables = [m for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    rows = min((table.num_embeddings for table in tables), default=2)
    yield lambda seed: normal(key(seed), size).to(like)
    yield lambda seed: (uniform(key(seed), size) * rows).to(like.device, torch.int64)
    yield lambda seed: torch.zeros(size, dtype=torch.int64, device=like.device)


def _column_major(x: Tensor) -> Tensor:
    """Return a copy whose axes lie in memory in the opposite order."""
    order = [*reversed(range(x.ndim))]
    return x.permute(order).clone(memory_format=torch.contiguous_format).permute(order)


def _randomize(module: nn.Module) -> None:
    """Write random parameters into a module, of a size at which numbers neither grow nor fade."""
    for i, parameter in enumerate(module.parameters()):
        if parameter.is_floating_point():
            scale = max(1, math.prod(parameter.shape[1:])) ** -0.5
            parameter.copy_(normal(fold_in(key(2), i), tuple(parameter.shape)) * scale)


def _multiply(module: nn.Module, factor: float) -> None:
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.mul_(factor)


# --- Comparisons


def _remembers(other: nn.Module, used: nn.Module, x: Tensor) -> bool:
    """Whether a module that has run gives another y than a copy that has not.

    Both get the same random parameters: a module may have kept what it computed from its own.
    """
    _randomize(other)
    _randomize(used)
    y, again = _run(other, x.clone()), _run(used, x.clone())
    return y is not None and (again is None or not _is_close(y, again, rtol=1e-2, atol=_fine(y)))


def _couples(module: nn.Module, draw: _Draw) -> bool:
    """Whether the y of an example depends on another, or on the number of examples."""
    y, others = _run(module, draw(0)), draw(1)
    if y is None:
        return False
    for i in range(_BATCH):
        x = draw(0)
        x[i] = others[i]
        changed, rest = _run(module, x), [j for j in range(_BATCH) if j != i]
        if changed is None or not _is_close(y[rest], changed[rest], rtol=0.0, atol=_fine(y)):
            return True
    parts = _in_parts(module, draw(0), tuple(y.shape[1:]))
    # Kernels for batches of other sizes round otherwise.
    coarse = max(1e-2, torch.finfo(y.dtype).eps ** 0.5)
    return parts is None or not _is_close(y, parts, rtol=0.0, atol=coarse)


def _in_parts(module: nn.Module, x: Tensor, shape: Shape) -> Tensor | None:
    """Return y of one example and of the others; None if the module wants several, as a norm may.

    Raises ValueError unless an example of y has this shape, whatever the number of examples.
    """
    found, who = [], f"wrap: {type(module).__name__}"
    for part in (x[:1].clone(), x[1:].clone()):
        y, count = _run(module, part), len(part)
        if y is None:
            return None
        if shape_of_one(who, y, count) != shape:
            raise ValueError(
                f"{who}: expected y of shape {(count, *shape)} for a batch of {count}, as for "
                f"one of {len(x)}, got {tuple(y.shape)}"
            )
        found.append(y)
    return torch.cat(found)


def _is_close(y: Tensor, other: Tensor, *, rtol: float, atol: float) -> bool:
    """Whether tensors are the same; atol is relative to y's largest finite entry."""
    scale = float(y.abs().nan_to_num(0.0, 0.0).max()) if y.numel() else 0.0
    return torch.allclose(y, other, rtol=rtol, atol=atol * scale, equal_nan=True)


def _fine(y: Tensor) -> float:
    """The relative error in y of a few roundings in another order."""
    return float(torch.finfo(y.dtype).eps ** 0.75)
