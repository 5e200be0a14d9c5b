"""Random trees of everything a file can hold, and what it means that one came back as it was."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from safetensors.torch import _SIZE

import funcnet as fn

DTYPES = sorted(_SIZE, key=str)
"""All dtypes that safetensors stores, by its own table."""


@fn.register_node
class Moments(NamedTuple):
    first: Any
    second: Any


@fn.register_node
@dataclass(frozen=True)
class Average:
    decay: float
    mean: Any = ()


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, row-major, by way of Python: slow, and not the way of funcnet."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return b"".join(
        number.to_bytes(tensor.itemsize, "little", signed=integer != torch.uint8)
        for number in flat.view(integer).tolist()
    )


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal in everything but the identity and layout of tensors."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        kind = (a.dtype, a.shape, a.requires_grad, a.device)
        return kind == (b.dtype, b.shape, b.requires_grad, b.device) and bits(a) == bits(b)
    if isinstance(a, dict):
        if [(type(k), k) for k in a] != [(type(k), k) for k in b]:
            return False
        return all(same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.compare)
    if isinstance(a, float):
        return a.hex() == b.hex()
    return bool(a == b)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any bits in any dtype and layout: transposed, sliced, expanded, 0-d, empty, channels_last."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    if dtype == torch.float4_e2m1fn_x2 and not shape:
        shape = [2]
    count = torch.Size(shape).numel()
    data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype == torch.bool:
        data = bytes(byte % 2 for byte in data)
    tensor = torch.empty(shape, dtype=dtype)
    if count:
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)
    layouts = ["plain", "transposed", "expanded", "sliced"] + ["channels_last"] * (len(shape) == 4)
    layout = draw(st.sampled_from(layouts))
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    if layout == "transposed" and shape:
        tensor = tensor.transpose(0, -1)
    elif layout == "expanded" and dtype != torch.float4_e2m1fn_x2:
        tensor = tensor.expand(2, *tensor.shape)
    elif layout == "sliced" and shape:
        padded = torch.cat([tensor.view(integer)] * 2)
        tensor = padded[1 : 1 + shape[0]].view(dtype)
    elif layout == "channels_last":
        ints = tensor.view(integer)
        tensor = ints.contiguous(memory_format=torch.channels_last).view(dtype)
    has_gradients = dtype.is_floating_point and dtype.itemsize > 1
    if has_gradients and draw(st.booleans()):
        tensor = tensor.clone().requires_grad_()
        return torch.nn.Parameter(tensor.detach()) if draw(st.booleans()) else tensor
    return tensor


def texts() -> st.SearchStrategy[str]:
    special = ["", ".", "%", "a.b", "%2E", "0", "-1", "a/b", "ключ 键", "__metadata__", "\0", '"\\']
    return st.sampled_from(special) | st.text(max_size=5)


def scalars() -> st.SearchStrategy[Any]:
    numbers = st.integers() | st.integers(-(2**200), 2**200) | st.floats()
    return st.none() | st.booleans() | numbers | texts()


def layers() -> st.SearchStrategy[Any]:
    simple = st.sampled_from(
        [fn.ReLU(), fn.Sigmoid(), fn.Upsample2d((2, 3)), fn.MSE("sum"), fn.key(7), fn.SGD(0.1, 0.9)]
    ) | st.builds(fn.Conv2d, st.integers(1, 9), st.sampled_from([1, 3, (2, 3)]))
    nets = st.lists(simple.filter(lambda layer: isinstance(layer, fn.Layer)), max_size=3)
    return simple | nets.map(lambda layers: fn.Sequential(*layers))


def trees(max_leaves: int = 12) -> st.SearchStrategy[Any]:
    """Everything at once."""
    keys = texts() | st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 2)

    def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        dicts = st.dictionaries(keys, children, max_size=4)
        return (
            st.lists(children, max_size=4)
            | st.lists(children, max_size=4).map(tuple)
            | dicts
            | dicts.map(OrderedDict)
            | st.builds(Moments, children, children)
            | st.builds(Average, st.floats(allow_nan=False), children)
        )

    return st.recursive(tensors() | scalars() | layers(), containers, max_leaves=max_leaves)
