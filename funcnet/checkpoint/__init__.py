"""Trees on disk that can be trusted: whole or refused, the same bits back, readable elsewhere.

    >>> import funcnet as fn, tempfile, os, torch
    >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
    >>> net = fn.Sequential(fn.Conv2d(4, 3), fn.ReLU())
    >>> params = net.init(fn.key(0), (3, 8, 8))
    >>> fn.save_model(path, net, params, metadata={"epoch": 3})
    >>> again, params = fn.load_model(path)
    >>> again == net
    True
    >>> fn.inspect(path).shapes
    {'0.weight': (4, 3, 3, 3), '0.bias': (4,)}

The file's bytes are described in `funcnet.checkpoint.container`, the JSON of the tree's structure
in `funcnet.checkpoint.structure`, names like `0.weight` in `funcnet.tree`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, TypeAlias, overload

import torch
from torch import Tensor

from funcnet.checkpoint import compare, structure
from funcnet.checkpoint.atomic import replacing
from funcnet.checkpoint.collector import no_garbage_collection
from funcnet.checkpoint.errors import CheckpointError
from funcnet.checkpoint.inspection import Inspection
from funcnet.checkpoint.reading import Header, read_header, read_tensors
from funcnet.checkpoint.storable import check_metadata, check_storable
from funcnet.checkpoint.writing import Writer
from funcnet.layer import Layer, Tree

__all__ = ["CheckpointError", "Inspection", "inspect", "load", "load_model", "save", "save_model"]

_Path: TypeAlias = "str | os.PathLike[str]"

MAPPED_FROM = 2**26
"""Bytes of tensors from which files are mapped instead of read, unless `load` is told otherwise."""


def save(path: _Path, tree: Tree, metadata: dict[str, Any] | None = None) -> None:
    """Write a tree to one file, atomically and durably, so that `load` gives back the same tree.

    A tree is made of tuples, lists, dicts and OrderedDicts with keys that are str or int,
    namedtuples and frozen dataclasses known by name (`register_node`), and of tensors, ints,
    floats, bools, texts and None. Tensors may lie on any device and in any layout; their values are
    stored, row-major. `requires_grad` and `torch.nn.Parameter` come back. `metadata` is a dict of
    what JSON holds, for `inspect`.

    The file is a safetensors file with PyTorch's names. The same tree gives the same bytes. Until
    the new file is whole and on the disk, the old one stays; a symbolic link stays too.

    Raises TypeError or ValueError, naming the path, for what could not come back exactly, before
    anything is written: unknown classes, other keys, tensors that share memory, or are sparse,
    quantized, on the meta device, of a subclass, part of an autograd graph, or of a dtype that
    safetensors lacks; OSError with the path if it cannot be written, and then the old file is as it
    was; only if the disk fails while the new one's name is made durable, that is in place.

    >>> import tempfile, torch
    >>> path = tempfile.mkdtemp() + "/tree.safetensors"
    >>> save(path, {"weight": torch.ones(2), 7: [None, "seven"]})
    >>> load(path)
    {'weight': tensor([1., 1.]), 7: [None, 'seven']}
    """
    _save(path, tree, {}, metadata)


def save_model(
    path: _Path, net: Layer, params: Tree, metadata: dict[str, Any] | None = None
) -> None:
    """Write a network together with its parameters, as `save` does, for `load_model`.

    Raises what `save` raises; TypeError for a layer of an unknown class or with a field that is
    neither number, text, bool, None, tuple nor layer.

    >>> import funcnet as fn, tempfile
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> save_model(path, fn.ReLU(), ())
    >>> load_model(path)
    (ReLU(), ())
    """
    if not isinstance(net, Layer):
        raise TypeError(f"save_model: expected net to be a Layer, got {type(net).__name__}")
    architecture, tensors = structure.encode(net)
    if tensors:
        raise TypeError(f"save_model: expected a net without tensors, got one in {net!r}")
    _save(path, params, {"funcnet.architecture": architecture}, metadata)


@overload
def load(
    path: _Path,
    like: Tree = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    strict: Literal[True] = True,
    *,
    mmap: bool | None = None,
) -> Tree: ...
@overload
def load(
    path: _Path,
    like: Tree = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    strict: bool,
    mmap: bool | None = None,
) -> tuple[Tree, dict[str, str]]: ...
def load(
    path: _Path,
    like: Tree = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    *,
    mmap: bool | None = None,
) -> Any:
    """The tree in a file that `save` or `save_model` wrote: containers, names, dtypes, bits.

    `like` is a tree that the one in the file must equal in structure, shapes and dtypes; its
    tensors may lie on the meta device. `device` is where the tensors go, the CPU if not given.
    `dtype` converts floating-point tensors. With `strict=False` and `like` the result is (tree,
    skipped): the tree is `like` with each leaf that the file has too, in the same shape and dtype;
    skipped tells, by name, what differs.

    Every bit of the file is checked, and no code from it runs. Files of 64 MiB and more, or all or
    none as `mmap` says, are mapped into memory privately: fast, but whoever overwrites such a file
    in place (`save` does not) changes the tensors or ends the process.

    Raises CheckpointError, a ValueError that says what is wrong with which entry, for a file that
    is damaged, truncated, foreign, or differs, once converted, from `like`, and then names every
    path that differs; FileNotFoundError, or another OSError, if it cannot be opened; TypeError for
    a dtype that is not floating; ValueError for strict=False without `like`.

    >>> import tempfile, torch
    >>> path = tempfile.mkdtemp() + "/tree.safetensors"
    >>> save(path, [torch.zeros(2, 3), 0.5])
    >>> load(path, like=[torch.zeros(3), 1])
    Traceback (most recent call last):
    ...
    funcnet.checkpoint.errors.CheckpointError: ...tree.safetensors: differs from like in 2 place(s):
      0: expected shape (3,), got (2, 3)
      1: expected int, got float
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"load: expected a floating-point dtype, got {dtype!r}")
    if like is None and not strict:
        raise ValueError("load: expected a tree `like` with strict=False, got None")
    with _opened(path) as file:
        header = read_header(file)
        skipped = {} if like is None else _differences(like, header, dtype)
        if strict and skipped:
            places = "\n".join(f"  {name}: {text}" for name, text in skipped.values())
            raise CheckpointError(f"differs from like in {len(skipped)} place(s):\n{places}")
        tensors = _read_tensors(file, header, device, dtype, mmap)
        if strict:
            return structure.decode(header.structure, tensors.__getitem__)
        return _merge(like, header, tensors, skipped), dict(skipped.values())


def load_model(path: _Path, device: torch.device | str | None = None) -> tuple[Layer, Tree]:
    """The network and the parameters in a file that `save_model` wrote.

    The network is built from classes known by name only, whose constructors check their arguments.

    Raises what `load` raises; CheckpointError for a file without a network.

    >>> import funcnet as fn, tempfile
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> save_model(path, fn.Sequential(fn.ReLU(), fn.Sigmoid()), ((), ()))
    >>> net, params = load_model(path)
    >>> net
    Sequential(ReLU(), Sigmoid())
    """
    with _opened(path) as file:
        header = read_header(file)
        net = Inspection(header).architecture
        if net is None:
            raise CheckpointError(
                "expected a file that save_model wrote, got one without a network"
            )
        tensors = _read_tensors(file, header, device, None, None)
        return net, structure.decode(header.structure, tensors.__getitem__)


def inspect(path: _Path) -> Inspection:
    """What a file holds: `.structure`, `.shapes`, `.dtypes`, `.architecture`, `.metadata`.

    Reads the header only and checks it, and that the file has the right length; no tensor is read.
    Printed, the result is a table, and so `python -m funcnet inspect FILE` prints it.

    Raises what `load` raises.

    >>> import tempfile, torch
    >>> path = tempfile.mkdtemp() + "/tree.safetensors"
    >>> save(path, [torch.zeros(2, 3), 0.5], metadata={"note": "halves"})
    >>> info = inspect(path)
    >>> info.shapes, info.dtypes, info.metadata
    ({'0': (2, 3)}, {'0': torch.float32}, {'note': 'halves'})
    >>> info.structure
    [tensor(..., device='meta', size=(2, 3)), 0.5]
    """
    with _opened(path) as file:
        return Inspection(read_header(file))


def _save(path: _Path, tree: Tree, texts: dict[str, Any], metadata: dict[str, Any] | None) -> None:
    json, tensors = structure.encode(tree)
    check_storable(tensors)
    texts = {"funcnet.structure": json, **texts}
    if metadata is not None:
        check_metadata(metadata)
        texts["funcnet.metadata"] = metadata
    writer = Writer(tensors, texts)
    with replacing(path) as file:
        writer.write(file)


def _read_tensors(
    file: BinaryIO,
    header: Header,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    mmap: bool | None,
) -> dict[str, Tensor]:
    size = sum(entry.size for entry in header.entries.values())
    mapped = size >= MAPPED_FROM if mmap is None else mmap
    as_they_are = device is None and dtype is None
    tensors = {}
    for name, tensor in read_tensors(file, header, mapped=mapped):
        converted = dtype if tensor.is_floating_point() else None
        target = "cpu" if device is None else device
        tensors[name] = tensor if as_they_are else tensor.to(device=target, dtype=converted)
    return tensors


def _differences(
    like: Tree, header: Header, dtype: torch.dtype | None
) -> dict[compare.Path, tuple[str, str]]:
    expected, tensors = structure.encode(like)
    expected_specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    specs = {}
    for name, entry in header.entries.items():
        converted = dtype if entry.dtype.is_floating_point else None
        specs[name] = (converted or entry.dtype, entry.shape)
    return compare.differences(expected, expected_specs, header.structure, specs)


def _merge(like: Tree, header: Header, tensors: dict[str, Tensor], skipped: Container[Any]) -> Tree:
    """`like` with the leaves of the file, but for those at skipped paths."""
    own_structure, own_tensors = structure.encode(like)
    in_file = {part.path: part.json for part in structure.parts(header.structure)}
    # No entry has such a name: in names, % stands only before a code or at the end.
    tensors = tensors | {f"{name}%like": tensor for name, tensor in own_tensors.items()}

    def choose(path: compare.Path, json: structure.Json) -> structure.Json:
        if path not in skipped:
            return in_file[path]
        kind = structure.kind_of(json)
        return {**json, kind: f"{json[kind]}%like"} if structure.is_tensor(kind) else json

    merged = compare.replace_leaves(own_structure, choose)
    return structure.decode(merged, tensors.__getitem__)


@contextmanager
def _opened(path: _Path) -> Iterator[BinaryIO]:
    """The file, for reading; every CheckpointError starts with its path."""
    # Not to wait for somebody to write into a named pipe.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if os.path.isdir(path):  # which Windows cannot open
            raise CheckpointError("expected a file, got a folder")
        with open(os.open(path, flags), "rb") as file, no_garbage_collection():
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError("expected a regular file, got another kind")
            yield file
    except CheckpointError as error:
        error.args = (f"{os.fsdecode(path)}: {error}",)
        raise
