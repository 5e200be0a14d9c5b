"""Refusing what a file cannot hold, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funcnet.checkpoint.container import DTYPE_NAMES, MAX_RANK, PAIRED
from funcnet.checkpoint.structure import INT64, MAX_DEPTH, check_utf8, label
from funcnet.compat import is_transformed
from funcnet.ops.inplace import TENSORS


def check_storable(tensors: Mapping[str, Tensor]) -> None:
    """Raise TypeError or ValueError for a tensor that would not come back as it is."""
    for name, tensor in tensors.items():
        _check_tensor(label(name), tensor)
    _check_untied(tensors)


def check_memory(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a tensor whose storage has been made smaller than the tensor."""
    if not tensor.numel():
        return
    start, stop = _span(tensor)
    held = tensor.untyped_storage()
    if stop > held.data_ptr() + held.nbytes():
        raise ValueError(
            f"{name}: expected memory for all its values, {stop - start} bytes, "
            f"got a storage of {held.nbytes()}"
        )


def check_metadata(metadata: Any, name: str = "metadata", depth: int = 0) -> None:
    """Raise TypeError or ValueError for metadata that JSON would not give back equal."""
    if depth == 0 and type(metadata) is not dict:
        raise TypeError(f"metadata: expected a dict, got {type(metadata).__name__}")
    if depth > MAX_DEPTH:
        raise ValueError(f"metadata: expected at most {MAX_DEPTH} levels of nesting, got more")
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
        check_utf8(f"{name}: expected a str", metadata)
    elif type(metadata) is float and not math.isfinite(metadata):
        raise ValueError(f"{name}: expected a finite number, got {metadata}")
    elif type(metadata) is int and metadata not in INT64:
        raise ValueError(f"{name}: expected an int that fits in 64 bits, got {metadata:#x}")
    elif metadata is not None and type(metadata) not in (bool, int, float):
        raise TypeError(
            f"{name}: expected a dict, list, str, int, float, bool or None, "
            f"got {type(metadata).__name__}"
        )


def _check_tensor(name: str, tensor: Tensor) -> None:
    if type(tensor) not in TENSORS:
        raise TypeError(f"{name}: expected a tensor or Parameter, got a {type(tensor).__name__}")
    if is_transformed(tensor):
        raise TypeError(f"{name}: expected a tensor with values, got one inside torch.func")
    if tensor.dtype not in DTYPE_NAMES or tensor.is_quantized:
        raise TypeError(f"{name}: expected a dtype that safetensors stores, got {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested one" if tensor.is_nested else f"one of {tensor.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: expected a tensor with values, got one on the meta device")
    if tensor.dtype in PAIRED and tensor.dim() == 0:
        raise ValueError(f"{name}: expected one dimension or more for pairs, got shape ()")
    if tensor.dim() > MAX_RANK:
        raise ValueError(f"{name}: expected at most {MAX_RANK} dimensions, got {tensor.dim()}")
    if not tensor.is_leaf:
        raise ValueError(
            f"{name}: expected a leaf tensor, got one in an autograd graph; detach() it first"
        )
    check_memory(name, tensor)


def _check_untied(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for tensors that share memory: they would come back as separate copies."""
    names = list(tensors)
    spans = [
        (_memory_of(tensor), *_span(tensor), position)
        for position, tensor in enumerate(tensors.values())
        if tensor.numel()
    ]
    runs: list[list[int]] = []  # of spans that overlap
    last, reach = "", 0
    for memory, start, end, position in sorted(spans):
        if memory != last or start >= reach:
            runs.append([])
            last, reach = memory, end
        runs[-1].append(position)
        reach = max(reach, end)
    for run in runs:
        if len(run) > 1:
            _check_apart({names[position]: tensors[names[position]] for position in sorted(run)})


def _memory_of(tensor: Tensor) -> str:
    """Name the memory in which a tensor's addresses count."""
    device = str(tensor.device)
    # On MPS an address is a buffer's handle plus an offset into that buffer.
    return f"{device} {tensor.untyped_storage().data_ptr()}" if device.startswith("mps") else device


def _span(view: Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte and of the byte after its last."""
    steps = sum((size - 1) * step for size, step in zip(view.shape, view.stride(), strict=True))
    return view.data_ptr(), view.data_ptr() + (steps + 1) * view.itemsize


def _check_apart(views: dict[str, Tensor]) -> None:
    """Raise ValueError for views that share a byte. Views may interleave, like columns."""
    base = min(view.data_ptr() for view in views.values())
    places = (place for view in views.values() for place in (view.itemsize, view.data_ptr() - base))
    unit = math.gcd(*places)
    size = (max(_span(view)[1] for view in views.values()) - base) // unit

    def within(marks: Tensor, view: Tensor) -> Tensor:
        """Return the marks of a view's memory: one mark stands for `unit` bytes."""
        width = view.itemsize // unit
        strides = zip(view.shape, view.stride(), strict=True)
        sizes = [1 if step == 0 else size for size, step in strides]  # step 0: expanded
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
