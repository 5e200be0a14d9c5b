"""What a torch.nn.Module does with a batch, found out by running it on random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcnet.keys import key, normal
from funcnet.layer import Shape


class Traits(NamedTuple):
    """What a module was seen to do with a batch of examples of `shape`."""

    shape: Shape
    out_shape: Shape
    takes_integers: bool
    writes_x: bool
    couples_examples: bool


def observe(module: nn.Module, shape: Shape) -> Traits:
    """Return the traits of a module. Raises ValueError unless y is a function of params and x."""
    like = tensor_like(module)
    cuda = [like.device] if like.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(cuda), _purity(module):
        x, y = _first_run(module, shape, like)
        out_shape = shape_of_one(f"wrap: {type(module).__name__}", y)
        writes_x = x._version > 0
        couples = x.is_floating_point() and _couples(module, shape, like)
    return Traits(shape, out_shape, not x.is_floating_point(), writes_x, couples)


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


def _first_run(module: nn.Module, shape: Shape, like: Tensor) -> tuple[Tensor, Any]:
    """Return (x, y), with x of numbers if the module takes them, else of integers."""
    x = normal(key(0), (2, *shape)).to(like)
    try:
        return x, module(x)
    except Exception as error:  # a module may raise anything
        try:
            x = torch.zeros((2, *shape), dtype=torch.int64, device=like.device)
            return x, module(x)
        except Exception:
            raise ValueError(
                f"wrap: expected examples that {type(module).__name__} takes, got shape {shape}: "
                f"{error}"
            ) from error


def _couples(module: nn.Module, shape: Shape, like: Tensor) -> bool:
    """Whether the first example's y depends on the second example."""
    x, other = (normal(key(seed), (2, *shape)).to(like) for seed in (0, 1))
    other[:1] = x[:1]
    y, beside_other = module(x)[:1], module(other)[:1]
    return not torch.allclose(y, beside_other, rtol=1e-2, atol=1e-4, equal_nan=True)


@contextmanager
def _purity(module: nn.Module) -> Iterator[None]:
    """Raise ValueError for a module that has drawn numbers or changed its buffers in between."""
    drawing: list[str] = []
    before = _buffer_states(module)
    handles = [handle for entry in module.named_modules() for handle in _watch(*entry, drawing)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if drawing:
        raise ValueError(
            f"wrap: expected a module that draws no numbers, got {', '.join(drawing)}: "
            "keys decide nothing there. Call eval() on it, or put fn.Dropout in its place"
        )
    changed = [name for name, state in _buffer_states(module).items() if before.get(name) != state]
    if changed:
        owners = {name.rpartition(".")[0]: None for name in changed}
        described = [_described(name, module.get_submodule(name)) for name in owners]
        raise ValueError(
            f"wrap: expected a module that changes no buffers, got {', '.join(described)}, which "
            f"changes {', '.join(changed)}. Call eval() on it, or put fn.BatchNorm in its place"
        )


def _buffer_states(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return what changes with a buffer: the tensor, or its count of writes."""
    return {name: (id(buffer), buffer._version) for name, buffer in module.named_buffers()}


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
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def _described(name: str, module: nn.Module) -> str:
    mode = "train mode" if module.training else "eval mode"
    kind = type(module).__name__
    return f"{name} ({kind}, {mode})" if name else f"{kind} ({mode})"
