"""What cannot come back exactly is refused at save, by path, and the old file stays."""

from __future__ import annotations

import enum
import io
import os
import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import funcnet as fn
from funcnet.checkpoint import container, structure
from funcnet.checkpoint.structure import MAX_DEPTH


class Unregistered(NamedTuple):
    x: int


@dataclass(frozen=True)
class UnregisteredData:
    x: int


class Color(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


class Subclass(torch.Tensor):
    pass


@fn.register_node
@dataclass(frozen=True)
class Rounding:
    """Whose constructor does not keep what it gets."""

    x: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "x", self.x + 1)


@fn.register_node
@dataclass(frozen=True)
class Positive:
    x: float

    def __post_init__(self) -> None:
        if not self.x > 0:
            raise ValueError("x must be positive")


def deep(depth: int) -> Any:
    return [deep(depth - 1)] if depth else ()


def cyclic() -> Any:
    tree: list[Any] = []
    tree += [tree, tree]
    return tree


def tied() -> Any:
    weight = torch.ones(3)
    return {"encoder": weight, "decoder": weight}


def overlapping() -> Any:
    x = torch.ones(9)
    return {"a": x[:5], "b": x[6:], "c": x[4:6]}


def negative() -> Positive:
    value = Positive(1.0)
    object.__setattr__(value, "x", -1.0)
    return value


one = torch.ones(1)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "namedtuple": (lambda: {"a": [Unregistered(1)]}, TypeError, r"^a\.0: .*register_node.*Unregis"),
    "dataclass": (lambda: {"a": UnregisteredData(1)}, TypeError, "^a: .*UnregisteredData"),
    "set": (lambda: [{1, 2}], TypeError, "^0: .*set"),
    "defaultdict": (lambda: defaultdict(list), TypeError, "^the tree: .*defaultdict"),
    "counter": (lambda: Counter(), TypeError, "Counter"),
    "deque": (lambda: deque(), TypeError, "deque"),
    "torch.Size": (lambda: (1, torch.Size([1])), TypeError, "^1: .*Size"),
    "array": (lambda: np.ones(1), TypeError, "numpy"),
    "numpy number": (lambda: {"lr": np.float64(1)}, TypeError, "^lr: .*float64"),
    "complex": (lambda: 1j, TypeError, "complex"),
    "bytes": (lambda: b"", TypeError, "bytes"),
    "enum": (lambda: [Color.RED], TypeError, "Color"),
    "str subclass": (lambda: [Text("x")], TypeError, "Text"),
    "dtype": (lambda: {"dtype": torch.float32}, TypeError, "^dtype: .*dtype"),
    "function": (lambda: {"f": len}, TypeError, "^f: "),
    "schedule": (lambda: {"sgd": fn.SGD(lambda step: 0.1)}, TypeError, r"^sgd\.lr: .*function"),
    "float key": (
        lambda: {"a": {1.5: 1}},
        TypeError,
        "^a: expected every key .* 1.5 of type float",
    ),
    "bool key": (lambda: {True: 1}, TypeError, "True of type bool"),
    "None key": (lambda: OrderedDict({None: 1}), TypeError, "None of type NoneType"),
    "tuple key": (lambda: {(1, 2): 1}, TypeError, "of type tuple"),
    "enum key": (lambda: {Color.RED: 1}, TypeError, "of type Color"),
    "huge key": (lambda: {2**63: 1}, ValueError, "64 bits"),
    "half a surrogate pair": (lambda: {"k": "\ud800"}, ValueError, "^k: .*UTF-8"),
    "half in a key": (lambda: {"k": {"\ud800": 1}}, ValueError, "^k: .*UTF-8"),
    "tied": (tied, ValueError, "^decoder: .*shares memory with encoder"),
    "overlapping": (overlapping, ValueError, "^c: .*shares memory with a"),
    "other dtype": (lambda: (one[:], one.view(torch.int32)), ValueError, "^1: .*memory with 0"),
    "expanded": (lambda: (one.expand(3), one), ValueError, "^1: .*memory with 0"),
    "meta": (lambda: {"w": torch.ones(2, device="meta")}, ValueError, "^w: .*meta"),
    "sparse": (lambda: {"w": torch.ones(2, 2).to_sparse()}, TypeError, "^w: .*sparse_coo"),
    "complex128": (lambda: {"w": one.to(torch.complex128)}, TypeError, "^w: .*complex128"),
    "quantized": (lambda: _quantized(), TypeError, "^the tree: .*quint8"),
    "subclass": (lambda: {"w": one.clone().as_subclass(Subclass)}, TypeError, "^w: .*Subclass"),
    "graph": (lambda: {"w": torch.ones(1, requires_grad=True) * 2}, ValueError, "^w: .*detach"),
    "many dimensions": (lambda: {"w": torch.ones([1] * 65)}, ValueError, "^w: .*64 dimensions"),
    "0-d pair": (
        lambda: one.new_zeros((), dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        ValueError,
        "pairs",
    ),
    "too deep": (lambda: deep(MAX_DEPTH + 1), ValueError, "deep"),
    "cyclic": (cyclic, ValueError, "contains itself"),
    "changing constructor": (lambda: {"r": Rounding(1.0)}, ValueError, "^r: .*Rounding to keep"),
    "refusing constructor": (lambda: {"p": negative()}, ValueError, "^p: .*must be positive"),
}


def _quantized() -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(one, 0.1, 0, torch.quint8)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_come_back_is_refused(case: str, tmp_path: Path) -> None:
    tree, error, message = REFUSED[case]
    path = tmp_path / "tree"
    fn.save(path, "old")
    with pytest.raises(error, match=message):
        fn.save(path, tree())
    assert fn.load(path) == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("path", [io.BytesIO(), 0, None, (torch.ones(2), 3)], ids=type)
def test_what_is_not_a_path_is_named(path: Any) -> None:
    """Open files, and the tree in the path's place, as in torch.save."""
    calls = {
        "save": lambda: fn.save(path, "file"),
        "save_model": lambda: fn.save_model(path, fn.ReLU(), ()),
        "load": lambda: fn.load(path),
        "load_model": lambda: fn.load_model(path),
        "inspect": lambda: fn.inspect(path),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"^{name}: expected path to be a str or an os.Path"):
            call()


def test_a_path_may_be_of_bytes(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path / "tree")
    fn.save(path, 3)
    assert fn.load(path) == fn.inspect(path).structure == 3


def test_tensors_inside_a_transform_are_refused(tmp_path: Path) -> None:
    def inside(x: torch.Tensor) -> torch.Tensor:
        fn.save(tmp_path / "t", x)
        return x

    with pytest.raises(TypeError, match=r"torch\.func"):
        torch.func.vmap(inside)(torch.ones(2))


def test_the_deepest_tree_comes_back(tmp_path: Path) -> None:
    fn.save(tmp_path / "t", deep(MAX_DEPTH))
    assert fn.load(tmp_path / "t") == deep(MAX_DEPTH)


@pytest.mark.parametrize(
    "metadata",
    [
        {1: 2},
        {"a": (1,)},
        {"a": float("nan")},
        {"a": 2**64},
        {"a": "\ud800"},
        {"a": torch.ones(1)},
        [],
    ],
    ids=repr,
)
def test_metadata_that_json_would_change_is_refused(metadata: Any, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=re.compile("^metadata")):
        fn.save(tmp_path / "t", (), metadata=metadata)
    assert not list(tmp_path.iterdir())


def test_the_deepest_metadata_come_back(tmp_path: Path) -> None:
    metadata: dict[str, Any] = {}
    for _ in range(MAX_DEPTH):
        metadata = {"a": metadata}
    fn.save(tmp_path / "t", (), metadata=metadata)
    assert fn.inspect(tmp_path / "t").metadata == metadata
    endless: dict[str, Any] = {}
    endless["a"] = [endless]
    for deeper in ({"a": metadata}, endless):
        with pytest.raises(ValueError, match=f"^metadata: .* at most {MAX_DEPTH} levels"):
            fn.save(tmp_path / "t", (), metadata=deeper)


def test_a_network_that_holds_what_a_file_cannot_is_refused(tmp_path: Path) -> None:
    @fn.register_node
    @dataclass(frozen=True)
    class Activation(fn.ReLU):
        function: Any = len

    with pytest.raises(TypeError, match=r"layers\.0\.function: .*builtin_function"):
        fn.save_model(tmp_path / "m", fn.Sequential(Activation()), ((),))
    with pytest.raises(TypeError, match="without tensors"):
        fn.save_model(tmp_path / "m", Activation(torch.ones(1)), ())
    with pytest.raises(TypeError, match=r"expected net to be a Layer, got \(\)"):
        fn.save_model(tmp_path / "m", (), ())
    assert not list(tmp_path.iterdir())


def test_tensors_that_share_memory_without_sharing_a_storage(tmp_path: Path) -> None:
    array = np.ones(8)
    tree = {"a": torch.from_numpy(array), "b": torch.from_numpy(array[1:])}
    with pytest.raises(ValueError, match=r"^b: .* shares memory with a; clone"):
        fn.save(tmp_path / "t", tree)
    fn.save(tmp_path / "t", {"a": torch.from_numpy(array[:4]), "b": torch.from_numpy(array[4:])})
    columns = {"a": torch.from_numpy(array[::2]), "b": torch.from_numpy(array[1::2])}
    fn.save(tmp_path / "t", columns)
    assert torch.equal(fn.load(tmp_path / "t")["b"], torch.ones(4, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_called_so(tmp_path: Path) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(TypeError, match="expected a dense tensor, got a nested one"):
        fn.save(tmp_path / "a", nested)


@pytest.mark.parametrize("use", [lambda path: fn.save(path, 1), fn.load, fn.inspect, fn.load_model])
def test_a_path_that_no_file_can_have(use: Callable[[str], Any]) -> None:
    with pytest.raises(
        ValueError, match=r": expected a path without null characters, got 'a\\x00b'"
    ):
        use("a\0b")


@pytest.mark.parametrize(
    ("module", "limit"),
    [
        (structure, "MAX_NODES"),
        (structure, "MAX_NAME_SIZE"),
        (container, "MAX_HEADER"),
        (container, "MAX_VALUES"),
    ],
)
def test_what_is_beyond_a_limit_is_neither_written_nor_read(
    module: Any, limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tree = tmp_path / "t", {"a": [1, 2]}  # with names "", "a", "a.0" and "a.1"
    fn.save(path, tree)
    before = path.read_bytes()
    sizes = {
        "MAX_NODES": 4,
        "MAX_NAME_SIZE": 7,
        "MAX_HEADER": len(before) - 8,
        "MAX_VALUES": sum(before.count(mark) for mark in (b",", b":", b"[", b"{")),
    }
    monkeypatch.setattr(module, limit, sizes[limit])
    fn.save(path, tree)
    assert fn.load(path) == tree
    monkeypatch.setattr(module, limit, sizes[limit] - 1)
    with pytest.raises(ValueError, match="at most"):
        fn.save(path, tree)
    assert path.read_bytes() == before
    with pytest.raises(fn.CheckpointError, match="at most"):
        fn.load(path)
