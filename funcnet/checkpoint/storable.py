"""What a file can hold: refusing the rest before anything is written."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funcnet.checkpoint.container import can_hold
from funcnet.checkpoint.structure import MAX_DEPTH

_MAX_RANK = 64


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
        metadata.encode()  # UnicodeEncodeError is a ValueError
    elif type(metadata) is float and not math.isfinite(metadata):
        raise ValueError(f"{name}: expected a number that JSON has, got {metadata}")
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
    if not can_hold(tensor.dtype) or tensor.is_quantized:
        raise TypeError(f"{name}: expected a dtype that safetensors stores, got {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got one of {tensor.layout}")
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: expected a tensor with values, got one on the meta device")
    if tensor.dim() > _MAX_RANK:
        raise ValueError(f"{name}: expected at most {_MAX_RANK} dimensions, got {tensor.dim()}")
    if not tensor.is_leaf:
        raise ValueError(
            f"{name}: expected values only, got a tensor in an autograd graph; detach() it first"
        )


def _check_untied(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that share memory: they would come back as copies, no longer tied."""
    by_storage = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.numel():
            storage = tensor.untyped_storage()
            by_storage[tensor.device, storage.data_ptr()].append(name)
    for names in by_storage.values():
        if len(names) > 1:
            _check_apart({name: tensors[name] for name in names})


def _check_apart(tensors: dict[str, Tensor]) -> None:
    """Refuse views of one storage that overlap; those that lie side by side are no trouble."""
    owner = _Owners(max(_end(tensor) for tensor in tensors.values()))
    for number, (name, tensor) in enumerate(tensors.items()):
        other = owner.take(tensor, number)
        if other is not None:
            raise ValueError(
                f"{name}: expected memory of its own, got a tensor that shares memory with "
                f"{list(tensors)[other]}; clone() one of them"
            )


class _Owners:
    """Which tensor each byte of a storage belongs to."""

    def __init__(self, size: int) -> None:
        self._owner = torch.full((size,), -1, dtype=torch.int32)

    def take(self, tensor: Tensor, number: int) -> int | None:
        """Mark a tensor's bytes; the number of another that has one of them, if any."""
        itemsize = tensor.dtype.itemsize
        bytes_of = self._owner.as_strided(
            (*tensor.shape, itemsize),
            (*(stride * itemsize for stride in tensor.stride()), 1),
            tensor.storage_offset() * itemsize,
        )
        other = int(bytes_of.max())
        # An expanded tensor has a byte many times, so it is not filled but put.
        bytes_of.copy_(torch.tensor(number, dtype=torch.int32).expand(bytes_of.shape))
        return None if other < 0 else other


def _end(tensor: Tensor) -> int:
    """One past the last byte of its storage that a tensor reaches."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (int(tensor.storage_offset()) + reach + 1) * tensor.dtype.itemsize
