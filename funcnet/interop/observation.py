"""The traits of a torch.nn.Module, found out by running it on random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcnet.compat import version
from funcnet.keys import key, normal
from funcnet.layer import Shape


class Traits(NamedTuple):
    """The traits of a module that has seen a batch of examples of `shape`."""

    shape: Shape
    out_shape: Shape
    takes_integers: bool
    writes_x: bool
    needs_row_major: bool
    couples_examples: bool


def observe(module: nn.Module, shape: Shape) -> Traits:
    """Return the traits of a module. Raises ValueError unless y is a function of params and x."""
    like = tensor_like(module)
    cuda = [like.device] if like.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(cuda), _purity(module):
        x, y, writes_x = _first_run(module, shape, like)
        out_shape = shape_of_one(f"wrap: {type(module).__name__}", y)
        x = _numbers(0, shape, like) if x.is_floating_point() else x
        needs_row_major = not _runs(module, _column_major(x))
        is_pure = _is_close(y, module(x.clone()))
        couples = x.is_floating_point() and _couples(module, shape, like)
    if not is_pure:
        raise ValueError(
            f"wrap: expected a module whose y depends on x and its parameters alone, got "
            f"{type(module).__name__}, which gave another y the second time"
        )
    takes_integers = not x.is_floating_point()
    return Traits(shape, out_shape, takes_integers, writes_x, needs_row_major, couples)


def tensor_like(module: nn.Module) -> Tensor:
    """Return a tensor with the dtype and device of a module, float32 on the CPU if it has none."""
    tensors = (*module.parameters(), *module.buffers())
    found = (tensor for tensor in tensors if tensor.is_floating_point())
    return next(found, torch.empty(0, dtype=torch.float32, device="cpu"))


def shape_of_one(who: str, y: Any) -> Shape:
    """Return the shape of an example of y. Raises ValueError unless y is a batch of 2 numbers."""
    if not isinstance(y, Tensor) or not y.is_floating_point():
        got = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"{who}: expected y to be one floating-point tensor, got {got}")
    if y.shape[:1] != (2,):
        raise ValueError(
            f"{who}: expected y of shape (2, …) for a batch of 2, got {tuple(y.shape)}"
        )
    return tuple(y.shape[1:])


def _first_run(module: nn.Module, shape: Shape, like: Tensor) -> tuple[Tensor, Any, bool]:
    """Return (x, y, whether x was written to), x of numbers if the module takes them, else ints."""
    x = _numbers(0, shape, like)
    try:
        return _run(module, x)
    except Exception as error:  # a module may raise anything
        try:
            x = torch.zeros((2, *shape), dtype=torch.int64, device=like.device)
            return _run(module, x)
        except Exception:
            raise ValueError(
                f"wrap: expected examples that {type(module).__name__} takes, got shape {shape}: "
                f"{error}"
            ) from error


def _run(module: nn.Module, x: Tensor) -> tuple[Tensor, Any, bool]:
    before = version(x)
    y = module(x)
    return x, y, version(x) != before


def _couples(module: nn.Module, shape: Shape, like: Tensor) -> bool:
    """Whether the first example's y depends on the second example."""
    x = _numbers(0, shape, like)
    other = torch.cat([x[:1], _numbers(1, shape, like)[1:]])
    return not _is_close(module(x)[:1], module(other)[:1])


def _runs(module: nn.Module, x: Tensor) -> bool:
    """Whether the module takes x."""
    try:
        module(x)
    except Exception:  # a module may raise anything
        return False
    return True


def _column_major(x: Tensor) -> Tensor:
    """Return a copy whose axes lie in memory in the opposite order."""
    order = [*reversed(range(x.ndim))]
    return x.permute(order).clone(memory_format=torch.contiguous_format).permute(order)


def _is_close(y: Tensor, other: Tensor) -> bool:
    return torch.allclose(y, other, rtol=1e-2, atol=1e-4, equal_nan=True)


def _numbers(seed: int, shape: Shape, like: Tensor) -> Tensor:
    """Return random numbers for 2 examples, in a tensor that nothing has been written to."""
    return normal(key(seed), (2, *shape)).to(like, copy=True)


@contextmanager
def _purity(module: nn.Module) -> Iterator[None]:
    """Raise ValueError for a module that has drawn numbers or changed its buffers in between."""
    drawing: list[str] = []
    before = {name: (b, b.clone(), version(b)) for name, b in module.named_buffers()}
    watched = module.named_modules()
    handles = [handle for name, child in watched for handle in _watch(name, child, drawing)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if drawing:
        names = ", ".join(dict.fromkeys(drawing))
        raise ValueError(
            f"wrap: expected a module that draws no numbers, got {names}: "
            "keys decide nothing there. Call eval() on it, or put fn.Dropout in its place"
        )
    changed = [name for name, b in module.named_buffers() if _is_changed(b, *before[name])]
    if changed:
        owners = {name.rpartition(".")[0]: None for name in changed}
        described = [_described(name, module.get_submodule(name)) for name in owners]
        raise ValueError(
            f"wrap: expected a module that changes no buffers, got {', '.join(described)}, which "
            f"changes {', '.join(changed)}. Call eval() on it, or put fn.BatchNorm in its place"
        )


def _is_changed(buffer: Tensor, same: Tensor, values: Tensor, before: int) -> bool:
    """Whether a buffer is another tensor, or was written to; not every kernel counts its writes."""
    if buffer is not same or version(buffer) != before:
        return True
    return not bool(((buffer == values) | buffer.isnan()).all())


def _watch(name: str, module: nn.Module, drawing: list[str]) -> list[Any]:
    """Note a module, innermost first, whose forward pass changes the state of a generator."""
    states: list[tuple[list[Tensor], int]] = []

    def before(*_: Any) -> None:
        states.append((_generators(), len(drawing)))

    def after(*_: Any) -> None:
        then, count = states.pop()
        changed = not all(map(torch.equal, then, _generators()))
        if changed and len(drawing) == count:
            drawing.append(_described(name, module))

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _generators() -> list[Tensor]:
    is_used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if is_used else [])]


def _described(name: str, module: nn.Module) -> str:
    mode = "train mode" if module.training else "eval mode"
    kind = type(module).__name__
    return f"{name} ({kind}, {mode})" if name else f"{kind} ({mode})"
