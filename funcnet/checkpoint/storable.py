"""What a file can hold: refusing the rest before anything is written."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from funcnet.checkpoint.container import DTYPE_NAMES, MAX_RANK, PAIRED
from funcnet.checkpoint.structure import INT64, MAX_DEPTH, check_text


def check_storable(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that would not come back as they are, by TypeError or ValueError."""
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    _check_untied(tensors)


def check_metadata(metadata: Any, name: str = "metadata", depth: int = 0) -> None:
    """Refuse what JSON would not give back equal, by TypeError or ValueError."""
    if depth == 0 and type(metadata) is not dict:
        raise TypeError(f"metadata: expected a dict, got {type(metadata).__name__}")
    if depth > MAX_DEPTH:
        raise ValueError(f"metadata: expected it nested at most {MAX_DEPTH} deep, got deeper")
    if type(metadata) is dict:
        for key, value in metadata.items():
            if type(key) is not str:
                raise TypeError(f"{name}: expected every key to be a str, got {key!r}")
            check_metadata(key, f"{name}, a key", depth + 1)
            check_metadata(value, f"{name}[{key!r}]", depth + 1)
    elif type(metadata) is list:
        for i, value in enumerate(metadata):
            check_metadata(value, f"{name}[{i}]", depth + 1)
    elif type(metadata) is str:
        check_text(f"{name}: expected a text", metadata)
    elif type(metadata) is float and not math.isfinite(metadata):
        raise ValueError(f"{name}: expected a number that JSON has, got {metadata}")
    elif type(metadata) is int and metadata not in INT64:
        raise ValueError(f"{name}: expected a number of 64 bits, got {metadata:#x}")
    elif metadata is not None and type(metadata) not in (bool, int, float):
        raise TypeError(
            f"{name}: expected a dict, list, str, int, float, bool or None, "
            f"got {type(metadata).__name__}"
        )


def _check_tensor(name: str, tensor: Tensor) -> None:
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise TypeError(f"{name}: expected a plain tensor, got a {type(tensor).__name__}")
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise TypeError(f"{name}: expected a tensor with values, got one inside torch.func")
    if tensor.dtype not in DTYPE_NAMES or tensor.is_quantized:
        raise TypeError(f"{name}: expected a dtype that safetensors stores, got {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got one of {tensor.layout}")
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: expected a tensor with values, got one on the meta device")
    if tensor.dtype in PAIRED and tensor.dim() == 0:
        raise ValueError(f"{name}: expected a dimension along which pairs lie, got shape ()")
    if tensor.dim() > MAX_RANK:
        raise ValueError(f"{name}: expected at most {MAX_RANK} dimensions, got {tensor.dim()}")
    if not tensor.is_leaf:
        raise ValueError(
            f"{name}: expected values only, got a tensor in an autograd graph; detach() it first"
        )


def _check_untied(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that share memory: they would come back as copies, no longer tied."""
    spans = [(*_span(tensor), name) for name, tensor in tensors.items() if tensor.numel()]
    by_device = defaultdict(list)
    for start, end, name in sorted(spans):
        by_device[tensors[name].device].append((start, end, name))
    for found in by_device.values():
        for names in _overlapping(found):
            _check_apart({name: tensors[name] for name in tensors if name in names})


def _overlapping(spans: list[tuple[int, int, str]]) -> Iterator[set[str]]:
    """The names of sorted spans that run into one another, where there are several."""
    names: set[str] = set()
    reach = 0
    for start, end, name in spans:
        if start >= reach:
            if len(names) > 1:
                yield names
            names = set()
        names.add(name)
        reach = max(reach, end)
    if len(names) > 1:
        yield names


def _span(view: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte, and of the one after its last."""
    steps = sum((size - 1) * step for size, step in zip(view.shape, view.stride(), strict=True))
    return view.data_ptr(), view.data_ptr() + (steps + 1) * view.itemsize


def _check_apart(views: dict[str, Tensor]) -> None:
    """Refuse views that have a byte in common; those that interleave, like columns, do not."""
    base = min(view.data_ptr() for view in views.values())
    places = (place for view in views.values() for place in (view.itemsize, view.data_ptr() - base))
    unit = math.gcd(*places)
    size = (max(_span(view)[1] for view in views.values()) - base) // unit

    def within(marks: Tensor, view: Tensor) -> Tensor:
        """The marks of a view's memory, of which there is one for each `unit` bytes."""
        width = view.itemsize // unit
        strides = zip(view.shape, view.stride(), strict=True)
        sizes = [1 if step == 0 else size for size, step in strides]  # expanded: the same memory
        steps = [step * width for step in view.stride()]
        return marks.as_strided([*sizes, width], [*steps, 1], (view.data_ptr() - base) // unit)

    taken = torch.zeros(size, dtype=torch.bool, device="cpu")
    for name, view in views.items():
        if within(taken, view).any():
            mine = torch.zeros(size, dtype=torch.bool, device="cpu")
            within(mine, view).fill_(True)
            other = next(other for other in views if within(mine, views[other]).any())
            raise ValueError(
                f"{name}: expected memory of its own, got a tensor that shares memory with "
                f"{other}; clone() one of them"
            )
        within(taken, view).fill_(True)
