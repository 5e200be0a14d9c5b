"""Check that a torch.nn.Module is a function of its parameters and x."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from funcnet.checks import some
from funcnet.compat import version


@contextmanager
def purity(module: nn.Module) -> Iterator[None]:
    """Raise ValueError if, in this block, the module draws numbers or writes to its tensors."""
    drawing: list[str] = []
    before = {name: (t, t.clone(), version(t)) for name, t in _tensors(module)}
    watched = module.named_modules()
    handles = [handle for name, child in watched for handle in _watch(name, child, drawing)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if drawing:
        raise ValueError(
            f"wrap: expected a module that draws no numbers, got {some(dict.fromkeys(drawing))}: "
            "keys decide nothing there. Call eval() on it, or put fn.Dropout in its place"
        )
    changed = [name for name, tensor in _tensors(module) if _is_changed(tensor, *before[name])]
    buffers = {name for name, _ in module.named_buffers()}
    parameters = [name for name in changed if name not in buffers]
    if parameters:
        raise ValueError(
            "wrap: expected a module that does not write to its parameters, got "
            f"{_owners(module, parameters)}: params are the caller's. "
            "Compute with a changed copy in its place, or as torch.nn.utils.parametrize does"
        )
    if changed:
        raise ValueError(
            f"wrap: expected a module that changes no buffers, got {_owners(module, changed)}. "
            "Call eval() on it, or put fn.BatchNorm in its place"
        )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _owners(module: nn.Module, names: Iterable[str]) -> str:
    """Describe the modules that changed tensors of these names."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    described = some(_described(name, module.get_submodule(name)) for name in owners)
    return f"{described}, which changes {some(names)}"


def _is_changed(tensor: Tensor, same: Tensor, values: Tensor, before: int) -> bool:
    """Whether a tensor was replaced or written to; not every write changes its version."""
    if tensor is not same or version(tensor) != before or tensor.shape != values.shape:
        return True
    return not bool(((tensor == values) | tensor.isnan()).all())


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
